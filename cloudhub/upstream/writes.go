package upstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// merges is how often a status is merged anew after somebody else wrote in
// between.
const merges = 5

// merged repeats a read, a merge and a patch until nobody wrote in between: a
// difference to a state that is no more would mix two states.
func merged(merge func() (types.UID, error)) (uid types.UID, err error) {
	for range merges {
		if uid, err = merge(); !apierrors.IsConflict(err) || errors.As(err, new(*movedError)) {
			return uid, err
		}
	}
	// The object is there: the write is not void, only too late this time.
	return "", apierrors.NewServiceUnavailable("the object changes too fast: " + err.Error())
}

// podStatus asserts a pod's status as the node sees it. Like the kubelet's own
// status manager it reads the pod, then patches the difference: conditions and
// fields that others own stay as they are.
func (u *Upstream) podStatus(ctx context.Context, w edgeapi.Write) (types.UID, error) {
	var mine corev1.Pod
	if err := decode(w, &mine); err != nil {
		return "", err
	}
	return merged(func() (types.UID, error) { return u.mergePod(ctx, w, mine) })
}

func (u *Upstream) mergePod(ctx context.Context, w edgeapi.Write, mine corev1.Pod) (types.UID, error) {
	pods := u.client.CoreV1().Pods(w.Namespace)
	cur, err := pods.Get(ctx, w.Name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if w.UID != "" && string(cur.UID) != w.UID {
		return "", moved("pods", w, cur.UID)
	}
	return cur.UID, u.assertPodStatus(ctx, cur, &mine)
}

// assertPodStatus patches cur's status to what the node says.
func (u *Upstream) assertPodStatus(ctx context.Context, cur, mine *corev1.Pod) error {
	want := cur.DeepCopy()
	want.Status = mergePodStatus(cur.Status, mine.Status)
	patch, err := statusPatch(cur, want, cur.ObjectMeta)
	if err != nil || patch == nil {
		u.countSkip(patch, err)
		return err
	}
	_, err = u.client.CoreV1().Pods(cur.Namespace).Patch(ctx, cur.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// mergePodStatus returns the node's status with what the node does not own
// taken from the cloud's.
func mergePodStatus(cloud, node corev1.PodStatus) corev1.PodStatus {
	out := *node.DeepCopy()
	var conds []corev1.PodCondition
	for _, c := range node.Conditions {
		if kubetypes.PodConditionByKubelet(c.Type) || kubetypes.PodConditionSharedByKubelet(c.Type) {
			conds = append(conds, c)
		}
	}
	for _, c := range cloud.Conditions {
		if !kubetypes.PodConditionByKubelet(c.Type) && !hasCondition(conds, c.Type) {
			conds = append(conds, c)
		}
	}
	out.Conditions = conds
	out.NominatedNodeName = cloud.NominatedNodeName
	out.ResourceClaimStatuses = cloud.ResourceClaimStatuses
	out.ExtendedResourceClaimStatus = cloud.ExtendedResourceClaimStatus
	return out
}

func hasCondition(conds []corev1.PodCondition, t corev1.PodConditionType) bool {
	for _, c := range conds {
		if c.Type == t {
			return true
		}
	}
	return false
}

// nodeStatus asserts the Node's status, and the labels and annotations that a
// kubelet keeps on its own Node.
func (u *Upstream) nodeStatus(ctx context.Context, node string, w edgeapi.Write) (types.UID, error) {
	var mine corev1.Node
	if err := decode(w, &mine); err != nil {
		return "", err
	}
	return merged(func() (types.UID, error) { return u.mergeNode(ctx, node, w, mine) })
}

func (u *Upstream) mergeNode(ctx context.Context, node string, w edgeapi.Write, mine corev1.Node) (types.UID, error) {
	nodes := u.client.CoreV1().Nodes()
	cur, err := nodes.Get(ctx, w.Name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	// A Node deleted and made again is still this node: no UID precondition.
	want := cur.DeepCopy()
	want.Status = mergeNodeStatus(cur.Status, mine.Status)
	if err := u.publishAddress(node, &want.Status); err != nil {
		return "", err
	}
	want.Labels = mergeOwned(cur.Labels, mine.Labels)
	want.Annotations = mergeOwned(cur.Annotations, mine.Annotations)
	patch, err := statusPatch(cur, want, cur.ObjectMeta)
	if err != nil || patch == nil {
		u.countSkip(patch, err)
		return cur.UID, err
	}
	got, err := nodes.Patch(ctx, w.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return "", err
	}
	return got.UID, nil
}

func mergeNodeStatus(cloud, node corev1.NodeStatus) corev1.NodeStatus {
	out := *node.DeepCopy()
	out.Conditions = withoutConnected(out.Conditions)
	for _, c := range cloud.Conditions {
		mine := false
		for _, n := range out.Conditions {
			mine = mine || n.Type == c.Type
		}
		if !mine {
			out.Conditions = append(out.Conditions, c)
		}
	}
	out.VolumesAttached = cloud.VolumesAttached // the attach-detach controller's
	out.Phase = cloud.Phase
	return out
}

// withoutConnected leaves out what the hub says in the cloud, and the node on
// its own copy: the node's view does not go up.
func withoutConnected(all []corev1.NodeCondition) []corev1.NodeCondition {
	return slices.DeleteFunc(all, func(c corev1.NodeCondition) bool { return c.Type == edgeapi.ConditionConnected })
}

// SetNodeCondition sets one condition of a Node. It is done as that node, who
// may: the hub needs no right of its own to Nodes.
func (u *Upstream) SetNodeCondition(ctx context.Context, node string, uid types.UID, c corev1.NodeCondition) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": uid},
		"status":   map[string]any{"conditions": []corev1.NodeCondition{c}},
	})
	if err != nil {
		return err
	}
	_, err = u.client.CoreV1().Nodes().Patch(withNode(ctx, node), node, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// publishAddress makes the address that the API server dials lead to the hub:
// nodes sit behind NAT, their own addresses need be neither reachable nor
// unique. The node's own address stays visible as ExternalIP.
func (u *Upstream) publishAddress(node string, s *corev1.NodeStatus) error {
	ip, port, ok := u.addresses.KubeletAddress(node)
	if !ok {
		return fmt.Errorf("node %s has no virtual address: it is not enrolled", node)
	}
	addrs := []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}
	for _, a := range s.Addresses {
		if a.Address == ip {
			continue
		}
		if a.Type == corev1.NodeInternalIP {
			a.Type = corev1.NodeExternalIP
		}
		addrs = append(addrs, a)
	}
	s.Addresses = addrs
	s.DaemonEndpoints.KubeletEndpoint.Port = port
	return nil
}

// ownPrefixes are the label and annotation keys that a kubelet keeps current
// on its Node (pkg/kubelet/kubelet_node_status.go, updateDefaultLabels and the
// volume manager); all others may be edited in the cloud and are only set when
// the Node is created.
var ownPrefixes = []string{
	"kubernetes.io/", "beta.kubernetes.io/", "node.kubernetes.io/", "topology.kubernetes.io/",
	"failure-domain.beta.kubernetes.io/", "volumes.kubernetes.io/", "csi.volume.kubernetes.io/",
}

func mergeOwned(cloud, node map[string]string) map[string]string {
	out := make(map[string]string, len(cloud))
	for k, v := range cloud {
		out[k] = v
	}
	for k, v := range node {
		for _, p := range ownPrefixes {
			if strings.HasPrefix(k, p) {
				out[k] = v
			}
		}
	}
	return out
}

// nodeMetadata sets or removes the label and annotation keys that were changed
// on the node; NodeRestriction judges which it may.
func (u *Upstream) nodeMetadata(ctx context.Context, w edgeapi.Write) (types.UID, error) {
	var mine corev1.Node
	if err := decode(w, &mine); err != nil {
		return "", err
	}
	values := func(keys []string, from map[string]string) map[string]any {
		out := map[string]any{}
		for _, k := range keys {
			if v, ok := from[k]; ok {
				out[k] = v
			} else {
				out[k] = nil // removes it
			}
		}
		return out
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"labels":      values(w.Labels, mine.Labels),
		"annotations": values(w.Annotations, mine.Annotations),
	}})
	if err != nil {
		return "", err
	}
	got, err := u.client.CoreV1().Nodes().Patch(ctx, w.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		return "", err
	}
	return got.UID, nil
}

// createNode registers the node; one that is there already is taken over, as
// the kubelet does.
func (u *Upstream) createNode(ctx context.Context, node string, w edgeapi.Write) (types.UID, error) {
	var n corev1.Node
	if err := decode(w, &n); err != nil {
		return "", err
	}
	fresh(&n.ObjectMeta)
	n.Status.Conditions = withoutConnected(n.Status.Conditions)
	if err := u.publishAddress(node, &n.Status); err != nil {
		return "", err
	}
	got, err := u.client.CoreV1().Nodes().Create(ctx, &n, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return u.nodeStatus(ctx, node, w)
	}
	if err != nil {
		return "", err
	}
	return got.UID, nil
}

// createMirrorPod shows a static pod to the cloud. A mirror of the same
// configuration that is there already is the same pod.
func (u *Upstream) createMirrorPod(ctx context.Context, w edgeapi.Write) (types.UID, error) {
	var p corev1.Pod
	if err := decode(w, &p); err != nil {
		return "", err
	}
	hash := p.Annotations[corev1.MirrorPodAnnotationKey]
	if hash == "" {
		return "", &badWriteError{fmt.Sprintf("pod %s/%s is not a mirror pod: a node creates no other", p.Namespace, p.Name)}
	}
	fresh(&p.ObjectMeta)
	if err := u.ownByNode(ctx, p.Spec.NodeName, p.OwnerReferences); err != nil {
		return "", err
	}
	pods := u.client.CoreV1().Pods(w.Namespace)
	got, err := pods.Create(ctx, &p, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		cur, getErr := pods.Get(ctx, w.Name, metav1.GetOptions{})
		if getErr != nil {
			return "", getErr
		}
		if cur.Annotations[corev1.MirrorPodAnnotationKey] != hash || cur.DeletionTimestamp != nil {
			return "", err
		}
		got, err = cur, nil
	}
	if err != nil {
		return "", err
	}
	// A create drops the status; it follows at once, on what the create
	// returned: the Node authorizer lets a node read a pod a moment later only.
	if err = u.assertPodStatus(ctx, got, &p); apierrors.IsConflict(err) {
		err = apierrors.NewServiceUnavailable("the mirror pod changed meanwhile: " + err.Error())
	}
	return got.UID, err
}

// ownByNode gives references to the Node the UID that the Node has in the cloud:
// the kubelet may have made them when the Node had one of the edge's own, as
// before it was registered.
func (u *Upstream) ownByNode(ctx context.Context, node string, refs []metav1.OwnerReference) error {
	for i, ref := range refs {
		if ref.Kind != "Node" || ref.Name != node {
			continue
		}
		n, err := u.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		refs[i].UID = n.UID
	}
	return nil
}

// deletePod confirms that a pod has ended on the node.
func (u *Upstream) deletePod(ctx context.Context, w edgeapi.Write) error {
	if w.UID == "" {
		return &badWriteError{fmt.Sprintf("delete of pod %s/%s without its UID", w.Namespace, w.Name)}
	}
	opts := metav1.NewDeleteOptions(0)
	uid := types.UID(w.UID)
	opts.Preconditions = &metav1.Preconditions{UID: &uid}
	return u.client.CoreV1().Pods(w.Namespace).Delete(ctx, w.Name, *opts)
}

// event creates an Event, or brings the count of one that is there up to date.
func (u *Upstream) event(ctx context.Context, w edgeapi.Write) (types.UID, error) {
	var e corev1.Event
	if err := decode(w, &e); err != nil {
		return "", err
	}
	fresh(&e.ObjectMeta)
	events := u.client.CoreV1().Events(w.Namespace)
	got, err := events.Create(ctx, &e, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		patch, merr := json.Marshal(map[string]any{
			"count": e.Count, "lastTimestamp": e.LastTimestamp, "message": e.Message, "series": e.Series,
		})
		if merr != nil {
			return "", merr
		}
		got, err = events.Patch(ctx, w.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	}
	if err != nil {
		return "", err
	}
	return got.UID, nil
}

func (u *Upstream) csiNode(ctx context.Context, w edgeapi.Write) (types.UID, error) {
	var n storagev1.CSINode
	if err := decode(w, &n); err != nil {
		return "", err
	}
	fresh(&n.ObjectMeta)
	nodes := u.client.StorageV1().CSINodes()
	if err := u.ownByNode(ctx, w.Name, n.OwnerReferences); err != nil {
		return "", err
	}
	got, err := nodes.Create(ctx, &n, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		cur, getErr := nodes.Get(ctx, w.Name, metav1.GetOptions{})
		if getErr != nil {
			return "", getErr
		}
		n.ResourceVersion, n.UID = cur.ResourceVersion, cur.UID
		got, err = nodes.Update(ctx, &n, metav1.UpdateOptions{})
	}
	if err != nil {
		return "", err
	}
	return got.UID, nil
}

func (u *Upstream) deleteCSINode(ctx context.Context, w edgeapi.Write) error {
	return u.client.StorageV1().CSINodes().Delete(ctx, w.Name, metav1.DeleteOptions{})
}

// fresh drops what only an API server gives.
func fresh(m *metav1.ObjectMeta) {
	m.UID, m.ResourceVersion, m.Generation = "", "", 0
	m.CreationTimestamp = metav1.Time{}
	m.ManagedFields, m.SelfLink = nil, ""
}

// movedError is a conflict that no new merge mends.
type movedError struct{ *apierrors.StatusError }

func (e *movedError) Unwrap() error { return e.StatusError }

func moved(resource string, w edgeapi.Write, now types.UID) error {
	return &movedError{apierrors.NewConflict(corev1.Resource(resource), w.Name,
		fmt.Errorf("the object has UID %s now, the write is for %s", now, w.UID))}
}

func (u *Upstream) countSkip(patch []byte, err error) {
	if err == nil && patch == nil {
		u.skipped.Add(1)
	}
}

// statusPatch returns the strategic merge patch from cur to want, or nil if
// there is no difference. Its precondition is cur: a request that a broken
// connection left behind must not land on what a later one wrote.
func statusPatch[T any](cur, want *T, at metav1.ObjectMeta) ([]byte, error) {
	old, err := json.Marshal(cur)
	if err != nil {
		return nil, err
	}
	new, err := json.Marshal(want)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(old, new) {
		return nil, nil
	}
	var kind T
	patch, err := strategicpatch.CreateTwoWayMergePatch(old, new, kind)
	if err != nil {
		return nil, fmt.Errorf("compute patch: %w", err)
	}
	var m map[string]any
	if err := json.Unmarshal(patch, &m); err != nil {
		return nil, err
	}
	if len(m) == 0 {
		return nil, nil
	}
	md, _ := m["metadata"].(map[string]any)
	if md == nil {
		md = map[string]any{}
	}
	md["uid"], md["resourceVersion"] = string(at.UID), at.ResourceVersion
	m["metadata"] = md
	return json.Marshal(m)
}
