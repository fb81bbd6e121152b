package edges

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// maxSummary bounds a node's stats summary: 110 pods of several containers
// with volumes are about 1 MB.
const maxSummary = 16 << 20

// kubeletClient speaks HTTP to kubelets by node name. Its connections are
// streams of the tunnels.
func (e *Edges) kubeletClient() *http.Client {
	return &http.Client{
		// A node answers for itself: it does not send the hub elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				node, _, err := net.SplitHostPort(addr)
				if err != nil {
					return nil, err
				}
				return e.Kubelet(ctx, node)
			},
			MaxIdleConnsPerHost:    1,
			IdleConnTimeout:        20 * time.Second, // below the edge's, so that no request meets a closing stream
			DisableCompression:     true,
			MaxResponseHeaderBytes: 64 << 10,
		}}
}

// Summary asks a node for the CPU and memory part of its stats summary.
func (e *Edges) Summary(ctx context.Context, node string) (*statsv1alpha1.Summary, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+node+"/stats/summary?only_cpu_and_memory=true", nil)
	if err != nil {
		return nil, err
	}
	res, err := e.kubelets.Do(req)
	if err != nil {
		return nil, fmt.Errorf("stats summary of node %s: %w", node, err)
	}
	defer res.Body.Close()
	body := &io.LimitedReader{R: res.Body, N: maxSummary}
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(body, 512))
		return nil, fmt.Errorf("stats summary of node %s: %s: %s", node, res.Status, text)
	}
	var s statsv1alpha1.Summary
	if err := json.NewDecoder(body).Decode(&s); err != nil {
		if body.N <= 0 {
			err = fmt.Errorf("more than the limit of %d bytes", maxSummary)
		}
		return nil, fmt.Errorf("stats summary of node %s: %w", node, err)
	}
	return &s, nil
}

// Nodes returns the names of the connected nodes.
func (e *Edges) Nodes() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]string, 0, len(e.nodes))
	for name := range e.nodes {
		out = append(out, name)
	}
	return out
}
