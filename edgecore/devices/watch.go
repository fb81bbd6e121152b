package devices

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// Event is one server-sent event of a watch: its id is the version to resume
// from, with Last-Event-ID or ?since=.
type Event struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	devicetwin.Change
}

// watch sends what there is, then "synced", then every change. Changes that
// come faster than the client reads are sent as one; who resumes from too long
// ago gets everything anew, as snapshots.
func (a *api) watch(w http.ResponseWriter, r *http.Request, c *call, need right) error {
	if err := c.permit(r.Context(), need); err != nil {
		return err
	}
	if c.key.Name != "" {
		if _, ok := c.twins.Get(c.key); !ok {
			return noDevice(c)
		}
	}
	since := r.Header.Get("Last-Event-ID")
	if since == "" {
		since = r.URL.Query().Get("since")
	}
	from, err := v1alpha1.ParseVersion(strings.Trim(since, `"`))
	if err != nil {
		return refuse(http.StatusBadRequest, "Last-Event-ID: %v", err)
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)() // with the part that holds the twins

	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	out := &eventStream{w: w, c: http.NewResponseController(w)}
	if err := out.flush(); err != nil {
		return nil // the client went away
	}
	quiet, check := time.NewTicker(keepAlive), time.NewTicker(recheck)
	defer quiet.Stop()
	defer check.Stop()
	all := changes(ctx, c.twins, from)
	for {
		select {
		case change, ok := <-all:
			if !ok {
				return nil
			}
			if !about(change, c.key) {
				continue
			}
			if err := out.send(Event{change.Key.Namespace, change.Key.Name, change}); err != nil {
				return nil
			}
		case <-quiet.C:
			if err := out.comment("still here"); err != nil {
				return nil
			}
		case <-check.C:
			if err := c.permit(ctx, need); err != nil {
				return nil // headers are gone; it hears why when it asks again
			}
		}
	}
}

// about tells whether a change is of what is watched: a device, a namespace or
// all.
func about(c devicetwin.Change, k devicetwin.Key) bool {
	return c.Type == devicetwin.ChangeSynced || (k.Namespace == "" || c.Key.Namespace == k.Namespace) && (k.Name == "" || c.Key.Name == k.Name)
}

// eventStream writes server-sent events.
type eventStream struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func (s *eventStream) send(e Event) error {
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if !e.Version.IsZero() {
		if _, err := fmt.Fprintf(s.w, "id: %s\n", e.Version); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprintf(s.w, "event: %s\ndata: %s\n\n", e.Type, body); err != nil {
		return err
	}
	return s.flush()
}

func (s *eventStream) comment(text string) error {
	if _, err := fmt.Fprintf(s.w, ": %s\n\n", text); err != nil {
		return err
	}
	return s.flush()
}

// flush gives the client time to read what comes next. A writer without
// deadlines is one that is in this process.
func (s *eventStream) flush() error {
	if err := s.c.Flush(); err != nil {
		return err
	}
	_ = s.c.SetWriteDeadline(time.Now().Add(2 * keepAlive))
	return nil
}
