package devices

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// maxWatchers bounds the watches of all callers.
	maxWatchers = 1000

	// gather is how long changes are collected before they are told.
	gather = 5 * time.Millisecond

	// bookmarkEvery is how often a quiet watch is told how far it is. The
	// caller's rights are looked at again then.
	bookmarkEvery = 15 * time.Second

	// slowAfter is how long a watcher may take to take what is sent. It is
	// dropped then, and may resume.
	slowAfter = 30 * time.Second
)

// Types of an event.
const (
	eventSnapshot = "snapshot" // what there is, at the start or after a resume that came too late
	eventSynced   = "synced"   // that was all: what was not among it is no more
	eventUpdate   = "update"
	eventDelete   = "delete"
	eventBookmark = "bookmark" // nothing changed; resume from here
)

// event is what a watch tells: a twin as it is now. Changes that follow each
// other faster than the watcher reads are told as one, so a watcher holds up
// nobody, and nothing is queued for it.
type event struct {
	Type   string `json:"type"`
	Resume string `json:"resume,omitempty"`
	Twin   *Twin  `json:"twin,omitempty"` // of a deletion, what names it
}

// resumeToken names a point in the order of changes of this life of the hub.
func (d *Devices) resumeToken(change uint64) string {
	return d.run + "-" + strconv.FormatUint(change, 10)
}

// resumeFrom reads a token. One of another life, or too old, resumes nothing.
func (d *Devices) resumeFrom(token string) (uint64, bool) {
	run, number, ok := strings.Cut(token, "-")
	n, err := strconv.ParseUint(number, 10, 64)
	return n, ok && err == nil && run == d.run
}

func (d *Devices) serveWatch(w http.ResponseWriter, r *http.Request, u user.Info) error {
	s, err := selectionOf(r)
	if err != nil {
		return err
	}
	if err := d.access.may(r.Context(), u, "watch", "twin", s.namespace, ""); err != nil {
		return err
	}
	d.mu.Lock()
	if d.watchers >= maxWatchers {
		d.mu.Unlock()
		return status(http.StatusTooManyRequests, "%d watches are open", maxWatchers)
	}
	d.watchers++
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.watchers--
		d.mu.Unlock()
	}()
	token := r.URL.Query().Get("resume")
	if id := r.Header.Get("Last-Event-ID"); id != "" {
		token = id
	}
	watch := &watcher{d: d, s: s, w: w, flush: http.NewResponseController(w), shown: map[edgeapi.DeviceRef]struct{}{},
		sse: strings.Contains(r.Header.Get("Accept"), "text/event-stream")}
	kind := "application/jsonl"
	if watch.sse {
		kind = "text/event-stream"
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	defer watch.flush.SetWriteDeadline(time.Time{}) //nolint:errcheck // for the connection's next request
	// The headers have gone: from here on an error ends the stream.
	if err := watch.run(r, u, token); err != nil && r.Context().Err() == nil {
		d.slow.Add(1)
		d.log.Debug("a watch of twins ended", "user", u.GetName(), "err", err)
	}
	return nil
}

// watcher is one watch.
type watcher struct {
	d     *Devices
	s     selection
	w     http.ResponseWriter
	flush *http.ResponseController
	sse   bool
	since uint64
	shown map[edgeapi.DeviceRef]struct{} // what it was told is there
}

func (w *watcher) run(r *http.Request, u user.Info, token string) error {
	from, ok := w.d.resumeFrom(token)
	if ok {
		w.since = from
		w.d.mu.Lock()
		ok = from >= w.d.horizon && from <= w.d.change
		// What it was told before is not known; assuming all costs it at most a
		// deletion of something that it does not have.
		for ref := range w.d.twins {
			w.shown[ref] = struct{}{}
		}
		w.d.mu.Unlock()
	}
	if !ok {
		if err := w.snapshot(); err != nil {
			return err
		}
	}
	bookmark := time.NewTicker(bookmarkEvery)
	defer bookmark.Stop()
	pace := time.NewTimer(0)
	defer pace.Stop()
	for {
		events, news, ok := w.changes()
		if !ok {
			if err := w.snapshot(); err != nil {
				return err
			}
			continue
		}
		if len(events) > 0 {
			if err := w.send(events); err != nil {
				return err
			}
			pace.Reset(gather)
			select {
			case <-r.Context().Done():
				return nil
			case <-pace.C:
			}
			continue
		}
		select {
		case <-r.Context().Done():
			return nil
		case <-news:
			pace.Reset(gather)
			select {
			case <-r.Context().Done():
				return nil
			case <-pace.C:
			}
		case <-bookmark.C:
			if err := w.d.access.may(r.Context(), u, "watch", "twin", w.s.namespace, ""); err != nil {
				return err
			}
			if err := w.send([]event{{Type: eventBookmark, Resume: w.d.resumeToken(w.since)}}); err != nil {
				return err
			}
		}
	}
}

func (w *watcher) snapshot() error {
	twins, since := w.d.all(w.s)
	w.since = since
	clear(w.shown)
	events := make([]event, 0, batchTwins)
	for _, t := range twins {
		w.shown[refOf(t.Namespace, t.Name)] = struct{}{}
		if events = append(events, event{Type: eventSnapshot, Twin: t}); len(events) == batchTwins {
			if err := w.send(events); err != nil {
				return err
			}
			events = events[:0]
		}
	}
	return w.send(append(events, event{Type: eventSynced, Resume: w.d.resumeToken(since)}))
}

// changes returns what changed since the last time, at most batchTwins of it,
// and what tells of more. It is not ok if deletions since then were forgotten.
func (w *watcher) changes() (events []event, news <-chan struct{}, ok bool) {
	d := w.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.since < d.horizon {
		return nil, nil, false
	}
	at := d.order.Back()
	for at != nil && at.Value.(*twin).number > w.since {
		at = at.Prev()
	}
	if at == nil {
		at = d.order.Front()
	} else {
		at = at.Next()
	}
	for n := 0; at != nil && n < batchTwins; at, n = at.Next(), n+1 {
		tw := at.Value.(*twin)
		w.since = tw.number
		if _, made := d.twins[tw.ref]; tw.deleted && made {
			continue // made anew; that comes later in the order
		}
		_, had := w.shown[tw.ref]
		e := event{Type: eventUpdate, Resume: d.resumeToken(tw.number)}
		if !tw.deleted {
			e.Twin = d.twinLocked(tw)
		}
		switch {
		case e.Twin != nil && w.s.matches(e.Twin):
			w.shown[tw.ref] = struct{}{}
		case had && (w.s.namespace == "" || w.s.namespace == tw.ref.Namespace):
			delete(w.shown, tw.ref)
			e.Type, e.Twin = eventDelete, &Twin{Namespace: tw.ref.Namespace, Name: tw.ref.Name, UID: string(tw.device.UID)}
		default:
			continue
		}
		events = append(events, e)
	}
	return events, d.news, true
}

func (w *watcher) send(events []event) error {
	if err := w.flush.SetWriteDeadline(time.Now().Add(slowAfter)); err != nil {
		return fmt.Errorf("limit the time of a write: %w", err)
	}
	for _, e := range events {
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if !w.sse {
			b = append(b, '\n')
		} else {
			head := "event: " + e.Type + "\n"
			if e.Resume != "" {
				head += "id: " + e.Resume + "\n"
			}
			b = append(append([]byte(head+"data: "), b...), "\n\n"...)
		}
		if _, err := w.w.Write(b); err != nil {
			return err
		}
	}
	return w.flush.Flush()
}
