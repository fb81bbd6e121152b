package metricsapi

import (
	"context"
	"fmt"
	"sort"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	corelisters "k8s.io/client-go/listers/core/v1"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/metrics/pkg/apis/metrics"
)

// nodeMetrics is the resource "nodes".
type nodeMetrics struct {
	collector *collector
	nodes     corelisters.NodeLister
	window    time.Duration
}

var (
	_ rest.KindProvider         = (*nodeMetrics)(nil)
	_ rest.Getter               = (*nodeMetrics)(nil)
	_ rest.Lister               = (*nodeMetrics)(nil)
	_ rest.Scoper               = (*nodeMetrics)(nil)
	_ rest.SingularNameProvider = (*nodeMetrics)(nil)
	_ rest.KindProvider         = (*podMetrics)(nil)
	_ rest.Getter               = (*podMetrics)(nil)
	_ rest.Lister               = (*podMetrics)(nil)
	_ rest.Scoper               = (*podMetrics)(nil)
	_ rest.SingularNameProvider = (*podMetrics)(nil)
)

func (s *nodeMetrics) New() runtime.Object     { return &metrics.NodeMetrics{} }
func (s *nodeMetrics) NewList() runtime.Object { return &metrics.NodeMetricsList{} }
func (s *nodeMetrics) Destroy()                {}
func (s *nodeMetrics) Kind() string            { return "NodeMetrics" }
func (s *nodeMetrics) NamespaceScoped() bool   { return false }
func (s *nodeMetrics) GetSingularName() string { return "" } // "node" is the core resource's

// Get implements rest.Getter.
func (s *nodeMetrics) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	node, err := s.nodes.Get(name)
	if err != nil {
		return nil, notFound("nodes", name, err)
	}
	summary, err := s.collector.connected(ctx, name)
	if err != nil {
		return nil, notFound("nodes", name, err)
	}
	m, ok := fromNode(node, summary, s.window)
	if !ok {
		return nil, notFound("nodes", name, fmt.Errorf("node %s has no figures yet", name))
	}
	return m, nil
}

// List implements rest.Lister.
func (s *nodeMetrics) List(ctx context.Context, options *metainternalversion.ListOptions) (runtime.Object, error) {
	byLabel, byField := selectors(options)
	nodes, err := s.nodes.List(byLabel)
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	summaries := s.collector.all(ctx)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	list := &metrics.NodeMetricsList{}
	for _, node := range nodes {
		if !byField.Matches(fields.Set{"metadata.name": node.Name}) {
			continue
		}
		if m, ok := fromNode(node, summaries[node.Name], s.window); ok {
			list.Items = append(list.Items, *m)
		}
	}
	sort.Slice(list.Items, func(i, j int) bool { return list.Items[i].Name < list.Items[j].Name })
	return list, nil
}

// podMetrics is the resource "pods".
type podMetrics struct {
	collector *collector
	pods      corelisters.PodLister
	window    time.Duration
}

func (s *podMetrics) New() runtime.Object     { return &metrics.PodMetrics{} }
func (s *podMetrics) NewList() runtime.Object { return &metrics.PodMetricsList{} }
func (s *podMetrics) Destroy()                {}
func (s *podMetrics) Kind() string            { return "PodMetrics" }
func (s *podMetrics) NamespaceScoped() bool   { return true }
func (s *podMetrics) GetSingularName() string { return "" }

// Get implements rest.Getter.
func (s *podMetrics) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	namespace := genericapirequest.NamespaceValue(ctx)
	pod, err := s.pods.Pods(namespace).Get(name)
	if err != nil {
		return nil, notFound("pods", namespace+"/"+name, err)
	}
	summary, err := s.collector.connected(ctx, pod.Spec.NodeName)
	if err != nil {
		return nil, notFound("pods", namespace+"/"+name, err)
	}
	if m, ok := fromPod(pod, podStats(summary)[podKey{namespace, name}], s.window); ok {
		return m, nil
	}
	return nil, notFound("pods", namespace+"/"+name, fmt.Errorf("node %s has no figures for it yet", pod.Spec.NodeName))
}

// List implements rest.Lister.
func (s *podMetrics) List(ctx context.Context, options *metainternalversion.ListOptions) (runtime.Object, error) {
	byLabel, byField := selectors(options)
	pods, err := s.pods.Pods(genericapirequest.NamespaceValue(ctx)).List(byLabel)
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	summaries := s.collector.all(ctx)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	stats := make(map[string]map[podKey]*statsv1alpha1.PodStats, len(summaries))
	for node, summary := range summaries {
		stats[node] = podStats(summary)
	}
	list := &metrics.PodMetricsList{}
	for _, pod := range pods {
		if !byField.Matches(fields.Set{"metadata.name": pod.Name, "metadata.namespace": pod.Namespace}) {
			continue
		}
		if m, ok := fromPod(pod, stats[pod.Spec.NodeName][podKey{pod.Namespace, pod.Name}], s.window); ok {
			list.Items = append(list.Items, *m)
		}
	}
	sort.Slice(list.Items, func(i, j int) bool {
		a, b := &list.Items[i], &list.Items[j]
		return a.Namespace < b.Namespace || a.Namespace == b.Namespace && a.Name < b.Name
	})
	return list, nil
}

func selectors(options *metainternalversion.ListOptions) (labels.Selector, fields.Selector) {
	byLabel, byField := labels.Everything(), fields.Everything()
	if options != nil && options.LabelSelector != nil {
		byLabel = options.LabelSelector
	}
	if options != nil && options.FieldSelector != nil {
		byField = options.FieldSelector
	}
	return byLabel, byField
}

// notFound says why there are no metrics; clients treat it as "none now".
func notFound(resource, name string, cause error) error {
	err := apierrors.NewNotFound(metrics.Resource(resource), name)
	if !apierrors.IsNotFound(cause) {
		err.ErrStatus.Message += ": " + cause.Error()
	}
	return err
}

func fromNode(node *corev1.Node, summary *statsv1alpha1.Summary, window time.Duration) (*metrics.NodeMetrics, bool) {
	if summary == nil {
		return nil, false
	}
	usage, at, ok := usage(summary.Node.CPU, summary.Node.Memory)
	if !ok {
		return nil, false
	}
	return &metrics.NodeMetrics{
		ObjectMeta: metav1.ObjectMeta{Name: node.Name, Labels: node.Labels, CreationTimestamp: metav1.Now()},
		Timestamp:  at,
		Window:     metav1.Duration{Duration: window},
		Usage:      usage,
	}, true
}

// fromPod takes the figures of a pod's containers. A pod with a running
// container that has none is left out: a sum without it would be wrong.
func fromPod(pod *corev1.Pod, stats *statsv1alpha1.PodStats, window time.Duration) (*metrics.PodMetrics, bool) {
	if stats == nil {
		return nil, false
	}
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey] // the kubelet knows a static pod by another uid
	if !mirror && stats.PodRef.UID != string(pod.UID) {
		return nil, false
	}
	m := &metrics.PodMetrics{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, Labels: pod.Labels, CreationTimestamp: metav1.Now()},
		Window:     metav1.Duration{Duration: window},
	}
	have := make(map[string]bool, len(stats.Containers))
	for _, c := range stats.Containers {
		usage, at, ok := usage(c.CPU, c.Memory)
		if !ok {
			continue
		}
		have[c.Name] = true
		m.Containers = append(m.Containers, metrics.ContainerMetrics{Name: c.Name, Usage: usage})
		if m.Timestamp.IsZero() || at.Before(&m.Timestamp) {
			m.Timestamp = at
		}
	}
	for _, c := range pod.Status.ContainerStatuses {
		if c.State.Running != nil && !have[c.Name] {
			return nil, false
		}
	}
	return m, len(m.Containers) > 0
}

// usage is one sample, if it is whole.
func usage(cpu *statsv1alpha1.CPUStats, memory *statsv1alpha1.MemoryStats) (corev1.ResourceList, metav1.Time, bool) {
	if cpu == nil || cpu.UsageNanoCores == nil || memory == nil || memory.WorkingSetBytes == nil {
		return nil, metav1.Time{}, false
	}
	at := cpu.Time
	if memory.Time.Before(&at) {
		at = memory.Time
	}
	return corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewScaledQuantity(int64(*cpu.UsageNanoCores), resource.Nano),
		corev1.ResourceMemory: *resource.NewQuantity(int64(*memory.WorkingSetBytes), resource.BinarySI),
	}, at, true
}

type podKey struct{ namespace, name string }

func podStats(summary *statsv1alpha1.Summary) map[podKey]*statsv1alpha1.PodStats {
	out := make(map[podKey]*statsv1alpha1.PodStats, len(summary.Pods))
	for i := range summary.Pods {
		ref := summary.Pods[i].PodRef
		out[podKey{ref.Namespace, ref.Name}] = &summary.Pods[i]
	}
	return out
}

// ConvertToTable implements rest.Lister, for kubectl get nodemetrics.
func (s *nodeMetrics) ConvertToTable(_ context.Context, object, _ runtime.Object) (*metav1.Table, error) {
	table := newTable()
	switch o := object.(type) {
	case *metrics.NodeMetrics:
		addRow(table, o, o.Window, o.Usage)
	case *metrics.NodeMetricsList:
		for i := range o.Items {
			addRow(table, &o.Items[i], o.Items[i].Window, o.Items[i].Usage)
		}
	default:
		return nil, fmt.Errorf("make a table of %T", object)
	}
	return table, nil
}

// ConvertToTable implements rest.Lister, for kubectl get podmetrics.
func (s *podMetrics) ConvertToTable(_ context.Context, object, _ runtime.Object) (*metav1.Table, error) {
	table := newTable()
	switch o := object.(type) {
	case *metrics.PodMetrics:
		addRow(table, o, o.Window, sum(o.Containers))
	case *metrics.PodMetricsList:
		for i := range o.Items {
			addRow(table, &o.Items[i], o.Items[i].Window, sum(o.Items[i].Containers))
		}
	default:
		return nil, fmt.Errorf("make a table of %T", object)
	}
	return table, nil
}

func sum(containers []metrics.ContainerMetrics) corev1.ResourceList {
	var cpu, memory resource.Quantity
	for _, c := range containers {
		cpu.Add(c.Usage[corev1.ResourceCPU])
		memory.Add(c.Usage[corev1.ResourceMemory])
	}
	return corev1.ResourceList{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory}
}

func newTable() *metav1.Table {
	return &metav1.Table{ColumnDefinitions: []metav1.TableColumnDefinition{
		{Name: "Name", Type: "string", Format: "name"},
		{Name: "CPU", Type: "string"},
		{Name: "Memory", Type: "string"},
		{Name: "Window", Type: "string"},
	}}
}

type object interface {
	runtime.Object
	metav1.Object
}

func addRow(table *metav1.Table, o object, window metav1.Duration, usage corev1.ResourceList) {
	cpu, memory := usage[corev1.ResourceCPU], usage[corev1.ResourceMemory]
	table.Rows = append(table.Rows, metav1.TableRow{
		Cells:  []any{o.GetName(), cpu.String(), memory.String(), window.Duration.String()},
		Object: runtime.RawExtension{Object: o},
	})
}
