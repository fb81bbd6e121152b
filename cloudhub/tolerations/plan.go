package tolerations

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
)

const (
	// Evict is the annotation that opts pods out ("true") or in ("false"), on a
	// pod, a namespace or a Node.
	Evict = "skerry.dev/evict-when-silent"

	// Kept is the annotation that tells which limits were cleared on a pod.
	Kept = "skerry.dev/kept-while-silent"
)

// silence are the taints that a silent node gets, by their names in Kept.
var silence = []struct{ name, key string }{
	{"not-ready", corev1.TaintNodeNotReady},
	{"unreachable", corev1.TaintNodeUnreachable},
}

// change is what a pod's tolerations have to become.
type change struct {
	tolerations []corev1.Toleration
	kept        string // the annotation; empty removes it
}

// plan returns what makes the pod stay on its node, or leave it after limit
// seconds if evict is set. It returns nil if the pod is as it shall be.
func plan(pod *corev1.Pod, evict bool, limit int64) *change {
	var was []string
	if v := pod.Annotations[Kept]; v != "" {
		was = strings.Split(v, ",")
	}
	c := change{tolerations: slices.Clone(pod.Spec.Tolerations)}
	changed := false
	var now []string
	for _, s := range silence {
		ours := slices.Contains(was, s.name)
		t := counts(c.tolerations, s.key)
		switch {
		case t == nil || !shapedAsDefault(t, s.key):
		case evict && ours && t.TolerationSeconds == nil:
			t.TolerationSeconds = &limit
			changed = true
		case !evict && !ours && t.TolerationSeconds != nil && *t.TolerationSeconds == limit:
			t.TolerationSeconds = nil
			changed = true
			ours = true
		}
		if ours && !evict {
			now = append(now, s.name)
		}
	}
	c.kept = strings.Join(now, ",")
	if !changed && c.kept == pod.Annotations[Kept] {
		return nil
	}
	return &c
}

// counts returns the toleration that decides how long the taint is borne: the
// first that matches it (component-helpers scheduling/corev1, helpers.go,
// GetMatchingTolerations). Comparisons never match these taints, which have no
// value.
func counts(all []corev1.Toleration, key string) *corev1.Toleration {
	taint := corev1.Taint{Key: key, Effect: corev1.TaintEffectNoExecute}
	for i := range all {
		if all[i].ToleratesTaint(klog.Logger{}, &taint, false) {
			return &all[i]
		}
	}
	return nil
}

// shapedAsDefault tells whether t is what admission gives, but for its seconds
// (plugin/pkg/admission/defaulttolerationseconds/admission.go).
func shapedAsDefault(t *corev1.Toleration, key string) bool {
	return t.Key == key && t.Operator == corev1.TolerationOpExists && t.Value == "" && t.Effect == corev1.TaintEffectNoExecute
}

// wish reads the Evict annotation; ok is false if there is none that counts.
func wish(m metav1.Object) (evict, ok bool) {
	switch m.GetAnnotations()[Evict] {
	case "true":
		return true, true
	case "false":
		return false, true
	}
	return false, false
}
