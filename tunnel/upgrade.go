package tunnel

import (
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/gorilla/websocket"
)

// Upgrade takes an edge's request in as the hub's end of a session. The caller
// has authenticated it by then (r.TLS). On an error the request has been
// answered. The handler should return soon after Upgrade, not serve the session
// itself: a handler that stays keeps net/http's buffers and stack, 16 kB an
// edge.
//
// The hub's tls.Config should set DynamicRecordSizingDisabled, so that a
// message is one TLS record.
func Upgrade(w http.ResponseWriter, r *http.Request, cfg Config) (*Session, error) {
	if !slices.Contains(websocket.Subprotocols(r), Subprotocol) {
		http.Error(w, "this endpoint speaks the WebSocket subprotocol "+Subprotocol+" only", http.StatusBadRequest)
		return nil, fmt.Errorf("tunnel: upgrade from %s: it does not offer subprotocol %s", r.RemoteAddr, Subprotocol)
	}
	cfg, err := cfg.withDefaults(true)
	if err != nil {
		http.Error(w, "tunnel misconfigured", http.StatusInternalServerError)
		return nil, err
	}
	up := websocket.Upgrader{
		Subprotocols:    []string{Subprotocol},
		ReadBufferSize:  wsReadBuffer,
		WriteBufferSize: wsBufferSize,
		WriteBufferPool: &cfg.Memory.write,
		// An edge is no browser: with an Origin a web page is asking, through
		// whatever certificate its user's browser holds.
		CheckOrigin: func(r *http.Request) bool { return r.Header.Get("Origin") == "" },
	}
	ws, err := up.Upgrade(w, r, nil)
	if err != nil {
		var bad websocket.HandshakeError
		if errors.As(err, &bad) {
			return nil, fmt.Errorf("tunnel: upgrade from %s: %w", r.RemoteAddr, bad)
		}
		return nil, fmt.Errorf("tunnel: upgrade from %s: connection failed: %w", r.RemoteAddr, err)
	}
	s, err := Server(ws, cfg)
	if err != nil {
		_ = ws.Close()
		return nil, err
	}
	return s, nil
}

// wsReadBuffer only has to hold WebSocket headers and small messages: larger
// reads bypass it.
const wsReadBuffer = 512
