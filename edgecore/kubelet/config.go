package kubelet

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
)

// Config is what edgecore decides about its kubelet. Everything else is the
// upstream default for edge nodes in settings.go, changed by Overlay.
type Config struct {
	// NodeName is the node's name in the cluster. Required.
	NodeName string
	// Transport reaches the Kubernetes API the kubelet works from. Required.
	Transport http.RoundTripper

	// RootDir holds volumes and checkpoints; empty means /var/lib/kubelet,
	// where CSI drivers expect it. Device plugins are always looked for below
	// /var/lib/kubelet.
	RootDir string
	// RuntimeEndpoint is the CRI socket, "unix://" may be left out; empty
	// means /run/containerd/containerd.sock.
	RuntimeEndpoint string
	// ImageEndpoint is the socket of the image service where that is not the
	// runtime's own; empty means RuntimeEndpoint.
	ImageEndpoint string
	// CgroupRoot is the cgroup the pods' cgroups are made below; empty means
	// the root. It is made if missing.
	CgroupRoot string
	// CgroupDriver is "cgroupfs" or "systemd"; empty means what the runtime
	// says it uses.
	CgroupDriver string
	// PodLogsDir holds the containers' logs; empty means /var/log/pods.
	PodLogsDir string
	// StaticPodPath is a directory of pod manifests run without any API; empty
	// means none. Made if missing.
	StaticPodPath string

	// NodeIP is the address reported for the node; empty means chosen from the
	// host's interfaces, see ChooseAddress. It must be on an interface.
	NodeIP net.IP
	// NodeLabels are set when the node registers.
	NodeLabels map[string]string
	// Taints are set when the node registers for the first time.
	Taints []corev1.Taint
	// MaxPods bounds the pods of this node; zero means 110.
	MaxPods int
	// ClusterDNS are the name servers written to pods with dnsPolicy
	// ClusterFirst; empty makes such pods use the host's.
	ClusterDNS []string
	// ClusterDomain is searched first by pods; empty means cluster.local.
	ClusterDomain string

	// CSI adds the CSI volume plugin. It is off by default: it writes a
	// CSINode object and ends the process if that fails for minutes.
	CSI bool
	// Overlay is a KubeletConfiguration (kubelet.config.k8s.io/v1beta1) in
	// YAML over Skerry's settings. An unknown key is refused, and so is a key
	// that edgecore decides itself.
	Overlay []byte

	// Containers measures the machine and its containers; nil means Run makes
	// it with metrics/containers, from the same configuration.
	Containers cadvisor.Interface
	// HousekeepingInterval is the shortest time between two measurements of a
	// container when Containers is nil; zero means 10 s.
	HousekeepingInterval time.Duration

	// Log gets the kubelet's own lines too; nil discards.
	Log *slog.Logger
	// KubeletLogLevel is the least level of the kubelet's own lines; nil means
	// slog.LevelInfo. It logs some ten lines per pod start, and as errors some
	// conditions of a start that pass by themselves.
	KubeletLogLevel slog.Leveler
}

const (
	defaultRootDir         = "/var/lib/kubelet"
	defaultRuntimeEndpoint = "unix:///run/containerd/containerd.sock"
	defaultPodLogsDir      = "/var/log/pods"
	defaultClusterDomain   = "cluster.local"
	defaultMaxPods         = 110
)

// complete fills defaults and checks what can be checked without looking at
// the host.
func (c *Config) complete() error {
	if c.RootDir == "" {
		c.RootDir = defaultRootDir
	}
	if c.RuntimeEndpoint == "" {
		c.RuntimeEndpoint = defaultRuntimeEndpoint
	}
	if c.PodLogsDir == "" {
		c.PodLogsDir = defaultPodLogsDir
	}
	if c.ClusterDomain == "" {
		c.ClusterDomain = defaultClusterDomain
	}
	if c.MaxPods == 0 {
		c.MaxPods = defaultMaxPods
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.KubeletLogLevel == nil {
		c.KubeletLogLevel = slog.LevelInfo
	}

	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("kubelet: no node name; set node.name"))
	} else if msgs := validation.IsDNS1123Subdomain(c.NodeName); len(msgs) > 0 {
		errs = append(errs, fmt.Errorf("kubelet: node name %q: %s; choose another name", c.NodeName, strings.Join(msgs, "; ")))
	}
	endpoint, err := cleanEndpoint(c.RuntimeEndpoint)
	if err != nil {
		errs = append(errs, err)
	}
	c.RuntimeEndpoint = endpoint
	if c.ImageEndpoint != "" {
		if c.ImageEndpoint, err = cleanEndpoint(c.ImageEndpoint); err != nil {
			errs = append(errs, err)
		}
	}
	for name, dir := range map[string]string{"root directory": c.RootDir, "pod logs directory": c.PodLogsDir, "static pod path": c.StaticPodPath} {
		if dir != "" && !filepath.IsAbs(dir) {
			errs = append(errs, fmt.Errorf("kubelet: %s %q is not absolute; give a path that starts with /", name, dir))
		}
	}
	if c.CgroupRoot != "" && !strings.HasPrefix(c.CgroupRoot, "/") {
		errs = append(errs, fmt.Errorf("kubelet: cgroup root %q is not absolute; give a path that starts with /", c.CgroupRoot))
	}
	switch c.CgroupDriver {
	case "", "cgroupfs", "systemd":
	default:
		errs = append(errs, fmt.Errorf("kubelet: cgroup driver %q is unknown; use cgroupfs or systemd, or leave it empty", c.CgroupDriver))
	}
	if c.NodeIP != nil && !reportable(c.NodeIP) {
		errs = append(errs, fmt.Errorf("kubelet: node address %v cannot be reported, as it is a loopback, link-local or multicast address; give another one or none", c.NodeIP))
	}
	for _, server := range c.ClusterDNS {
		if net.ParseIP(server) == nil {
			errs = append(errs, fmt.Errorf("kubelet: cluster DNS server %q is not an IP address", server))
		}
	}
	if c.MaxPods < 0 {
		errs = append(errs, fmt.Errorf("kubelet: %d pods at most make no sense; give a positive number", c.MaxPods))
	}
	return errors.Join(errs...)
}

// cleanEndpoint accepts the socket with and without its scheme and always
// returns it with one, as the kubelet wants it.
func cleanEndpoint(endpoint string) (string, error) {
	path := strings.TrimPrefix(endpoint, "unix://")
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("kubelet: runtime endpoint %q is not the path of a unix socket; give one such as /run/containerd/containerd.sock", endpoint)
	}
	return "unix://" + filepath.Clean(path), nil
}

// socketPath is the endpoint without its scheme.
func socketPath(endpoint string) string {
	return strings.TrimPrefix(endpoint, "unix://")
}
