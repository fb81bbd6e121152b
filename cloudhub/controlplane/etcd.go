package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"sync"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
)

const (
	// walSegment replaces etcd's 64 MB, of which it allocates two ahead: this
	// cluster's whole state is mostly smaller than one.
	walSegment = 8 << 20
	// etcdQuota is the size of state at which etcd refuses writes; its own
	// default of 2 GB is for disks of another age.
	etcdQuota = 8 << 30
	// defragFrom is how many megabytes a defragmentation at start must free
	// to be worth its time.
	defragFrom = 128
)

// etcd is the embedded store, of one member, behind a unix socket.
type etcd struct {
	server  *embed.Etcd
	socket  string
	closed  chan struct{}
	watcher sync.WaitGroup
	once    sync.Once
}

func startEtcd(ctx context.Context, dir *dataDir, log *slog.Logger) (*etcd, error) {
	// A socket left by a killed process would be refused as in use. The lock
	// on the data directory says that nobody uses it.
	if err := os.Remove(dir.socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("control plane: remove the old socket of etcd: %w", err)
	}
	wal.SegmentSizeBytes = walSegment

	cfg := embed.NewConfig()
	cfg.Name = "skerry"
	cfg.Dir = dir.etcd()
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Path: dir.socket()}}
	// A single member has no peers to listen for. The advertised addresses
	// must look like addresses; they are names and nothing listens there.
	cfg.ListenPeerUrls = nil
	cfg.AdvertiseClientUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:2379"}}
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:2380"}}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.QuotaBackendBytes = etcdQuota
	cfg.BootstrapDefragThresholdMegabytes = defragFrom
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&zapCore{log: log.With("component", "etcd")}))

	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("control plane: start etcd on %s: %w", dir.etcd(), err)
	}
	e := &etcd{server: server, socket: dir.socket(), closed: make(chan struct{})}
	select {
	case <-server.Server.ReadyNotify():
		return e, nil
	case err := <-server.Err():
		e.Close()
		return nil, fmt.Errorf("control plane: start etcd on %s: %w", dir.etcd(), err)
	case <-server.Server.StopNotify():
		e.Close()
		return nil, fmt.Errorf("control plane: etcd on %s stopped while starting", dir.etcd())
	case <-ctx.Done():
		e.Close()
		return nil, ctx.Err()
	}
}

func (e *etcd) endpoint() string { return "unix://" + e.socket }

// watch calls fail when etcd ends before it is closed.
func (e *etcd) watch(fail context.CancelCauseFunc) {
	e.watcher.Go(func() {
		select {
		case <-e.closed:
			return
		case err := <-e.server.Err():
			fail(fmt.Errorf("control plane: etcd: %w", err))
		case <-e.server.Server.StopNotify():
			fail(errors.New("control plane: etcd stopped by itself"))
		}
	})
}

// Close stops etcd; what it has acknowledged is on disk.
func (e *etcd) Close() {
	e.once.Do(func() {
		close(e.closed)
		e.watcher.Wait()
		e.server.Close()
	})
}
