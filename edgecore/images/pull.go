package images

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/distribution/reference"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

const (
	// While a registry is known to be out of reach, pods that have their image
	// do not wait for it in turn.
	unreachableFor = 30 * time.Second
	maxRegistries  = 64
)

// PullImage pulls, or falls back to the image that is here.
func (p *Proxy) PullImage(ctx context.Context, req *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref := req.GetImage().GetImage()
	here, err := p.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	resp, err := p.pull(ctx, req, here != nil && !p.cfg.NoFallback)
	if err == nil {
		p.reached(ref)
		return resp, nil
	}
	if ctx.Err() != nil || !outOfReach(err) {
		return nil, err
	}
	p.missed(ref)
	if here == nil || p.cfg.NoFallback {
		return nil, p.explain(ref, here != nil, "", err)
	}
	if refusal := p.access.refuses(ref, here.Id, req.GetAuth(), req.GetSandboxConfig().GetMetadata()); refusal != "" {
		return nil, p.explain(ref, true, refusal, err)
	}
	meta := req.GetSandboxConfig().GetMetadata()
	p.log.Info("the registry cannot be reached; the pod starts from the image on this node",
		"image", ref, "namespace", meta.GetNamespace(), "pod", meta.GetName(), "err", status.Convert(err).Message())
	return &runtimeapi.PullImageResponse{ImageRef: here.Id}, nil
}

// pull asks the runtime. With an image to fall back to it does not wait long
// for a registry that is likely to be out of reach.
func (p *Proxy) pull(ctx context.Context, req *runtimeapi.PullImageRequest, fallback bool) (*runtimeapi.PullImageResponse, error) {
	link := p.cfg.Link()
	if link.Drill {
		return nil, errDrill
	}
	if !fallback || link.Connected {
		return p.images.PullImage(ctx, req)
	}
	if p.missedLately(req.GetImage().GetImage()) {
		return nil, errMissedLately
	}
	type result struct {
		resp *runtimeapi.PullImageResponse
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan result, 1)
	go func() { // ends with ctx at the latest; awaited below
		resp, err := p.images.PullImage(ctx, req)
		done <- result{resp, err}
	}()
	patience := time.NewTimer(p.cfg.Patience)
	defer patience.Stop()
	select {
	case r := <-done:
		return r.resp, r.err
	case <-patience.C:
	}
	if p.cfg.Link().Connected {
		// The node was only just starting: the registry may have all its time.
		r := <-done
		return r.resp, r.err
	}
	cancel()
	if r := <-done; r.err == nil {
		return r.resp, nil
	}
	return nil, status.Errorf(codes.Unknown, "no answer from the registry within %s (i/o timeout)", p.cfg.Patience)
}

var (
	errDrill        = status.Error(codes.Unknown, "a drill keeps this node from its registries (network is unreachable)")
	errMissedLately = status.Error(codes.Unknown, "the registry could not be reached a moment ago (i/o timeout)")
)

// The runtime has one error code for all that goes wrong between it and a
// registry; the text tells. What is not known to be silence is taken for an
// answer, which is obeyed.
var (
	refusal = regexp.MustCompile(`\b(401|403|404)\b (Unauthorized|Forbidden|Not Found)|insufficient_scope|pull access denied|authorization failed`)
	silence = regexp.MustCompile(`failed to do request|dial tcp|no such host|server misbehaving|i/o timeout|` +
		`TLS handshake timeout|connection refused|connection reset by peer|network is unreachable|no route to host|` +
		`x509: |unexpected EOF|context deadline exceeded|unexpected status.*: 5\d\d\b`)
)

// outOfReach tells whether a pull failed because the registry did not answer.
func outOfReach(err error) bool {
	st := status.Convert(err)
	switch st.Code() {
	case codes.NotFound, codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument:
		return false
	}
	text := st.Message()
	if strings.Contains(text, "dial unix") { // the runtime itself is away
		return false
	}
	return !refusal.MatchString(text) && silence.MatchString(text)
}

// explain makes of the runtime's error what an operator can act on. Its first
// word makes the kubelet show RegistryUnavailable as the container's reason, and
// it does so for errors of code Unknown only.
func (p *Proxy) explain(ref string, here bool, refusal string, err error) error {
	var what string
	switch {
	case refusal != "":
		what = fmt.Sprintf("image %s is on this node, but %s, and its registry cannot be asked", ref, refusal)
	case here:
		what = fmt.Sprintf("image %s is on this node, but its pull policy wants the registry asked, which cannot be reached; set images.localWhenUnreachable to true, or imagePullPolicy to IfNotPresent", ref)
	default:
		what = fmt.Sprintf("image %s is not on this node, and its registry cannot be reached; it is pulled once it can, or import it now: ctr -n k8s.io images import FILE", ref)
	}
	return status.Errorf(codes.Unknown, "%s: %s%s; the runtime says: %s", crierrors.ErrRegistryUnavailable, p.whereabouts(), what, status.Convert(err).Message())
}

// whereabouts says how long the node has been alone, if it is.
func (p *Proxy) whereabouts() string {
	link := p.cfg.Link()
	switch {
	case link.Drill:
		return "a drill keeps this node offline: "
	case link.Connected:
		return ""
	}
	return fmt.Sprintf("this node has been offline since %s: ", link.Since.UTC().Format(time.RFC3339))
}

func registryOf(ref string) string {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return reference.Domain(named)
}

func (p *Proxy) missed(ref string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.unreachable) >= maxRegistries {
		clear(p.unreachable)
	}
	if host := registryOf(ref); p.unreachable[host].Before(time.Now().Add(-unreachableFor)) {
		p.unreachable[host] = time.Now()
	}
}

func (p *Proxy) reached(ref string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.unreachable, registryOf(ref))
}

func (p *Proxy) missedLately(ref string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.unreachable[registryOf(ref)]
	return ok && time.Since(at) < unreachableFor
}
