package tolerations

import (
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func given(key string, seconds ...int64) corev1.Toleration {
	t := corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}
	if len(seconds) > 0 {
		t.TolerationSeconds = &seconds[0]
	}
	return t
}

func TestPlan(t *testing.T) {
	const notReady, unreachable = corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable
	everything := corev1.Toleration{Operator: corev1.TolerationOpExists}
	type list = []corev1.Toleration
	defaults := list{given(notReady, 300), given(unreachable, 300)}
	cleared := list{given(notReady), given(unreachable)}
	noEffect := given(unreachable)
	noEffect.Effect = ""
	equal := given(unreachable, 300)
	equal.Operator = corev1.TolerationOpEqual
	for _, tc := range []struct {
		name  string
		have  list
		kept  string
		evict bool
		want  list // nil: left alone
		now   string
	}{
		{name: "the defaults", have: defaults, want: cleared, now: "not-ready,unreachable"},
		{name: "done before", have: cleared, kept: "not-ready,unreachable"},
		{name: "a user's own infinite ones", have: cleared},
		{name: "none at all", have: nil},
		{name: "a shorter one of the user's", have: list{given(unreachable, 5), given(notReady, 300)}, want: list{given(unreachable, 5), given(notReady)}, now: "not-ready"},
		{name: "a longer one of the user's", have: list{given(notReady, 300), given(unreachable, 301)}, want: list{given(notReady), given(unreachable, 301)}, now: "not-ready"},
		{name: "at once", have: list{given(notReady, 0), given(unreachable, 0)}},
		{name: "another of the user's first", have: list{given("other"), given(notReady, 300), given(unreachable, 300)}, want: list{given("other"), given(notReady), given(unreachable)}, now: "not-ready,unreachable"},
		{name: "the first that matches counts", have: list{given(unreachable, 5), given(unreachable, 300)}},
		{name: "the first that matches counts, the other way", have: list{given(unreachable, 300), given(unreachable, 5)}, want: list{given(unreachable), given(unreachable, 5)}, now: "unreachable"},
		{name: "everything is borne", have: list{everything, given(unreachable, 300)}},
		{name: "without an effect", have: list{noEffect, given(unreachable, 300)}},
		{name: "not as admission writes it", have: list{equal}},

		{name: "opted out from the first", have: defaults, evict: true},
		{name: "opts out later", have: cleared, kept: "not-ready,unreachable", evict: true, want: defaults},
		{name: "opts out later, one was the user's", have: cleared, kept: "not-ready", evict: true, want: list{given(notReady, 300), given(unreachable)}},
		{name: "opts out later, the limit is back by hand", have: list{given(notReady, 7), given(unreachable)}, kept: "not-ready,unreachable", evict: true, want: list{given(notReady, 7), given(unreachable, 300)}},
		{name: "a limit that is back by hand stays", have: defaults, kept: "not-ready,unreachable"},
		{name: "an annotation of the user's making", have: defaults, kept: "nonsense", want: cleared, now: "not-ready,unreachable"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{Tolerations: tc.have}}
			if tc.kept != "" {
				pod.Annotations = map[string]string{Kept: tc.kept}
			}
			before := pod.DeepCopy()
			got := plan(pod, tc.evict, 300)
			if !reflect.DeepEqual(pod, before) {
				t.Errorf("the pod itself was changed: %+v", pod.Spec.Tolerations)
			}
			switch {
			case got == nil && tc.want == nil:
			case got == nil || tc.want == nil:
				t.Fatalf("got %+v, want %+v", got, tc.want)
			case !reflect.DeepEqual(got.tolerations, tc.want) || got.kept != tc.now:
				t.Errorf("got %+v, want %+v kept %q", got, tc.want, tc.now)
			}
			if got == nil {
				return
			}
			// What was done is done: nothing is left to do.
			pod.Spec.Tolerations = got.tolerations
			pod.Annotations = map[string]string{Kept: got.kept}
			if got.kept == "" {
				pod.Annotations = nil
			}
			if again := plan(pod, tc.evict, 300); again != nil {
				t.Errorf("a second time: %+v", again)
			}
		})
	}
}

func TestWish(t *testing.T) {
	for value, want := range map[string][2]bool{
		"true": {true, true}, "false": {false, true}, "": {}, "yes": {}, "True": {},
	} {
		evict, ok := wish(&metav1.ObjectMeta{Annotations: map[string]string{Evict: value}})
		if [2]bool{evict, ok} != want {
			t.Errorf("%q: %v %v", value, evict, ok)
		}
	}
	if evict, ok := wish(&metav1.ObjectMeta{}); evict || ok {
		t.Error("no annotation is a wish")
	}
}
