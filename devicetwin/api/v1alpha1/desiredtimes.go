package v1alpha1

import (
	"encoding/json"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AnnotationDesiredTimes is put by the hub on a Device that goes down to its
// node: a JSON object, by property, of when spec.desired was last changed, in
// RFC 3339. Authority lww goes by it.
const AnnotationDesiredTimes = Group + "/desired-times"

// DesiredTimes is when each property of spec.desired was last set, as the API
// server notes it for each field manager: whole seconds, and of one manager all
// fields at once.
func DesiredTimes(managed []metav1.ManagedFieldsEntry) map[string]time.Time {
	var times map[string]time.Time
	for _, m := range managed {
		if m.Time == nil || m.FieldsV1 == nil || m.Subresource != "" {
			continue
		}
		var fields struct {
			Spec struct {
				Desired map[string]json.RawMessage `json:"f:desired"`
			} `json:"f:spec"`
		}
		if json.Unmarshal(m.FieldsV1.Raw, &fields) != nil {
			continue
		}
		for f := range fields.Spec.Desired {
			name, ok := strings.CutPrefix(f, "f:")
			if !ok {
				continue
			}
			if times == nil {
				times = make(map[string]time.Time)
			}
			if m.Time.After(times[name]) {
				times[name] = m.Time.Time
			}
		}
	}
	return times
}
