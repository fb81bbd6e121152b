package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/skerry-io/skerry/edgecore/devices"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/localapi"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
)

// LocalAPIConfig is the read API for clients on the device.
type LocalAPIConfig struct {
	// Listen is a loopback address for the administrator, whose kubeconfig is
	// DATA-DIR/local.kubeconfig; default 127.0.0.1:10271, "off" for no local
	// API at all.
	Listen string `json:"listen,omitempty"`
	// Pods leads in-cluster clients of pods (KUBERNETES_SERVICE_HOST) to this
	// node's API instead of the cluster's. It reaches containers that start
	// afterwards.
	Pods bool `json:"pods,omitempty"`
	// PodListen is where pods find it; default 169.254.20.20:10271. A
	// link-local address that the machine has not got is added to its loopback
	// interface.
	PodListen string `json:"podListen,omitempty"`
}

const (
	defaultLocalListen = "127.0.0.1:10271"
	defaultPodListen   = "169.254.20.20:10271"
)

func (c *LocalAPIConfig) complete() {
	if c.Listen == "" {
		c.Listen = defaultLocalListen
	}
	if c.PodListen == "" {
		c.PodListen = defaultPodListen
	}
}

// newLocalAPI is nil when it is off.
func newLocalAPI(dataDir string, cfg Config, node string, db *store.Store, source *tokens.Source, l *link.Link,
	kubelet func(context.Context) (http.Handler, error), things *devices.Part, log *slog.Logger) (*localapi.Server, error) {
	if cfg.LocalAPI.Listen == "off" {
		if cfg.LocalAPI.Pods {
			return nil, errors.New("configuration: localAPI.pods needs localAPI.listen, which is off")
		}
		return nil, localapi.DropPodAddress()
	}
	config := localapi.Config{
		Store: db, NodeName: node, Tokens: source, Dir: dataDir, Listen: cfg.LocalAPI.Listen,
		ClusterDomain: cfg.Kubelet.ClusterDomain, Kubelet: kubelet, Log: log,
	}
	if things != nil {
		config.Devices = things.Pods()
	}
	if cfg.LocalAPI.Pods {
		config.PodListen = cfg.LocalAPI.PodListen
	}
	config.Notice = func() string {
		st := l.State()
		if st.Connected {
			return "it is connected to the cloud"
		}
		return "it has not been connected to the cloud for " + duration.HumanDuration(time.Since(st.Since))
	}
	return localapi.New(config)
}
