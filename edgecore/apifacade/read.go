package apifacade

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func (f *Facade) get(w http.ResponseWriter, r *http.Request, q *request) error {
	o, ok := f.cfg.Store.Get(q.key())
	if !ok {
		if q.gated && !f.cfg.Store.Synced() {
			return notSynced(q)
		}
		return apierrors.NewNotFound(q.gr(), q.name)
	}
	if !q.format.table {
		f.respond(w, http.StatusOK, f.view(&o))
		return nil
	}
	t, err := q.table(q.format)
	if err == nil {
		err = t.add(f.view(&o))
	}
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	return f.respondValue(w, http.StatusOK, t.at(o.RV))
}

// notSynced is the answer before the first sync. Saying "not found" or "there
// are none" would have the kubelet clean up pods it merely has not heard of.
func notSynced(q *request) error {
	err := apierrors.NewServiceUnavailable(fmt.Sprintf("%s are not served before the first sync with the cloud has completed", q.resource.name))
	err.ErrStatus.Details = &metav1.StatusDetails{Kind: q.resource.name, RetryAfterSeconds: 1}
	return err
}

func (f *Facade) list(w http.ResponseWriter, r *http.Request, q *request) error {
	o, err := parseOptions(q, r.URL.Query())
	if err != nil {
		return err
	}
	asked, err := parseRV(o.ResourceVersion)
	if err != nil {
		return err
	}
	if q.gated && !f.cfg.Store.Synced() {
		return notSynced(q)
	}
	objects, rv := f.cfg.Store.List(q.resource.name, q.namespace)
	switch {
	case asked > rv:
		return tooLarge(asked, rv)
	case o.ResourceVersionMatch == metav1.ResourceVersionMatchExact && asked != rv:
		return apierrors.NewResourceExpired(fmt.Sprintf("the state at resourceVersion %d is not kept", asked))
	}
	f.warn(w)
	if q.format.table {
		t, err := q.table(q.format)
		for i := range objects {
			if err == nil && o.sel.matches(&objects[i]) {
				err = t.add(f.view(&objects[i]))
			}
		}
		if err != nil {
			return apierrors.NewInternalError(err)
		}
		return f.respondValue(w, http.StatusOK, t.at(rv))
	}
	var buf bytes.Buffer
	fmt.Fprintf(&buf, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"%d"},"items":[`, q.kind+"List", q.apiVersion(), rv)
	first := true
	for i := range objects {
		if !o.sel.matches(&objects[i]) {
			continue
		}
		if !first {
			buf.WriteByte(',')
		}
		first = false
		buf.Write(f.view(&objects[i]))
	}
	buf.WriteString("]}")
	f.respond(w, http.StatusOK, buf.Bytes())
	return nil
}

// warn tells the reader of a list what it cannot see from it.
func (f *Facade) warn(w http.ResponseWriter) {
	if f.cfg.Notice == nil {
		return
	}
	if text := f.cfg.Notice(); text != "" {
		w.Header().Add("Warning", "299 - "+strconv.Quote(text))
	}
}

func parseRV(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	rv, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, apierrors.NewBadRequest(fmt.Sprintf("resourceVersion %q is not a number", s))
	}
	return rv, nil
}

// tooLarge is what an API server says of a resourceVersion it has not reached;
// client-go then lists anew.
func tooLarge(asked, rv uint64) error {
	err := apierrors.NewTimeoutError(fmt.Sprintf("Too large resource version: %d, current: %d", asked, rv), 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge, Message: "Too large resource version"}}
	return err
}

// atRV is a body with another resourceVersion.
func atRV(body []byte, rv uint64) ([]byte, error) {
	var top, meta map[string]json.RawMessage
	if err := json.Unmarshal(body, &top); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(top["metadata"], &meta); err != nil {
		return nil, err
	}
	meta["resourceVersion"] = json.RawMessage(strconv.Quote(strconv.FormatUint(rv, 10)))
	var err error
	if top["metadata"], err = json.Marshal(meta); err != nil {
		return nil, err
	}
	return json.Marshal(top)
}
