// Package upstream does at the Kubernetes API server what an edge node wrote
// or asks, as that node.
//
// Every request carries the node's identity by impersonation, so that the Node
// authorizer and NodeRestriction judge it: a stolen node reaches its own
// objects and nothing else. The package adds no rights and caches no objects.
// It never talks to nodes; cloudhub/edges brings their writes and takes the
// results.
//
// Writes are assertions of state, not operations: a status comes as the whole
// object as the node sees it, and is merged into what the API server has, so
// that a write may be repeated, and what others own is kept.
package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Addresses tells the address under which the API server reaches a node's
// kubelet through the hub.
type Addresses interface {
	// KubeletAddress returns the node's virtual IP and the port to publish.
	KubeletAddress(node string) (ip string, port int32, ok bool)
}

// Config of an Upstream.
type Config struct {
	// REST is the hub's own access to the API server, with the right to
	// impersonate nodes. Required.
	REST *rest.Config

	// Groups makes requests carry the group system:nodes as well, as clusters
	// without constrained impersonation (Kubernetes before 1.36) need. With
	// constrained impersonation it must stay false: naming a group makes the
	// API server fall back to the legacy check.
	Groups bool

	Addresses Addresses     // required
	Timeout   time.Duration // of one write; zero means 30s
	Log       *slog.Logger  // nil discards
}

// Upstream is safe for concurrent use.
type Upstream struct {
	addresses Addresses
	timeout   time.Duration
	log       *slog.Logger

	base   *url.URL             // of the API server
	direct http.RoundTripper    // impersonates the node in the request's context
	client kubernetes.Interface // as the node
	own    kubernetes.Interface // as the hub; reads only

	writes, failed, skipped atomic.Uint64
}

// New checks cfg and prepares the clients; it sends nothing.
func New(cfg Config) (*Upstream, error) {
	if cfg.REST == nil || cfg.Addresses == nil {
		return nil, errors.New("upstream: REST and Addresses are required")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	own, err := kubernetes.NewForConfig(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	rc := rest.CopyConfig(cfg.REST)
	// The API server's priority and fairness is the limit, and the nodes'
	// windows bound what is in flight.
	rc.QPS = -1
	rc.Impersonate = rest.ImpersonationConfig{}
	rc.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return &asNode{next: next, groups: cfg.Groups}
	})
	direct, err := rest.TransportFor(rc)
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	base, _, err := rest.DefaultServerUrlFor(rc)
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	return &Upstream{
		addresses: cfg.Addresses, timeout: cfg.Timeout, log: cfg.Log,
		base: base, direct: direct, client: client, own: own,
	}, nil
}

// Write does one write of the node and returns the API server's answer. It goes
// on when ctx ends: a request that was given up may still take effect, after a
// newer write of the same object.
func (u *Upstream) Write(ctx context.Context, node string, w edgeapi.Write) edgeapi.WriteResult {
	ctx, cancel := context.WithTimeout(withNode(context.WithoutCancel(ctx), node), u.timeout)
	defer cancel()
	u.writes.Add(1)
	uid, err := u.do(ctx, node, w)
	if apierrors.IsForbidden(err) && w.Resource == "pods" && w.Op != edgeapi.OpCreate {
		err = u.explainForbidden(ctx, node, w, err)
	}
	if err == nil {
		return edgeapi.WriteResult{ID: w.ID, Code: http.StatusOK, UID: string(uid)}
	}
	res := edgeapi.WriteResult{ID: w.ID, Code: http.StatusServiceUnavailable, Message: err.Error()}
	var status apierrors.APIStatus
	if errors.As(err, &status) && status.Status().Code != 0 {
		res.Code = int(status.Status().Code)
	}
	var bad *badWriteError
	if errors.As(err, &bad) {
		res.Code = http.StatusBadRequest
	}
	if res.Code != http.StatusNotFound && res.Code != http.StatusConflict {
		u.failed.Add(1)
		level := slog.LevelWarn
		if w.Op == edgeapi.OpEvent {
			level = slog.LevelDebug // of a namespace that is going, as a rule
		}
		u.log.Log(ctx, level, "write refused", "node", node, "op", w.Op, "resource", w.Resource,
			"namespace", w.Namespace, "name", w.Name, "code", res.Code, "err", err)
	}
	return res
}

// explainForbidden tells apart why the Node authorizer forbids a pod. It knows a
// node's pods by a graph: one that is gone, or that the graph does not show
// yet, is forbidden as another node's pod is.
func (u *Upstream) explainForbidden(ctx context.Context, node string, w edgeapi.Write, forbidden error) error {
	pod, err := u.own.CoreV1().Pods(w.Namespace).Get(ctx, w.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return err
	case err == nil && w.UID != "" && string(pod.UID) != w.UID:
		return moved("pods", w, pod.UID)
	case err == nil && pod.Spec.NodeName == node:
		return apierrors.NewServiceUnavailable("the API server does not know yet that this pod is the node's: " + forbidden.Error())
	}
	return forbidden
}

// badWriteError is a write that no API server was asked about.
type badWriteError struct{ msg string }

func (e *badWriteError) Error() string { return e.msg }

func (u *Upstream) do(ctx context.Context, node string, w edgeapi.Write) (types.UID, error) {
	switch {
	case w.Op == edgeapi.OpStatus && w.Resource == "pods":
		return u.podStatus(ctx, w)
	case w.Op == edgeapi.OpStatus && w.Resource == "nodes":
		return u.nodeStatus(ctx, node, w)
	case w.Op == edgeapi.OpUpdate && w.Resource == "nodes":
		return u.nodeMetadata(ctx, w)
	case w.Op == edgeapi.OpCreate && w.Resource == "nodes":
		return u.createNode(ctx, node, w)
	case w.Op == edgeapi.OpCreate && w.Resource == "pods":
		return u.createMirrorPod(ctx, w)
	case w.Op == edgeapi.OpDelete && w.Resource == "pods":
		return "", u.deletePod(ctx, w)
	case w.Op == edgeapi.OpEvent && w.Resource == "events":
		return u.event(ctx, w)
	case w.Resource == "csinodes" && (w.Op == edgeapi.OpCreate || w.Op == edgeapi.OpUpdate):
		return u.csiNode(ctx, w)
	case w.Resource == "csinodes" && w.Op == edgeapi.OpDelete:
		return "", u.deleteCSINode(ctx, w)
	}
	return "", &badWriteError{fmt.Sprintf("this hub does not take %q of %s from a node", w.Op, w.Resource)}
}

func decode(w edgeapi.Write, into any) error {
	if err := json.Unmarshal(w.Body, into); err != nil {
		return &badWriteError{fmt.Sprintf("decode %s %s/%s: %v", w.Resource, w.Namespace, w.Name, err)}
	}
	return nil
}

// Stats counts writes since the start.
type Stats struct {
	Writes  uint64 // taken from nodes
	Failed  uint64 // refused or not answered, other than 404 and 409
	Skipped uint64 // already so at the API server: no request made
}

// Stats returns counters since the start.
func (u *Upstream) Stats() Stats {
	return Stats{Writes: u.writes.Load(), Failed: u.failed.Load(), Skipped: u.skipped.Load()}
}

type nodeKey struct{}

func withNode(ctx context.Context, node string) context.Context {
	return context.WithValue(ctx, nodeKey{}, node)
}

// asNode puts the node's identity on each request. A request without one is a
// programming error and must not go out with the hub's own rights.
type asNode struct {
	next   http.RoundTripper
	groups bool
}

func (t *asNode) RoundTrip(req *http.Request) (*http.Response, error) {
	node, _ := req.Context().Value(nodeKey{}).(string)
	if node == "" {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, errors.New("upstream: request without a node's identity")
	}
	req = req.Clone(req.Context())
	for h := range req.Header {
		if strings.HasPrefix(h, "Impersonate-") {
			req.Header.Del(h)
		}
	}
	req.Header.Set("Impersonate-User", "system:node:"+node)
	if t.groups {
		req.Header.Set("Impersonate-Group", "system:nodes")
	}
	return t.next.RoundTrip(req)
}
