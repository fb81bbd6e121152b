package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/cloudhub/tolerations"
)

const (
	configAPIVersion = "cloudhub.skerry.dev/v1alpha1"
	configKind       = "Config"
)

// Config is cloudhub's configuration file. Every key has a flag; a flag that
// is given wins over the file.
type Config struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`

	// DataDir holds all state. Default /var/lib/skerry/cloudhub.
	DataDir string `json:"dataDir,omitempty"`
	// RuntimeDir holds etcd's socket. Default DATA-DIR/run; set it when that
	// path is too long for a socket.
	RuntimeDir string `json:"runtimeDir,omitempty"`
	// Listen is the address that edge nodes dial. Default ":10443".
	Listen string `json:"listen,omitempty"`
	// PublicURL is how edge nodes reach Listen; it goes into join commands.
	// Default https://, the first of ServerNames or this host's address, and
	// the port of Listen.
	PublicURL string `json:"publicURL,omitempty"`
	// ServerNames are the DNS names and IPs in the hub's certificate. Default:
	// this host's name and addresses, and localhost.
	ServerNames []string `json:"serverNames,omitempty"`
	// VirtualCIDR is what nodes' InternalIPs are taken from. Default
	// 100.64.0.0/16.
	VirtualCIDR string `json:"virtualCIDR,omitempty"`

	// DefaultTolerationSeconds is how long a pod stays on a node that is silent
	// when neither it nor the node is kept: what admission gives pods that say
	// nothing themselves. The API server of "standalone" gives this. Default 300.
	DefaultTolerationSeconds int64 `json:"defaultTolerationSeconds,omitempty"`

	// CertLifetime is the life of a node's certificate; the node renews it when
	// a third is left. Default 2160h (90 days), at least 1m.
	CertLifetime metav1.Duration `json:"certLifetime,omitempty"`
	// CertGrace is how long after its end the certificate of a node that is
	// known and not revoked still gets it a new one, and nothing else, so that
	// a node that was away comes back without a visit. Default 8760h (a year),
	// negative for none.
	CertGrace metav1.Duration `json:"certGrace,omitempty"`
	// PingMax is the longest silence that a node may ask for on an idle
	// tunnel. A dead node is missed 25s after it should have spoken. Default
	// 5m.
	PingMax metav1.Duration `json:"pingMax,omitempty"`

	// APIServerListen is the API server's address. Default ":6443".
	APIServerListen string `json:"apiserverListen,omitempty"`
	// AdvertiseAddress is the API server's IP for others. Default: that of
	// APIServerListen or of the default route.
	AdvertiseAddress string `json:"advertiseAddress,omitempty"`
	// ServiceCIDR cannot be changed later. Default 10.96.0.0/16.
	ServiceCIDR string `json:"serviceCIDR,omitempty"`
	// Etcd are endpoints to use instead of the embedded etcd.
	Etcd []string `json:"etcd,omitempty"`

	// Further flags of the control plane's components.
	APIServerArgs         []string `json:"apiserverArgs,omitempty"`
	ControllerManagerArgs []string `json:"controllerManagerArgs,omitempty"`
	SchedulerArgs         []string `json:"schedulerArgs,omitempty"`

	Log LogConfig `json:"log,omitempty"`
}

// LogConfig says what is logged to standard error.
type LogConfig struct {
	Level  string `json:"level,omitempty"`  // debug, info, warn or error; default info
	Format string `json:"format,omitempty"` // text or json; default text
}

func defaultConfig() Config {
	return Config{
		APIVersion:      configAPIVersion,
		Kind:            configKind,
		DataDir:         defaultDataDir,
		Listen:          ":10443",
		APIServerListen: ":6443",
		CertLifetime:    metav1.Duration{Duration: 90 * 24 * time.Hour},
		CertGrace:       metav1.Duration{Duration: 365 * 24 * time.Hour},
		PingMax:         metav1.Duration{Duration: 5 * time.Minute},
		Log:             LogConfig{Level: "info", Format: "text"},

		DefaultTolerationSeconds: tolerations.DefaultSeconds,
	}
}

// bind gives every key of c a flag.
func (c *Config) bind(fs *pflag.FlagSet) {
	fs.StringVar(&c.DataDir, "data-dir", c.DataDir, "directory of all state")
	fs.StringVar(&c.RuntimeDir, "runtime-dir", c.RuntimeDir, "directory of etcd's socket (default DATA-DIR/run)")
	fs.StringVar(&c.Listen, "listen", c.Listen, "address that edge nodes dial")
	fs.StringVar(&c.PublicURL, "public-url", c.PublicURL, "how edge nodes reach --listen, for join commands (default: made from the server names)")
	fs.StringSliceVar(&c.ServerNames, "server-names", c.ServerNames, "DNS names and IPs in the hub's certificate (default: this host's)")
	fs.StringVar(&c.VirtualCIDR, "virtual-cidr", c.VirtualCIDR, "range of the nodes' InternalIPs (default 100.64.0.0/16)")
	fs.Int64Var(&c.DefaultTolerationSeconds, "default-toleration-seconds", c.DefaultTolerationSeconds, "how long pods that are not kept stay on a silent node")
	fs.DurationVar(&c.CertLifetime.Duration, "cert-lifetime", c.CertLifetime.Duration, "life of a node's certificate")
	fs.DurationVar(&c.CertGrace.Duration, "cert-grace", c.CertGrace.Duration, "how long after its end a node's certificate still gets it a new one")
	fs.DurationVar(&c.PingMax.Duration, "ping-max", c.PingMax.Duration, "longest silence that a node may ask for on an idle tunnel")
	fs.StringVar(&c.APIServerListen, "apiserver-listen", c.APIServerListen, "address of the API server")
	fs.StringVar(&c.AdvertiseAddress, "advertise-address", c.AdvertiseAddress, "IP of the API server for others")
	fs.StringVar(&c.ServiceCIDR, "service-cidr", c.ServiceCIDR, "range of service addresses (default 10.96.0.0/16)")
	fs.StringSliceVar(&c.Etcd, "etcd", c.Etcd, "endpoints of an etcd to use instead of the embedded one")
	fs.StringArrayVar(&c.APIServerArgs, "apiserver-arg", c.APIServerArgs, "further flag of kube-apiserver, --name=value (repeatable)")
	fs.StringArrayVar(&c.ControllerManagerArgs, "controller-manager-arg", c.ControllerManagerArgs, "further flag of kube-controller-manager (repeatable)")
	fs.StringArrayVar(&c.SchedulerArgs, "scheduler-arg", c.SchedulerArgs, "further flag of kube-scheduler (repeatable)")
	fs.StringVar(&c.Log.Level, "log-level", c.Log.Level, "debug, info, warn or error")
	fs.StringVar(&c.Log.Format, "log-format", c.Log.Format, "text or json")
}

// loadConfig reads the file, if one is named, and lays the given flags over it.
func loadConfig(path string, fs *pflag.FlagSet) (Config, error) {
	c := defaultConfig()
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return c, fmt.Errorf("read configuration: %w", err)
		}
		c.APIVersion, c.Kind = "", ""
		if err := yaml.UnmarshalStrict(b, &c); err != nil {
			return c, fmt.Errorf("configuration %s: %w", path, err)
		}
		if c.APIVersion != configAPIVersion || c.Kind != configKind {
			return c, fmt.Errorf("configuration %s: apiVersion %q, kind %q; this cloudhub reads %q, %q", path, c.APIVersion, c.Kind, configAPIVersion, configKind)
		}
	}
	over := pflag.NewFlagSet("over", pflag.ContinueOnError)
	c.bind(over)
	var err error
	fs.Visit(func(f *pflag.Flag) {
		target := over.Lookup(f.Name)
		if target == nil || err != nil {
			return
		}
		if from, ok := f.Value.(pflag.SliceValue); ok {
			err = target.Value.(pflag.SliceValue).Replace(from.GetSlice())
		} else {
			err = target.Value.Set(f.Value.String())
		}
	})
	return c, err
}
