package tunnel

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestWriteEndsWithItsStream ends streams and sessions under Writes that go out
// inline, when the lock is free for a moment and nobody is told who does not
// wait.
func TestWriteEndsWithItsStream(t *testing.T) {
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	for round := range rounds {
		edge, hub := newTLSPair(t, Config{}, Config{})
		var done []chan struct{}
		var streams []*Stream
		for range 4 {
			st, _ := streamPair(t, hub, edge, ClassSync)
			c := make(chan struct{})
			done, streams = append(done, c), append(streams, st)
			go func() {
				defer close(c)
				for {
					if _, err := st.Write(make([]byte, 100)); err != nil {
						return
					}
				}
			}()
		}
		pause := time.NewTimer(rand.N(2 * time.Millisecond))
		<-pause.C
		switch round % 3 {
		case 0:
			edge.end(&LinkError{Op: "test"}, false) // a cable pulled
		case 1:
			hub.Close()
		case 2:
			for _, st := range streams {
				st.Close()
			}
		}
		for _, c := range done {
			select {
			case <-c:
			case <-time.After(20 * time.Second):
				t.Fatalf("round %d: a Write outlives its stream", round)
			}
		}
		hub.Close()
		edge.Close()
	}
}
