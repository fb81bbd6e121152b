package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"

	"github.com/skerry-io/skerry/edgecore/autonomy"
	"github.com/skerry-io/skerry/edgecore/devices"
	"github.com/skerry-io/skerry/edgecore/drill"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/edgecore/images"
	"github.com/skerry-io/skerry/edgecore/kubelet"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/metrics"
)

// readiness is what makes the node fit to be alone, tells whether it is, and
// proves it.
type readiness struct {
	images  *images.Proxy
	monitor *autonomy.Monitor
	drill   *drill.Manager
	restart chan struct{} // takes one: edgecore is to replace itself
}

// imagesEndpoint is the kubelet's image service, served by edgecore itself.
func imagesEndpoint(dataDir string) (string, error) {
	path, err := filepath.Abs(filepath.Join(dataDir, imagesSocket))
	if err != nil {
		return "", fmt.Errorf("image service: %w", err)
	}
	return "unix://" + path, nil
}

// readinessConfig names the parts that newReadiness looks at.
type readinessConfig struct {
	dataDir  string
	cfg      Config
	id       *identity.Identity
	store    *store.Store
	link     *link.Link
	kubelet  *kubelet.Kubelet
	endpoint string        // of the images
	devices  *devices.Part // nil: off
	log      *slog.Logger
}

func newReadiness(c readinessConfig) (*readiness, error) {
	r := &readiness{restart: make(chan struct{}, 1)}
	settings := c.kubelet.Settings()
	strict := !*c.cfg.Images.LocalWhenUnreachable
	var err error
	r.images, err = images.New(images.Config{
		Runtime: c.kubelet.RuntimeEndpoint(), Socket: strings.TrimPrefix(c.endpoint, "unix://"),
		Store: c.store, NoFallback: strict, Log: c.log,
		Changed: func() { r.monitor.Changed() },
		Link: func() images.Link {
			s := c.link.State()
			return images.Link{Connected: s.Connected, Since: s.Since, Drill: r.drill.Cut()}
		},
		Access: images.AccessConfig{
			RecordsDir: c.kubelet.RootDir(),
			Policy:     config.ImagePullCredentialsVerificationPolicy(settings.ImagePullCredentialsVerificationPolicy),
			Preloaded:  settings.PreloadedImagesVerificationAllowlist,
		},
	})
	if err != nil {
		return nil, err
	}
	r.monitor, err = autonomy.New(autonomy.Config{
		Store: c.store, NodeName: c.id.NodeName(), Images: r.images, StrictPull: strict, CSI: c.cfg.Kubelet.CSI, Log: c.log,
		Link: func() autonomy.Link {
			s := c.link.State()
			return autonomy.Link{Connected: s.Connected, Drill: r.drill.Cut(), Since: s.Since, LastSync: s.LastSync, Outbox: c.store.Outbox().Depth()}
		},
		Certificate: func() *x509.Certificate { return c.id.Certificate() },
		Conditions:  conditionsOf(c.devices),
		Dirs:        map[string]string{"store": c.dataDir, "pods": c.kubelet.RootDir()},
	})
	if err != nil {
		return nil, err
	}
	r.drill, err = drill.New(drill.Config{
		Path: filepath.Join(c.dataDir, drillFile), Store: c.store, Runtime: c.kubelet.RuntimeEndpoint(), KubeletDir: c.kubelet.RootDir(),
		Pause: c.link.Pause, Ready: r.monitor.Now, Log: c.log,
	})
	return r, err
}

// errRestart ends run so that edgecore replaces itself.
var errRestart = errors.New("edgecore is to be restarted")

func (r *readiness) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.images.Run(ctx) })
	g.Go(func() error { return r.monitor.Run(ctx) })
	g.Go(func() error { return r.drill.Run(ctx) })
	g.Go(func() error {
		select {
		case <-r.restart:
			return errRestart
		case <-ctx.Done():
			return nil
		}
	})
	return g.Wait()
}

// replaceSelf runs this program anew in the same process, so that whatever
// supervises it has nothing to do. It returns only if that fails.
func replaceSelf() error {
	path, err := os.Executable()
	if err != nil || strings.HasSuffix(path, " (deleted)") {
		path = "/proc/self/exe" // replaced on disk; this is what runs
	}
	if err := syscall.Exec(path, os.Args, os.Environ()); err != nil {
		return fmt.Errorf("restart edgecore: %w; its supervisor has to", err)
	}
	return nil
}

// DrillStatus is the drill under way, or the last one, in a few words.
type DrillStatus struct {
	Phase   string    `json:"phase"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	Passed  bool      `json:"passed"`
}

func (r *readiness) drillStatus() *DrillStatus {
	s, ok := r.drill.State()
	if !ok {
		return nil
	}
	return &DrillStatus{s.Phase, s.Started, s.Ended, s.Passed}
}

var (
	descAutonomy = desc("autonomy_ready", "1 while every pod would come back after a restart without the cloud; see edgecore status.")
	descFindings = prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "edge", "autonomy_findings"),
		"What would not be as it was after a restart without the cloud.", []string{"severity"}, nil)
)

// Describe and Collect are the verdict of the last look as metrics.
func (r *readiness) Describe(ch chan<- *prometheus.Desc) { ch <- descAutonomy; ch <- descFindings }

func (r *readiness) Collect(ch chan<- prometheus.Metric) {
	report := r.monitor.Last()
	if report.At.IsZero() {
		return // not looked yet
	}
	ready := 0.0
	if report.Ready {
		ready = 1
	}
	ch <- prometheus.MustNewConstMetric(descAutonomy, prometheus.GaugeValue, ready)
	ch <- prometheus.MustNewConstMetric(descFindings, prometheus.GaugeValue, float64(report.Breaking()), "breaks")
	ch <- prometheus.MustNewConstMetric(descFindings, prometheus.GaugeValue, float64(report.Warnings()), "warns")
}
