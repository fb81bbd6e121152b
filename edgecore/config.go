package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/edgecore/link"
)

const (
	configAPIVersion = "edgecore.skerry.dev/v1alpha1"
	configKind       = "Config"

	configFile   = "config.yaml" // below the data directory
	storeFile    = "store.db"    // the node's objects
	storeKeyFile = "store.key"   // encrypts secrets in it
	issuerFile   = "issuer.key"  // signs tokens for the local API
	adminSocket  = "edgecore.sock"
	drillFile    = "drill.json"    // the last drill, or the one under way
	imagesSocket = "images.sock"   // the kubelet's image service
	clockFile    = "clock.json"    // a moment that has certainly passed
	metricsToken = "metrics.token" // bearer token of the loopback metrics
)

// Config is edgecore's configuration, DATA-DIR/config.yaml. "edgecore join"
// writes the first one; without the file everything is at its default. Who the
// node is, its name included, stands in its identity, not here.
type Config struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`

	// Hub is the hub's URL if it is not the one the node joined at.
	Hub string `json:"hub,omitempty"`

	Tunnel   TunnelConfig   `json:"tunnel,omitempty"`
	Node     NodeConfig     `json:"node,omitempty"`
	Runtime  RuntimeConfig  `json:"runtime,omitempty"`
	Kubelet  KubeletConfig  `json:"kubelet,omitempty"`
	Images   ImagesConfig   `json:"images,omitempty"`
	LocalAPI LocalAPIConfig `json:"localAPI,omitempty"`
	Store    StoreConfig    `json:"store,omitempty"`
	Devices  DevicesConfig  `json:"devices,omitempty"`
	Metrics  MetricsConfig  `json:"metrics,omitempty"`
	Log      LogConfig      `json:"log,omitempty"`
}

// TunnelConfig is how the node keeps its tunnel to the hub.
type TunnelConfig struct {
	// PingMax is how long an idle tunnel may be silent; default 50s. The hub
	// takes the node for dead 25s after it should have spoken, and may cap
	// this. A ping and its answer are 221 bytes: every 50s 11.5 MB a month,
	// every 230s 2.5 MB.
	PingMax metav1.Duration `json:"pingMax,omitempty"`
	// MaxBackoff is the longest wait before the hub is dialled again; default
	// 30s. A change of the network ends it early.
	MaxBackoff metav1.Duration `json:"maxBackoff,omitempty"`
}

func (c TunnelConfig) check() error {
	for key, d := range map[string]metav1.Duration{"pingMax": c.PingMax, "maxBackoff": c.MaxBackoff} {
		if d.Duration != 0 && (d.Duration < time.Second || d.Duration > time.Hour) {
			return fmt.Errorf("tunnel.%s is %v; use 1s to 1h", key, d.Duration)
		}
	}
	return nil
}

// NodeConfig is how the node appears in the cluster.
type NodeConfig struct {
	// IP is the address reported for the node; default: chosen from the
	// host's interfaces.
	IP string `json:"ip,omitempty"`
	// Labels and Taints are set when the node registers.
	Labels map[string]string `json:"labels,omitempty"`
	Taints []corev1.Taint    `json:"taints,omitempty"`
	// WhenDeleted says what becomes of the pods when the Node object is
	// deleted in the cloud: keep (the default), they run on until this machine
	// has joined again; stop, they are ended in order.
	WhenDeleted link.WhenDeleted `json:"whenDeleted,omitempty"`
}

// RuntimeConfig is the container runtime.
type RuntimeConfig struct {
	// Endpoint is the CRI socket; default /run/containerd/containerd.sock.
	Endpoint string `json:"endpoint,omitempty"`
	// CgroupDriver is cgroupfs or systemd; default: what the runtime uses.
	CgroupDriver string `json:"cgroupDriver,omitempty"`
}

// KubeletConfig is what may be changed about the kubelet.
type KubeletConfig struct {
	RootDir       string   `json:"rootDir,omitempty"`       // default /var/lib/kubelet
	PodLogsDir    string   `json:"podLogsDir,omitempty"`    // default /var/log/pods
	CgroupRoot    string   `json:"cgroupRoot,omitempty"`    // default /
	StaticPodPath string   `json:"staticPodPath,omitempty"` // default DATA-DIR/manifests
	MaxPods       int      `json:"maxPods,omitempty"`       // default 110
	ClusterDNS    []string `json:"clusterDNS,omitempty"`
	ClusterDomain string   `json:"clusterDomain,omitempty"` // default cluster.local
	// CSI adds the CSI volume plugin.
	CSI bool `json:"csi,omitempty"`
	// Config is a KubeletConfiguration (kubelet.config.k8s.io/v1beta1) laid
	// over Skerry's settings.
	Config map[string]any `json:"config,omitempty"`
}

// ImagesConfig is how pods come to their images.
type ImagesConfig struct {
	// LocalWhenUnreachable lets a container with imagePullPolicy Always start
	// from the image on the node when its registry cannot be reached; default
	// true.
	LocalWhenUnreachable *bool `json:"localWhenUnreachable,omitempty"`
}

// StoreConfig is the node's copy of its objects.
type StoreConfig struct {
	// BytesPerDay is how much the store should write to the disk in 24 hours,
	// like 5M (the default); "0" is no limit. Beyond it, what need not be
	// durable at once is written six times less often, and the last good copy
	// is made less often the larger it is. What was acknowledged never waits.
	BytesPerDay string `json:"bytesPerDay,omitempty"`
}

// bytesPerDay returns the budget in bytes.
func (c StoreConfig) bytesPerDay() (uint64, error) {
	q, err := resource.ParseQuantity(c.BytesPerDay)
	if err != nil || q.Sign() < 0 {
		return 0, fmt.Errorf("configuration: store.bytesPerDay %q is not a number of bytes like 5M", c.BytesPerDay)
	}
	return uint64(q.Value()), nil
}

// MetricsConfig is edgecore's own exposition.
type MetricsConfig struct {
	// Listen is a loopback address; default 127.0.0.1:10270, "off" for none.
	// Requests carry the bearer token of DATA-DIR/metrics.token.
	Listen string `json:"listen,omitempty"`
}

// LogConfig says what is logged to standard error.
type LogConfig struct {
	Level  string `json:"level,omitempty"`  // debug, info, warn or error; default info
	Format string `json:"format,omitempty"` // text or json; default text
}

const defaultBytesPerDay = "5M"

const defaultMetricsListen = "127.0.0.1:10270"

// loadConfig reads DATA-DIR/config.yaml.
func loadConfig(dataDir string) (Config, error) {
	path := filepath.Join(dataDir, configFile)
	c := Config{APIVersion: configAPIVersion, Kind: configKind}
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return c, fmt.Errorf("read configuration: %w", err)
	default:
		c = Config{}
		if err := yaml.UnmarshalStrict(b, &c); err != nil {
			return c, fmt.Errorf("configuration %s: %w", path, err)
		}
		if c.APIVersion != configAPIVersion || c.Kind != configKind {
			return c, fmt.Errorf("configuration %s: apiVersion %q, kind %q; this edgecore reads %q, %q", path, c.APIVersion, c.Kind, configAPIVersion, configKind)
		}
	}
	if err := c.Tunnel.check(); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, err)
	}
	c.complete(dataDir)
	if err := c.Devices.complete(c.LocalAPI.Pods, c.LocalAPI.PodListen); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

func (c *Config) complete(dataDir string) {
	if c.Kubelet.StaticPodPath == "" {
		c.Kubelet.StaticPodPath = filepath.Join(dataDir, "manifests")
	}
	if c.Images.LocalWhenUnreachable == nil {
		c.Images.LocalWhenUnreachable = ptr.To(true)
	}
	if c.Store.BytesPerDay == "" {
		c.Store.BytesPerDay = defaultBytesPerDay
	}
	c.LocalAPI.complete()
	if c.Metrics.Listen == "" {
		c.Metrics.Listen = defaultMetricsListen
	}
	if c.Log.Level == "" {
		c.Log.Level = "info"
	}
	if c.Log.Format == "" {
		c.Log.Format = "text"
	}
}

// firstConfig is what join writes for the operator to edit.
const firstConfig = `# Configuration of edgecore. Unknown keys are refused; see
# deploy/config/edgecore.yaml of the release for all of them.
apiVersion: ` + configAPIVersion + `
kind: ` + configKind + `
`

// ensureConfig writes a first configuration where there is none.
func ensureConfig(dataDir string) error {
	path := filepath.Join(dataDir, configFile)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	_, err = f.WriteString(firstConfig)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}
