package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/server/egressselector"
	"k8s.io/client-go/rest"
	aggregator "k8s.io/kube-aggregator/pkg/apiserver"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

// stopGrace is how long open connections may hold up the API server's stop.
// Watches of clients never end by themselves.
const stopGrace = time.Second

// bootStopGrace is how long a stop waits for a boot to come to its end.
const bootStopGrace = 15 * time.Second

// apiServer is kube-apiserver, ready to run.
type apiServer struct {
	prepare  func() (preparedServer, error)
	loopback *rest.Config // system:apiserver, for this process alone
}

type preparedServer interface {
	Run(ctx context.Context) error
}

// newAPIServer is kube-apiserver's own main function taken apart: its command
// would install signal handlers and logging for the whole process, and leaves
// no room for the dialer and the groups of this process.
func newAPIServer(ctx context.Context, cfg Config, flags []string, listener net.Listener) (*apiServer, error) {
	o := options.NewServerRunOptions()
	if err := parse("API server", o.Flags(), flags); err != nil {
		return nil, err
	}
	// Feature gates are the process's; the other components find them set.
	if err := o.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, fmt.Errorf("control plane: feature gates: %w", err)
	}
	o.SecureServing.Listener = listener
	completed, err := o.Complete(ctx)
	if err != nil {
		return nil, fmt.Errorf("control plane: API server options: %w", err)
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return nil, fmt.Errorf("control plane: API server options: %w", utilerrors.NewAggregate(errs))
	}
	config, err := app.NewConfig(completed)
	if err != nil {
		return nil, fmt.Errorf("control plane: configure the API server: %w", err)
	}
	dial := utilnet.DialFunc(cfg.DialNode)
	config.KubeAPIs.Extra.KubeletClientConfig.Lookup = func(egressselector.NetworkContext) (utilnet.DialFunc, error) { return dial, nil }
	complete, err := config.Complete()
	if err != nil {
		return nil, fmt.Errorf("control plane: configure the API server: %w", err)
	}
	s := &apiServer{loopback: config.KubeAPIs.ControlPlane.Generic.LoopbackClientConfig}
	chain, err := app.CreateServerChain(complete)
	if err != nil {
		return nil, fmt.Errorf("control plane: make the API server: %w", err)
	}
	chain.GenericAPIServer.ShutdownTimeout = stopGrace
	if cfg.Install != nil {
		err := cfg.Install(Extension{Context: ctx, Server: chain.GenericAPIServer, Informers: config.KubeAPIs.ControlPlane.VersionedInformers})
		if err != nil {
			chain.GenericAPIServer.Destroy()
			return nil, fmt.Errorf("control plane: install API groups: %w", err)
		}
	}
	s.prepare = func() (preparedServer, error) { return prepare(chain) }
	return s, nil
}

func prepare(chain *aggregator.APIAggregator) (preparedServer, error) {
	p, err := chain.PrepareRun()
	if err != nil {
		return nil, fmt.Errorf("control plane: prepare the API server: %w", err)
	}
	return p, nil
}

func (s *apiServer) run(ctx context.Context) error {
	prepared, err := s.prepare()
	if err != nil {
		return err
	}
	if err := prepared.Run(ctx); err != nil {
		return fmt.Errorf("control plane: API server: %w", err)
	}
	return nil
}

// awaitReady returns once /readyz says so. It does not return early when ctx
// ends: the API server's start-up hooks take an interruption for a failure and
// end the process, so a stop during the boot waits for them, within reason.
func (s *apiServer) awaitReady(ctx context.Context, timeout time.Duration) error {
	client, err := rest.HTTPClientFor(s.loopback)
	if err != nil {
		return fmt.Errorf("control plane: client of the API server: %w", err)
	}
	defer client.CloseIdleConnections()
	boot, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		time.AfterFunc(bootStopGrace, cancel)
	})()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("no answer yet")
	for {
		err := readyz(boot, client, s.loopback.Host)
		if err == nil || ctx.Err() != nil && boot.Err() != nil {
			return context.Cause(ctx)
		}
		if boot.Err() != nil {
			return fmt.Errorf("control plane: the API server was not ready within %s: %w", timeout, last)
		}
		last = err
		select {
		case <-tick.C:
		case <-boot.Done():
		}
	}
}

// readyz asks once; the error names the checks that fail.
func readyz(ctx context.Context, client *http.Client, host string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, host+"/readyz?verbose", nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if err != nil || res.StatusCode == http.StatusOK {
		return err
	}
	var failed []string
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "[-]") {
			failed = append(failed, strings.TrimSpace(line))
		}
	}
	return fmt.Errorf("%s: %s", res.Status, strings.Join(failed, "; "))
}
