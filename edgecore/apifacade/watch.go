package apifacade

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

// writeTimeout ends the watch of a client that stopped reading.
const writeTimeout = 30 * time.Second

// watch streams changes. A watch with initial events starts with every object
// as ADDED and, if asked with sendInitialEvents, a bookmark that ends them.
func (f *Facade) watch(w http.ResponseWriter, r *http.Request, q *request) error {
	o, err := parseOptions(q, r.URL.Query())
	if err != nil {
		return err
	}
	from, err := parseRV(o.ResourceVersion)
	if err != nil {
		return err
	}
	ctx := r.Context()
	if o.TimeoutSeconds != nil && *o.TimeoutSeconds > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(min(*o.TimeoutSeconds, 1<<31))*time.Second)
		defer cancel()
	}
	s := &stream{f: f, w: w, rc: http.NewResponseController(w), q: q, sel: o.sel, bookmarks: o.AllowWatchBookmarks}
	if q.format.table {
		if s.table, err = q.table(q.format); err != nil {
			return apierrors.NewInternalError(err)
		}
	}

	initial := o.SendInitialEvents != nil && *o.SendInitialEvents || o.SendInitialEvents == nil && from == 0
	switch {
	case initial:
		if now := f.cfg.Store.RV(); from > now {
			return tooLarge(from, now)
		}
	case from == 0: // sendInitialEvents=false: from now on
		from = f.cfg.Store.RV()
	}
	if !initial {
		// Asked before the answer begins, so that "too old" is a plain 410.
		watch, err := f.cfg.Store.Watch(ctx, q.resource.name, from)
		if errors.Is(err, store.ErrFuture) {
			err = store.ErrExpired // another store's number: list anew
		}
		if err != nil {
			return err
		}
		s.start()
		return s.run(ctx, watch, from)
	}
	f.warn(w)
	s.start()
	if q.gated {
		if err := f.cfg.Store.WaitSynced(ctx); err != nil {
			return nil // the stream is open and nothing was promised yet
		}
	}
	objects, rv := f.cfg.Store.List(q.resource.name, q.namespace)
	for i := range objects {
		if s.sel.matches(&objects[i]) {
			s.object("ADDED", f.view(&objects[i]), objects[i].RV)
		}
	}
	if o.SendInitialEvents != nil {
		s.bookmark(rv, true)
	}
	s.flush()
	watch, err := f.cfg.Store.Watch(ctx, q.resource.name, rv)
	if err != nil {
		s.fail(err)
		return nil
	}
	return s.run(ctx, watch, rv)
}

// stream is one watch's answer.
type stream struct {
	f         *Facade
	w         http.ResponseWriter
	rc        *http.ResponseController
	q         *request
	sel       selector
	bookmarks bool
	table     *table // nil: objects are sent as they are
	err       error  // the first failed write; all later ones are skipped
}

func (s *stream) start() {
	s.w.Header().Set("Content-Type", "application/json")
	s.w.WriteHeader(http.StatusOK)
	s.flush()
}

// run sends what happens until ctx ends, the client goes or falls behind.
func (s *stream) run(ctx context.Context, watch *store.Watch, marked uint64) error {
	next := s.nextBookmark()
	for s.err == nil {
		events, rv, err := watch.Next(ctx, max(time.Until(next), time.Millisecond))
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, store.ErrClosed) {
				s.fail(err)
			}
			return nil
		}
		sent := false
		for i := range events {
			sent = s.event(&events[i]) || sent
		}
		if now := time.Now(); now.After(next) {
			if s.bookmarks && rv > marked {
				s.bookmark(rv, false)
				marked, sent = rv, true
			}
			next = s.nextBookmark()
		}
		if sent {
			s.flush()
		}
	}
	s.f.cfg.Log.Debug("watcher went away", "resource", s.q.resource.name, "error", s.err)
	return nil
}

// nextBookmark is spread, so that a hundred watches do not wake together.
func (s *stream) nextBookmark() time.Time {
	every := s.f.cfg.BookmarkEvery
	return time.Now().Add(every - time.Duration(rand.Int64N(int64(every)/4+1)))
}

// event sends one change as this watch's selector sees it: an object that
// stopped matching was deleted for it, one that began to was added.
func (s *stream) event(e *store.Event) bool {
	now := s.sel.matches(e.Object)
	switch e.Type {
	case store.Added:
		if now {
			s.object("ADDED", s.f.view(e.Object), e.Object.RV)
		}
	case store.Deleted:
		if now {
			s.object("DELETED", s.f.view(e.Object), e.Object.RV)
		}
	case store.Modified:
		before := s.sel.matches(e.Old)
		switch {
		case now && before:
			s.object("MODIFIED", s.f.view(e.Object), e.Object.RV)
		case now:
			s.object("ADDED", s.f.view(e.Object), e.Object.RV)
		case before:
			body, err := atRV(s.f.view(e.Old), e.Object.RV)
			if err != nil {
				s.err = err
				return false
			}
			s.object("DELETED", body, e.Object.RV)
			return true
		}
	}
	return now
}

// object sends one object, as a table if the client asked for that.
func (s *stream) object(typ string, body []byte, rv uint64) {
	if s.table == nil {
		s.send(typ, body)
		return
	}
	if s.err != nil {
		return
	}
	if s.err = s.table.add(body); s.err != nil {
		return
	}
	row, err := json.Marshal(s.table.at(rv))
	if err != nil {
		s.err = err
		return
	}
	s.table.next()
	s.send(typ, row)
}

func (s *stream) send(typ string, body []byte) {
	s.write([]byte(`{"type":"`+typ+`","object":`), body, []byte("}\n"))
}

// bookmark carries the store-wide resourceVersion: with the last event's a quiet
// watch would one day ask for history long gone.
func (s *stream) bookmark(rv uint64, endsInitial bool) {
	annotations := ""
	if endsInitial {
		annotations = fmt.Sprintf(`,"annotations":{%q:"true"}`, metav1.InitialEventsAnnotationKey)
	}
	s.send("BOOKMARK", fmt.Appendf(nil, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"%d"%s}}`, s.q.kind, s.q.apiVersion(), rv, annotations))
}

func (s *stream) fail(err error) {
	body, merr := json.Marshal(statusOf(err))
	if merr != nil {
		return
	}
	s.send("ERROR", body)
	s.flush()
}

func (s *stream) write(parts ...[]byte) {
	if s.err != nil {
		return
	}
	// The in-process transport has no deadlines; its pipe ends with the request.
	if err := s.rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		s.err = err
		return
	}
	for _, p := range parts {
		if _, err := s.w.Write(p); err != nil {
			s.err = err
			return
		}
	}
}

func (s *stream) flush() {
	if s.err == nil {
		s.err = s.rc.Flush()
	}
}
