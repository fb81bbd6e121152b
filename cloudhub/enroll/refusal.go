package enroll

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// refuse makes an error whose text the other side may read.
func refuse(code edgeapi.JoinErrorCode, format string, args ...any) error {
	return &edgeapi.JoinError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// unavailable is for failures of the API server: nothing was decided, the
// other side may try again as it is. The cause stays in the hub's log.
type unavailable struct {
	op  string
	err error
}

func (u *unavailable) Error() string { return "enroll: " + u.op + ": " + u.err.Error() }
func (u *unavailable) Unwrap() error { return u.err }

// As lets errors.As find what the other side is told.
func (u *unavailable) As(target any) bool {
	if t, ok := target.(**edgeapi.JoinError); ok {
		*t = &edgeapi.JoinError{Code: edgeapi.JoinUnavailable, Message: "the hub cannot reach its own API server now"}
		return true
	}
	return false
}

// WriteRefusal answers a request with err as edges understand it. Errors that
// are not about the caller become "unavailable" without their text.
func WriteRefusal(w http.ResponseWriter, err error, now time.Time) {
	var refusal *edgeapi.JoinError
	if !errors.As(err, &refusal) {
		refusal = &edgeapi.JoinError{Code: edgeapi.JoinUnavailable, Message: "the hub failed to decide"}
	}
	body := *refusal
	body.Time = now.UTC()
	status := statusOf(body.Code)
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "2")
	}
	writeJSON(w, status, &body)
}

func statusOf(code edgeapi.JoinErrorCode) int {
	switch code {
	case edgeapi.JoinBadRequest, edgeapi.JoinBadName, edgeapi.JoinBadKey:
		return http.StatusBadRequest
	case edgeapi.JoinTokenUnknown, edgeapi.JoinTokenExpired, edgeapi.JoinTokenUsed, edgeapi.JoinTokenRevoked, edgeapi.JoinNoCertificate:
		return http.StatusUnauthorized
	case edgeapi.JoinTokenWrongNode, edgeapi.JoinUnknownNode, edgeapi.JoinNodeRevoked, edgeapi.JoinNodeReplaced, edgeapi.JoinCertificateExpired:
		return http.StatusForbidden
	case edgeapi.JoinNameInUse:
		return http.StatusConflict
	case edgeapi.JoinTooMany:
		return http.StatusTooManyRequests
	}
	return http.StatusServiceUnavailable
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	h := w.Header()
	h.Set(edgeapi.HubHeader, edgeapi.HubHeaderValue)
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// A caller that has gone is told nothing; a join it misses it may repeat.
	_ = json.NewEncoder(w).Encode(body)
}
