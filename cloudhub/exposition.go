package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/cloudhub/devices"
	"github.com/skerry-io/skerry/cloudhub/edges"
	"github.com/skerry-io/skerry/cloudhub/feed"
	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/cloudhub/tolerations"
	"github.com/skerry-io/skerry/cloudhub/upstream"
	"github.com/skerry-io/skerry/metrics"
)

// newExposition returns the hub's /metrics, for those whom the cluster lets
// read it: a bearer token that TokenReview knows and whose user may get the
// non-resource URL /metrics.
func newExposition(client kubernetes.Interface, c hubCollector, twins *devices.Devices, telemetry *devices.Telemetry, log *slog.Logger) (http.Handler, error) {
	reg, err := metrics.New(metrics.Config{Program: "cloudhub", Version: version, Log: log})
	if err != nil {
		return nil, err
	}
	if err := reg.Register(c); err != nil {
		return nil, fmt.Errorf("register the hub's metrics: %w", err)
	}
	for _, c := range []prometheus.Collector{twins, telemetry} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the devices' metrics: %w", err)
		}
	}
	return reg.Handler(func(r *http.Request) error { return mayReadMetrics(r, client) }), nil
}

func mayReadMetrics(r *http.Request, client kubernetes.Interface) error {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return errors.New("no bearer token")
	}
	review, err := client.AuthenticationV1().TokenReviews().Create(r.Context(),
		&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("review the token: %w", err)
	}
	if !review.Status.Authenticated {
		return errors.New("the token is not valid in this cluster")
	}
	user := review.Status.User
	extra := map[string]authorizationv1.ExtraValue{}
	for k, v := range user.Extra {
		extra[k] = authorizationv1.ExtraValue(v)
	}
	access, err := client.AuthorizationV1().SubjectAccessReviews().Create(r.Context(), &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra,
			NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: "/metrics", Verb: "get"},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("review the access of %s: %w", user.Username, err)
	}
	if !access.Status.Allowed {
		return fmt.Errorf("user %s may not get /metrics", user.Username)
	}
	return nil
}

// hubCollector reads the hub's figures when they are asked for. Nothing is
// labelled by node: with a thousand nodes that would be a thousand series a
// figure.
type hubCollector struct {
	edges    *edges.Edges
	feed     *feed.Feed
	upstream *upstream.Upstream
	keeper   *tolerations.Keeper
	presence *presence.Presence
}

var (
	descNodes   = desc("connected_nodes", "Nodes whose tunnel is up.")
	descDeltas  = desc("feed_deltas_total", "Deltas sent to nodes.")
	descObjects = desc("feed_objects_total", "Objects and deletions in those deltas.")
	descBytes   = desc("feed_sent_bytes_total", "Bytes of deltas sent to nodes, after compression.")
	descWrites  = desc("upstream_writes_total", "Writes taken from nodes.")
	descFailed  = desc("upstream_failed_writes_total", "Writes that the API server refused or did not answer.")
	descKept    = desc("kept_pods_total", "Pods whose tolerations of a silent node lost their time limit.")
	descFreed   = desc("released_pods_total", "Pods that opted out of that and got their time limit back.")
	descTold    = desc("connected_condition_writes_total", "Writes of the condition Connected of Nodes.")
	descSkipped = desc("upstream_unchanged_writes_total", "Writes that needed no request: the API server had that state.")
)

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "hub", name), help, nil, nil)
}

func (c hubCollector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c hubCollector) Collect(ch chan<- prometheus.Metric) {
	f, u, k := c.feed.Stats(), c.upstream.Stats(), c.keeper.Stats()
	ch <- prometheus.MustNewConstMetric(descNodes, prometheus.GaugeValue, float64(len(c.edges.Nodes())))
	for d, v := range map[*prometheus.Desc]uint64{
		descDeltas: f.Deltas, descObjects: f.Objects, descBytes: f.WireBytes,
		descWrites: u.Writes, descFailed: u.Failed, descSkipped: u.Skipped,
		descKept: k.Kept, descFreed: k.Released, descTold: c.presence.Stats().Writes,
	} {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
	}
}
