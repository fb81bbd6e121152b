package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
)

const kindQueued = 1

// QueueConfig is of a Queue.
type QueueConfig struct {
	Dir     string // of its log; required
	Name    string // of its cursor; required
	Cursors Cursors
	// MaxBytes on disk; when it is reached nothing more is taken. Zero means
	// 64 MiB.
	MaxBytes int64
	Now      func() (time.Time, bool) // as in Config
	Log      *slog.Logger             // nil discards
}

// Queue is an mqtt.Queue on disk, for a bridge. After a crash some records that
// were acknowledged in the last seconds come again.
type Queue struct {
	cfg  QueueConfig
	log  *seglog.Log
	read *seglog.Reader // Next's own, but for Ack and Cursor

	mu     sync.Mutex // guards the following
	lastID uint64
	flying []flying // returned by Next and not acknowledged
}

type flying struct {
	id    uint64
	batch seglog.Batch
}

var _ mqtt.Queue = (*Queue)(nil)

// OpenQueue opens a queue, or makes one.
func OpenQueue(cfg QueueConfig) (*Queue, error) {
	if cfg.Dir == "" || cfg.Name == "" || cfg.Cursors == nil {
		return nil, errors.New("telemetry: a queue's Dir, Name and Cursors are required")
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 64 << 20
	}
	log, err := seglog.Open(seglog.Config{
		Dir: cfg.Dir, MaxBytes: cfg.MaxBytes, MaxAge: 10 * 365 * 24 * time.Hour, Policy: seglog.DropNewest, Now: cfg.Now, Log: cfg.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("queue %s: %w", cfg.Name, err)
	}
	q := &Queue{cfg: cfg, log: log}
	var saved []byte
	err = cfg.Cursors.Load(cursorBucket, func(key string, value []byte) error {
		if key == q.cursorKey() {
			saved = slices.Clone(value)
		}
		return nil
	})
	if err == nil {
		q.read, err = log.NewReader(saved)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("queue %s: %w", cfg.Name, err), log.Close())
	}
	return q, nil
}

func (q *Queue) cursorKey() string { return "queue/" + q.cfg.Name }

// Append returns once record is on the disk.
func (q *Queue) Append(ctx context.Context, record []byte) error {
	err := q.log.Append(ctx, seglog.Record{Kind: kindQueued, TS: time.Now().UnixMilli(), Payload: record})
	if errors.Is(err, seglog.ErrFull) {
		return fmt.Errorf("queue %s: %w", q.cfg.Name, mqtt.ErrQueueFull)
	}
	return err
}

// Next returns the oldest record that it has not returned yet, and waits for
// one. It is called from one goroutine.
func (q *Queue) Next(ctx context.Context) (id uint64, record []byte, err error) {
	for {
		b, err := q.read.Next(ctx, 1, seglog.MaxPayload)
		if err != nil {
			return 0, nil, err
		}
		q.mu.Lock()
		q.lastID++
		id := q.lastID
		q.flying = append(q.flying, flying{id, b})
		q.mu.Unlock()
		if rec := b.Records[0]; rec.Kind == kindQueued {
			return id, rec.Payload, nil
		} // else damage took some: the one after acknowledges it too
	}
}

// Ack says that the record id, and all before it, need not come again.
func (q *Queue) Ack(id uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for n < len(q.flying) && q.flying[n].id <= id {
		n++
	}
	if n == 0 {
		return nil
	}
	q.read.Ack(q.flying[n-1].batch)
	q.flying = append(q.flying[:0], q.flying[n:]...)
	q.cfg.Cursors.Dirty(cursorBucket, q.cursorKey(), q.read.Cursor)
	q.log.Trim(q.read.Oldest())
	return nil
}

// Len is how many records are not acknowledged.
func (q *Queue) Len() int { return int(q.read.Behind()) }

// Close ends the queue; nothing calls it then any more.
func (q *Queue) Close() error {
	q.read.Close()
	return q.log.Close()
}
