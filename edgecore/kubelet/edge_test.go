package kubelet_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/edgecore/apifacade"
	"github.com/skerry-io/skerry/edgecore/kubelet"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
)

// The kubelet runs once per process, so the test starts its own binary again,
// inside a machine, as the edge process: store, local API and kubelet as in
// edgecore, and a control socket where the tunnel would be.

const (
	edgeVariable  = "SKERRY_TEST_EDGE" // set to an edgeConfig in JSON
	edgeBinary    = "/opt/skerry/edge"
	edgeDir       = "/var/lib/skerry"
	controlSocket = "/run/skerry/control.sock"
	kubeletSocket = "/run/skerry/kubelet.sock"
	maxDelta      = 16 << 20

	addressChanged = 75 // the edge process's exit code for kubelet.ErrAddressChanged
)

type edgeConfig struct {
	NodeName      string `json:"nodeName"`
	CgroupRoot    string `json:"cgroupRoot"`
	StaticPodPath string `json:"staticPodPath,omitempty"`
	HurryAddress  bool   `json:"hurryAddress,omitempty"`
	CSI           bool   `json:"csi,omitempty"`
	CheckOnly     bool   `json:"checkOnly,omitempty"` // print Check's findings and end
}

func TestMain(m *testing.M) {
	machine.Main()
	if text := os.Getenv(edgeVariable); text != "" {
		err := edgeMain(text)
		if errors.Is(err, kubelet.ErrAddressChanged) {
			os.Exit(addressChanged)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func edgeMain(text string) error {
	var cfg edgeConfig
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		return err
	}
	if cfg.CheckOnly {
		return json.NewEncoder(os.Stdout).Encode(kubelet.Check(context.Background(), kubelet.Config{NodeName: cfg.NodeName, CgroupRoot: cfg.CgroupRoot}))
	}
	debug.SetGCPercent(50) // as edgecore does
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))

	if err := errors.Join(os.MkdirAll(edgeDir, 0o700), os.MkdirAll(filepath.Dir(controlSocket), 0o700)); err != nil {
		return err
	}
	st, err := store.Open(store.Config{Path: filepath.Join(edgeDir, "store.db"), Log: log})
	if err != nil {
		return err
	}
	defer st.Close()
	tok, err := tokens.New(tokens.Config{Store: st, NodeName: cfg.NodeName, KeyFile: filepath.Join(edgeDir, "issuer.key"), Log: log})
	if err != nil {
		return err
	}
	facade, err := apifacade.New(apifacade.Config{Store: st, NodeName: cfg.NodeName, Tokens: tok, Log: log})
	if err != nil {
		return err
	}
	k, err := kubelet.New(kubelet.Config{
		NodeName: cfg.NodeName, Transport: facade.Transport(),
		CgroupRoot: cfg.CgroupRoot, StaticPodPath: cfg.StaticPodPath,
		NodeLabels: map[string]string{"skerry.dev/test": "yes"},
		Overlay:    []byte("imageMinimumGCAge: 5m\nvolumeStatsAggPeriod: 10s\n"),
		CSI:        cfg.CSI,
		Log:        log,
	})
	if err != nil {
		return err
	}

	if cfg.HurryAddress {
		kubelet.HurryAddress(k, 200*time.Millisecond, time.Second)
	}

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return serveOn(ctx, controlSocket, control(st)) })
	g.Go(func() error {
		if err := st.WaitSynced(ctx); err != nil {
			return err
		}
		return k.Run(ctx)
	})
	g.Go(func() error {
		h, err := k.Handler(ctx)
		if err != nil {
			return err
		}
		return serveOn(ctx, kubeletSocket, h)
	})
	return g.Wait()
}

// serveOn serves h on a unix socket until ctx ends.
func serveOn(ctx context.Context, path string, h http.Handler) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: h}
	context.AfterFunc(ctx, func() { srv.Close() })
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// control stands for the tunnel: deltas in, objects out.
func control(st *store.Store) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /delta", func(w http.ResponseWriter, r *http.Request) {
		var d store.Delta
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxDelta)).Decode(&d); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := st.ApplyDelta(r.Context(), d); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /object/{resource}/{path...}", func(w http.ResponseWriter, r *http.Request) {
		key := store.Key{Resource: r.PathValue("resource"), Name: r.PathValue("path")}
		if ns, name, ok := strings.Cut(key.Name, "/"); ok {
			key.Namespace, key.Name = ns, name
		}
		obj, ok := st.Get(key)
		if !ok {
			http.Error(w, "not found", http.StatusNotFound)
			return
		}
		w.Write(obj.Body)
	})
	mux.HandleFunc("GET /list/{resource}", func(w http.ResponseWriter, r *http.Request) {
		objects, _ := st.List(r.PathValue("resource"), "")
		io.WriteString(w, "[")
		for i, o := range objects {
			if i > 0 {
				io.WriteString(w, ",")
			}
			w.Write(o.Body)
		}
		io.WriteString(w, "]")
	})
	mux.HandleFunc("POST /gc", func(w http.ResponseWriter, r *http.Request) { debug.FreeOSMemory() })
	return mux
}
