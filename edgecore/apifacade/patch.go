package apifacade

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/mergepatch"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/skerry-io/skerry/edgecore/store"
)

const maxPatchOperations = 1000

func (f *Facade) patch(w http.ResponseWriter, r *http.Request, q *request) error {
	body, media, err := readBody(w, r, string(types.StrategicMergePatchType), string(types.MergePatchType), string(types.JSONPatchType))
	if err != nil {
		return err
	}
	p, err := newPatch(types.PatchType(media), body, q.new())
	if err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	return f.update(w, r, q, func(cur store.Object) ([]byte, error) {
		out, err := p(cur.Body)
		switch {
		case err == nil:
			return out, nil
		case errors.Is(err, jsonpatch.ErrTestFailed):
			return nil, apierrors.NewConflict(q.gr(), q.name, err)
		case mergepatch.IsPreconditionFailed(err), mergepatch.IsConflict(err):
			return nil, apierrors.NewConflict(q.gr(), q.name, err)
		}
		return nil, &apierrors.StatusError{ErrStatus: unprocessable(err)}
	})
}

// newPatch reads a patch of one of the three kinds and returns what applies it
// to a body.
func newPatch(kind types.PatchType, patch []byte, schema any) (func(body []byte) ([]byte, error), error) {
	if kind == types.JSONPatchType {
		return newJSONPatch(patch)
	}
	var object map[string]any
	if err := json.Unmarshal(patch, &object); err != nil {
		return nil, fmt.Errorf("the patch is not a JSON object: %w", err)
	}
	if object == nil {
		return nil, errors.New("the patch is not a JSON object: null")
	}
	if kind == types.MergePatchType {
		return contained(func(body []byte) ([]byte, error) { return jsonpatch.MergePatch(body, patch) }), nil
	}
	return contained(func(body []byte) ([]byte, error) { return strategicpatch.StrategicMergePatch(body, patch, schema) }), nil
}

// contained turns a panic over a senseless patch into an error: the JSON patch
// library does not check all it is given (an operation without a value, say),
// and a client's mistake must not end the node's agent.
func contained(apply func(body []byte) ([]byte, error)) func(body []byte) ([]byte, error) {
	return func(body []byte) (out []byte, err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("it is malformed: %v", p)
			}
		}()
		return apply(body)
	}
}

func newJSONPatch(patch []byte) (func(body []byte) ([]byte, error), error) {
	ops, err := jsonpatch.DecodePatch(patch)
	if err != nil {
		return nil, fmt.Errorf("the patch is not a JSON patch: %w", err)
	}
	if len(ops) > maxPatchOperations {
		return nil, fmt.Errorf("the patch has %d operations, the limit is %d", len(ops), maxPatchOperations)
	}
	for _, op := range ops {
		if op.Kind() == "copy" {
			// A few hundred bytes of copies can ask for gigabytes.
			return nil, errors.New("copy operations are not supported in a JSON patch here")
		}
	}
	return contained(ops.Apply), nil
}

func unprocessable(err error) metav1.Status {
	return metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusUnprocessableEntity, Reason: metav1.StatusReasonInvalid,
		Message: "the patch does not apply: " + err.Error(),
	}
}
