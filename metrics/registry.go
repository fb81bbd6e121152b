package metrics

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Namespace begins the name of every metric Skerry defines.
const Namespace = "skerry"

// Config names the program whose metrics are kept.
type Config struct {
	Program string       // "edgecore" or "cloudhub"; required
	Version string       // of the build; empty means "unknown"
	Log     *slog.Logger // nil discards
}

// Registry holds one program's metrics. It is a prometheus.Registerer.
type Registry struct {
	*prometheus.Registry
	log *slog.Logger
}

// New makes a registry with the Go runtime's and the process's figures in it.
func New(cfg Config) (*Registry, error) {
	if cfg.Program == "" {
		return nil, errors.New("metrics: no program name; set Config.Program")
	}
	if cfg.Version == "" {
		cfg.Version = "unknown"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Registry{Registry: prometheus.NewRegistry(), log: cfg.Log}
	build := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: Namespace,
		Name:      "build_info",
		Help:      "Always 1; the labels say which program and build this is.",
		ConstLabels: prometheus.Labels{
			"program": cfg.Program, "version": cfg.Version, "goversion": runtime.Version(),
		},
	}, func() float64 { return 1 })
	for _, c := range []prometheus.Collector{
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		build,
	} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: register: %w", err)
		}
	}
	return r, nil
}

// maxScrapes bounds concurrent expositions: each holds all samples in memory.
const maxScrapes = 4

// Handler exposes the registry as Prometheus text or OpenMetrics, by the
// request's Accept header. authorize must return nil for a request to be
// answered; any other result is a 403 without detail.
func (r *Registry) Handler(authorize func(*http.Request) error) http.Handler {
	if authorize == nil {
		panic("metrics: Handler needs an authorize function; there is no open exposition")
	}
	expose := promhttp.HandlerFor(r.Registry, promhttp.HandlerOpts{
		ErrorLog:            promLog{r.log},
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapes,
		EnableOpenMetrics:   true,
	})
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if err := authorize(req); err != nil {
			r.log.Warn("metrics request refused", "remote", req.RemoteAddr, "err", err)
			http.Error(w, "forbidden", http.StatusForbidden)
			return
		}
		if req.Method != http.MethodGet && req.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		expose.ServeHTTP(w, req)
	})
}

// promLog carries promhttp's own complaints into the program's log.
type promLog struct{ log *slog.Logger }

func (l promLog) Println(v ...any) { l.log.Error("metrics exposition", "err", fmt.Sprint(v...)) }
