package store

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
)

func bigStore(b *testing.B, n int) Config {
	b.Helper()
	cfg := testConfig(b)
	s, err := Open(cfg)
	if err != nil {
		b.Fatal(err)
	}
	var d Delta
	for i := range n {
		name, uid := fmt.Sprintf("p%d", i), fmt.Sprintf("u%d", i)
		d.Upserts = append(d.Upserts, Upsert{podKey(name), uid, "1", podBody(name, uid, fmt.Sprintf(`,"status":{"pad":%q}`, strings.Repeat("x", 3000)))})
	}
	d.Synced = "e"
	apply(b, s, d)
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	return cfg
}

func BenchmarkOpen1000(b *testing.B) {
	cfg := bigStore(b, 1000)
	for b.Loop() {
		s, err := Open(cfg)
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStatusWrite(b *testing.B) {
	for _, writers := range []int{1, 32} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s := mustOpen(b, bigStore(b, 100))
			written, commits := s.BytesWritten(), s.Commits()
			b.ReportAllocs()
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for i := w; i < b.N; i += writers {
						patchStatus(b, s, podKey(fmt.Sprintf("p%d", w)), fmt.Sprintf(`{"phase":"%d","pad":%q}`, i, strings.Repeat("x", 3000)))
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(s.BytesWritten()-written)/float64(b.N), "disk-B/op")
			b.ReportMetric(float64(s.Commits()-commits)/float64(b.N), "commits/op")
		})
	}
}

func BenchmarkWatchFanOut(b *testing.B) {
	for _, watchers := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("watchers=%d", watchers), func(b *testing.B) {
			s := mustOpen(b, testConfig(b))
			k := Key{"leases", "kube-node-lease", "n"}
			ctx, cancel := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			for range watchers {
				w, err := s.Watch(ctx, "leases", s.RV())
				if err != nil {
					b.Fatal(err)
				}
				wg.Go(func() {
					for {
						if _, _, err := w.Next(ctx, 0); err != nil {
							return
						}
					}
				})
			}
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Local(ctx, func(tx *Tx) error { _, err := tx.Put(k, "u", []byte(`{"spec":{}}`)); return err }); err != nil {
					b.Fatal(err)
				}
			}
			cancel()
			wg.Wait()
		})
	}
}
