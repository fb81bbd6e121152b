package mqtt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
)

// LogQueueConfig is what a LogQueue holds, and how.
type LogQueueConfig struct {
	Dir      string        // required; the queue's own
	MaxBytes int64         // on disk; zero means 64 MiB. The oldest go first
	MaxAge   time.Duration // zero means 72h
	// Late has Append not wait for the disk; the power takes what came in the
	// last 200 ms.
	Late bool
	Log  *slog.Logger // nil discards
}

// LogQueue is a Queue on disk. What is taken in is there before it is
// acknowledged. How far the other side has acknowledged is written down every
// second: after a crash what it acknowledged since is sent again.
type LogQueue struct {
	log    *seglog.Log
	reader *seglog.Reader
	cursor string // file
	late   bool
	logger *slog.Logger

	mu     sync.Mutex
	next   uint64
	taken  []taken // handed out, in order
	saved  time.Time
	unsent int // acknowledged since saved
}

type taken struct {
	id    uint64
	batch seglog.Batch
}

const (
	cursorEvery = time.Second
	cursorCount = 256
)

// OpenLogQueue opens the queue in cfg.Dir, or makes it.
func OpenLogQueue(cfg LogQueueConfig) (*LogQueue, error) {
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 64 << 20
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	log, err := seglog.Open(seglog.Config{Dir: cfg.Dir, MaxBytes: cfg.MaxBytes, MaxAge: cfg.MaxAge, Policy: seglog.DropOldest, Log: cfg.Log})
	if err != nil {
		return nil, fmt.Errorf("queue of a bridge: %w", err)
	}
	q := &LogQueue{log: log, cursor: filepath.Join(cfg.Dir, "cursor.json"), late: cfg.Late, logger: cfg.Log, saved: time.Now()}
	saved, err := os.ReadFile(q.cursor)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("queue of a bridge: %w", err), log.Close())
	}
	if q.reader, err = log.NewReader(saved); err != nil {
		// A damaged cursor costs duplicates, not messages.
		cfg.Log.Warn("how far a bridge's queue was sent is not known; all of it is sent again", "error", err)
		if q.reader, err = log.NewReader(nil); err != nil {
			return nil, errors.Join(fmt.Errorf("queue of a bridge: %w", err), log.Close())
		}
	}
	return q, nil
}

// Append returns when record is on the disk, or, if Late, at once.
func (q *LogQueue) Append(ctx context.Context, record []byte) error {
	r := seglog.Record{Kind: 1, TS: time.Now().UnixMilli(), Payload: record}
	if q.late {
		q.log.Offer(r)
		return nil
	}
	return q.log.Append(ctx, r)
}

// Next returns the oldest record that it has not returned yet.
func (q *LogQueue) Next(ctx context.Context) (uint64, []byte, error) {
	for {
		batch, err := q.reader.Next(ctx, 1, 1)
		if err != nil {
			return 0, nil, err
		}
		if r := batch.Records[0]; r.Kind == seglog.KindGap {
			q.logger.Warn("messages of a bridge were dropped before they could be sent", "gap", string(r.Payload))
			continue
		}
		q.mu.Lock()
		q.next++
		id := q.next
		q.taken = append(q.taken, taken{id, batch})
		q.mu.Unlock()
		return id, batch.Records[0].Payload, nil
	}
}

// Ack says that the record id, and all before it, need not come again.
func (q *LogQueue) Ack(id uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for n < len(q.taken) && q.taken[n].id <= id {
		n++
	}
	if n == 0 {
		return nil
	}
	q.reader.Ack(q.taken[n-1].batch)
	q.taken = append(q.taken[:0], q.taken[n:]...)
	q.unsent += n
	if q.unsent < cursorCount && time.Since(q.saved) < cursorEvery {
		return nil
	}
	return q.saveLocked()
}

// saveLocked writes the cursor. It is not synced: an older one, or none, is
// what a crash within the second leaves anyway.
func (q *LogQueue) saveLocked() error {
	q.saved, q.unsent = time.Now(), 0
	tmp := q.cursor + ".tmp"
	if err := os.WriteFile(tmp, q.reader.Cursor(), 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, q.cursor); err != nil {
		return err
	}
	q.log.Trim(q.reader.Oldest())
	return nil
}

// Len is how many are not acknowledged.
func (q *LogQueue) Len() int { return int(q.reader.Behind()) }

// Dropped is how many were dropped for want of room, or because of the disk.
func (q *LogQueue) Dropped() uint64 { return q.log.Stats().Dropped }

// Close notes how far it was sent and closes the files. No call may be under
// way.
func (q *LogQueue) Close() error {
	q.mu.Lock()
	err := q.saveLocked()
	q.mu.Unlock()
	q.reader.Close()
	return errors.Join(err, q.log.Close())
}
