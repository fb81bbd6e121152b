package apifacade

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/skerry-io/skerry/edgecore/store"
)

// options are the query of a list or watch.
type options struct {
	metav1.ListOptions
	sel selector
}

func parseOptions(q *request, query url.Values) (*options, error) {
	var o options
	if err := metav1.Convert_url_Values_To_v1_ListOptions(&query, &o.ListOptions, nil); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	switch {
	case o.Continue != "":
		return nil, apierrors.NewBadRequest("continue tokens are not issued here: lists are always complete")
	case o.Limit < 0:
		return nil, apierrors.NewBadRequest("limit must not be negative")
	case o.ResourceVersionMatch != "" && o.ResourceVersionMatch != metav1.ResourceVersionMatchExact && o.ResourceVersionMatch != metav1.ResourceVersionMatchNotOlderThan:
		return nil, invalid("resourceVersionMatch", "must be Exact or NotOlderThan")
	}
	if o.Watch {
		switch {
		case o.SendInitialEvents != nil && o.ResourceVersionMatch != metav1.ResourceVersionMatchNotOlderThan:
			return nil, invalid("resourceVersionMatch", "must be NotOlderThan when sendInitialEvents is set")
		case o.SendInitialEvents == nil && o.ResourceVersionMatch != "":
			return nil, invalid("resourceVersionMatch", "is forbidden for a watch without sendInitialEvents")
		case o.SendInitialEvents != nil && *o.SendInitialEvents && !o.AllowWatchBookmarks:
			return nil, invalid("allowWatchBookmarks", "is required with sendInitialEvents")
		}
	} else {
		switch {
		case o.SendInitialEvents != nil:
			return nil, invalid("sendInitialEvents", "is for watches")
		case o.ResourceVersionMatch != "" && o.ResourceVersion == "":
			return nil, invalid("resourceVersionMatch", "is forbidden without resourceVersion")
		case o.ResourceVersionMatch == metav1.ResourceVersionMatchExact && o.ResourceVersion == "0":
			return nil, invalid("resourceVersionMatch", "Exact is forbidden for resourceVersion 0")
		}
	}
	var err error
	o.sel, err = newSelector(q, o.FieldSelector, o.LabelSelector)
	return &o, err
}

func invalid(field, msg string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusUnprocessableEntity, Reason: metav1.StatusReasonInvalid,
		Message: fmt.Sprintf("ListOptions.meta.k8s.io is invalid: %s: %s", field, msg),
		Details: &metav1.StatusDetails{Group: "meta.k8s.io", Kind: "ListOptions",
			Causes: []metav1.StatusCause{{Type: metav1.CauseTypeForbidden, Field: field, Message: msg}}},
	}}
}

// selector picks the objects a list or watch is about.
type selector struct {
	namespace string
	name      string // also what metadata.name= asks for
	fields    []fields.Requirement
	labels    labels.Selector // nil: all
}

func newSelector(q *request, fieldText, labelText string) (selector, error) {
	s := selector{namespace: q.namespace, name: q.name}
	if fieldText != "" {
		f, err := fields.ParseSelector(fieldText)
		if err != nil {
			return s, apierrors.NewBadRequest(err.Error())
		}
		for _, r := range f.Requirements() {
			if r.Field != "metadata.name" && r.Field != "metadata.namespace" && !slices.Contains(q.fields, r.Field) {
				return s, apierrors.NewBadRequest(fmt.Sprintf("%s cannot be selected by field %q", q.resource.name, r.Field))
			}
			if r.Field == "metadata.name" && r.Operator != selection.NotEquals && s.name == "" {
				s.name = r.Value
				continue
			}
			s.fields = append(s.fields, r)
		}
	}
	if labelText != "" {
		l, err := labels.Parse(labelText)
		if err != nil {
			return s, apierrors.NewBadRequest(err.Error())
		}
		if !l.Empty() {
			s.labels = l
		}
	}
	return s, nil
}

func (s *selector) matches(o *store.Object) bool {
	if o == nil || s.namespace != "" && o.Namespace != s.namespace || s.name != "" && o.Name != s.name {
		return false
	}
	if len(s.fields) == 0 && s.labels == nil {
		return true
	}
	var v map[string]any
	if s.needsBody() {
		if err := json.Unmarshal(o.Body, &v); err != nil {
			return false // the store keeps no such body
		}
	}
	for _, r := range s.fields {
		if (fieldValue(o, v, r.Field) == r.Value) == (r.Operator == selection.NotEquals) {
			return false
		}
	}
	if s.labels == nil {
		return true
	}
	set := labels.Set{}
	if meta, ok := v["metadata"].(map[string]any); ok {
		if m, ok := meta["labels"].(map[string]any); ok {
			for k, val := range m {
				if text, ok := val.(string); ok {
					set[k] = text
				}
			}
		}
	}
	return s.labels.Matches(set)
}

func (s *selector) needsBody() bool {
	for _, r := range s.fields {
		if !strings.HasPrefix(r.Field, "metadata.") {
			return true
		}
	}
	return s.labels != nil
}

func fieldValue(o *store.Object, v map[string]any, field string) string {
	switch field {
	case "metadata.name":
		return o.Name
	case "metadata.namespace":
		return o.Namespace
	case "source": // of an Event
		field = "source.component"
	}
	var at any = v
	for _, part := range strings.Split(field, ".") {
		m, ok := at.(map[string]any)
		if !ok {
			return ""
		}
		at = m[part]
	}
	switch x := at.(type) {
	case string:
		return x
	case bool:
		return fmt.Sprint(x)
	case nil:
		if field == "spec.unschedulable" {
			return "false"
		}
	}
	return ""
}
