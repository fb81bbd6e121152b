package images

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

// Config of a Proxy.
type Config struct {
	Runtime string       // CRI endpoint of the runtime, "unix:///…"; required
	Socket  string       // path to serve on; required
	Store   *store.Store // the node's pods and their secrets; required
	// Link tells whether the node has its hub. Required.
	Link func() Link
	// NoFallback leaves imagePullPolicy Always as strict as upstream has it.
	NoFallback bool
	// Access decides who may have an image that is here. Required.
	Access AccessConfig
	// Patience is how long a pull of an image that is here may take while the
	// hub is away; zero means 3 s. A dead link swallows packets, and pods that
	// could run wait for their turn to pull.
	Patience time.Duration
	// Changed is called when the runtime's list of images is another than at
	// the kubelet's last look; nil: nobody wants to know.
	Changed func()
	Log     *slog.Logger // nil discards
}

// Link is the state of the node's way out.
type Link struct {
	Connected bool
	Since     time.Time // of the present state
	// Drill says that the node plays at being alone: no registry is asked.
	Drill bool
}

// Proxy is the image service between kubelet and runtime. It is safe for
// concurrent use.
type Proxy struct {
	runtimeapi.UnimplementedImageServiceServer

	cfg      Config
	log      *slog.Logger
	conn     *grpc.ClientConn
	images   runtimeapi.ImageServiceClient
	runtime  runtimeapi.RuntimeServiceClient
	access   *access
	listener net.Listener // nil before Listen

	mu          sync.Mutex
	sandbox     string               // the runtime's sandbox image
	sandboxAt   time.Time            // when it was asked
	unreachable map[string]time.Time // registries that could not be reached, by host
	listed      uint64               // sum of the image IDs last listed
}

const (
	// maxMessage is the kubelet's own limit of one CRI message.
	maxMessage = 16 << 20

	// The sandbox image changes with the runtime's configuration only.
	sandboxPeriod = 10 * time.Minute

	defaultPatience = 3 * time.Second
)

// New checks cfg; it neither listens nor dials.
func New(cfg Config) (*Proxy, error) {
	if cfg.Socket == "" || cfg.Store == nil || cfg.Link == nil {
		return nil, errors.New("images: Socket, Store and Link are required")
	}
	if !strings.HasPrefix(cfg.Runtime, "unix:///") {
		return nil, fmt.Errorf("images: runtime endpoint %q is not a unix socket; write unix:// and its path", cfg.Runtime)
	}
	if cfg.Patience <= 0 {
		cfg.Patience = defaultPatience
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	access, err := newAccess(cfg.Access, cfg.Store)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(cfg.Runtime,
		// A unix socket that only root may open; there is no peer to verify.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("images: runtime endpoint %s: %w; check runtime.endpoint", cfg.Runtime, err)
	}
	return &Proxy{
		cfg: cfg, log: cfg.Log, conn: conn, access: access,
		images: runtimeapi.NewImageServiceClient(conn), runtime: runtimeapi.NewRuntimeServiceClient(conn),
		unreachable: map[string]time.Time{},
	}, nil
}

// Endpoint is what the kubelet's imageServiceEndpoint has to be.
func (p *Proxy) Endpoint() string { return "unix://" + p.cfg.Socket }

// Listen opens the socket, so that it is there before the kubelet looks.
func (p *Proxy) Listen() error {
	if err := os.Remove(p.cfg.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("images: socket: %w", err)
	}
	l, err := net.Listen("unix", p.cfg.Socket)
	if err != nil {
		return fmt.Errorf("images: socket: %w", err)
	}
	// The directory is root's alone, so nobody slips in before this.
	if err := os.Chmod(p.cfg.Socket, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("images: socket: %w", err)
	}
	p.listener = l
	return nil
}

// Run serves until ctx ends. Calls under way are cut off then: the kubelet ends
// with the same process.
func (p *Proxy) Run(ctx context.Context) error {
	defer p.conn.Close()
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	runtimeapi.RegisterImageServiceServer(srv, p)
	defer context.AfterFunc(ctx, srv.Stop)()
	if err := srv.Serve(p.listener); err != nil && ctx.Err() == nil {
		return fmt.Errorf("images: serve %s: %w", p.cfg.Socket, err)
	}
	return nil
}

// ListImages is the runtime's list with the pods' images pinned.
func (p *Proxy) ListImages(ctx context.Context, req *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	resp, err := p.images.ListImages(ctx, req)
	if err != nil {
		return nil, err
	}
	p.pin(ctx, resp.Images)
	if req.GetFilter().GetImage().GetImage() == "" {
		p.compare(resp.Images)
	}
	return resp, nil
}

// compare tells when the list is not the last one. The kubelet lists twice a
// minute.
func (p *Proxy) compare(images []*runtimeapi.Image) {
	var sum uint64
	for _, i := range images {
		for _, name := range append([]string{i.Id}, i.RepoTags...) { // in whatever order they come
			h := fnv.New64a()
			io.WriteString(h, name)
			sum += h.Sum64()
		}
	}
	p.mu.Lock()
	changed := p.listed != sum
	p.listed = sum
	p.mu.Unlock()
	if changed && p.cfg.Changed != nil {
		p.cfg.Changed()
	}
}

// StreamImages is ListImages piece by piece; not every runtime has it.
func (p *Proxy) StreamImages(req *runtimeapi.StreamImagesRequest, out grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	in, err := p.images.StreamImages(out.Context(), req)
	if err != nil {
		return err
	}
	for {
		resp, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		p.pin(out.Context(), resp.Images)
		if err := out.Send(resp); err != nil {
			return err
		}
	}
}

// ImageStatus is the runtime's.
func (p *Proxy) ImageStatus(ctx context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	return p.images.ImageStatus(ctx, req)
}

// ImageFsInfo is the runtime's.
func (p *Proxy) ImageFsInfo(ctx context.Context, req *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	return p.images.ImageFsInfo(ctx, req)
}

// RemoveImage removes an image that no pod of this node names.
func (p *Proxy) RemoveImage(ctx context.Context, req *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	image, err := p.find(ctx, req.GetImage().GetImage())
	if err != nil {
		return nil, err
	}
	if image != nil {
		if user := p.needed(ctx).user(image.Id, image.RepoTags, image.RepoDigests); user != "" {
			return nil, status.Errorf(codes.FailedPrecondition, "image %s is not removed: %s needs it, and it may not be pulled again while this node is alone", req.Image.Image, user)
		}
	}
	return p.images.RemoveImage(ctx, req)
}

// find is the image that a reference leads to; nil when it is not here.
func (p *Proxy) find(ctx context.Context, ref string) (*runtimeapi.Image, error) {
	resp, err := p.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return nil, err
	}
	return resp.GetImage(), nil
}

// Missing returns those of the references that lead to no image on this node.
func (p *Proxy) Missing(ctx context.Context, refs []string) ([]string, error) {
	var missing []string
	for _, ref := range refs {
		image, err := p.find(ctx, withTag(ref))
		if err != nil {
			return nil, fmt.Errorf("images: ask the runtime for %s: %w", ref, err)
		}
		if image == nil {
			missing = append(missing, ref)
		}
	}
	return missing, nil
}

// Filesystems are the mount points that hold the images.
func (p *Proxy) Filesystems(ctx context.Context) ([]string, error) {
	resp, err := p.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		return nil, fmt.Errorf("images: ask the runtime for its file system: %w", err)
	}
	var dirs []string
	for _, f := range resp.GetImageFilesystems() {
		if dir := f.GetFsId().GetMountpoint(); dir != "" {
			dirs = append(dirs, dir)
		}
	}
	return dirs, nil
}

// SandboxImage is what the runtime makes pods' sandboxes from; empty where it
// looks after that itself.
func (p *Proxy) SandboxImage(ctx context.Context) string { return p.sandboxImage(ctx) }
