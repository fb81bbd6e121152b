package tunnel

import (
	"errors"
	"fmt"
)

// Reset codes: why a stream ended before its time. Codes from CodeApplication
// on belong to the package's users.
const (
	CodeClosed    uint32 = 0 // the peer closed the stream and takes no more
	CodeRefused   uint32 = 1 // too many streams wait to be accepted
	CodeLimit     uint32 = 2 // too many streams are open
	CodeNoKind    uint32 = 3 // nobody serves this kind
	CodeInternal  uint32 = 4
	CodeTimeout   uint32 = 5
	CodeStalled   uint32 = 6 // the peer did not read for too long
	CodeDraining  uint32 = 7 // the session is being drained
	CodeCancelled uint32 = 8

	CodeApplication uint32 = 0x100
)

// Close codes: why a session ended. Codes from CloseApplication on belong to
// the package's users.
const (
	CloseNormal   uint32 = 0
	CloseProtocol uint32 = 1 // the peer broke the protocol
	CloseDrain    uint32 = 2 // the end was announced
	CloseReplaced uint32 = 3 // a newer session of this edge took over
	CloseRevoked  uint32 = 4 // the edge may no longer connect
	CloseDead     uint32 = 5 // nothing was heard for too long
	CloseOverload uint32 = 6 // the peer does not take what it must

	CloseApplication uint32 = 0x100
)

var (
	// ErrDraining is returned by Open on a session that is to end soon: open
	// the stream on the next session.
	ErrDraining = errors.New("tunnel: session is draining; use the next session")

	// ErrTooManyStreams is returned by Open when the peer's limit is reached:
	// close streams first.
	ErrTooManyStreams = errors.New("tunnel: the peer's limit of open streams is reached")
)

// ResetError is what Read and Write return on a stream that was reset.
type ResetError struct {
	Code   uint32
	Remote bool // the peer reset it
}

func (e *ResetError) Error() string {
	who := "here"
	if e.Remote {
		who = "by the peer"
	}
	return fmt.Sprintf("tunnel: stream reset %s: %s", who, resetText(e.Code))
}

func resetText(code uint32) string {
	switch code {
	case CodeClosed:
		return "closed, takes no more data"
	case CodeRefused:
		return "refused, too many streams wait to be accepted; try again"
	case CodeLimit:
		return "refused, too many streams are open; try again"
	case CodeNoKind:
		return "refused, no such kind of stream here; the ends may differ in version"
	case CodeInternal:
		return "internal error"
	case CodeTimeout:
		return "timed out"
	case CodeStalled:
		return "not read for too long"
	case CodeDraining:
		return "session is draining"
	case CodeCancelled:
		return "cancelled"
	}
	return fmt.Sprintf("code %#x", code)
}

// CloseError says that a session was ended by one of its ends.
type CloseError struct {
	Code   uint32
	Reason string
	Remote bool // the peer ended it
}

func (e *CloseError) Error() string {
	who := "here"
	if e.Remote {
		who = "by the peer"
	}
	text := closeText(e.Code)
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	return fmt.Sprintf("tunnel: session closed %s: %s", who, text)
}

func closeText(code uint32) string {
	switch code {
	case CloseNormal:
		return "normally"
	case CloseProtocol:
		return "protocol error"
	case CloseDrain:
		return "drained"
	case CloseReplaced:
		return "replaced by a newer session"
	case CloseRevoked:
		return "revoked"
	case CloseDead:
		return "dead"
	case CloseOverload:
		return "peer overloaded"
	}
	return fmt.Sprintf("code %#x", code)
}

// LinkError says that the connection beneath a session failed.
type LinkError struct {
	Op   string // "read" or "write"
	Peer string // address
	Err  error
}

func (e *LinkError) Error() string {
	return fmt.Sprintf("tunnel: connection to %s lost on %s: %v", e.Peer, e.Op, e.Err)
}

func (e *LinkError) Unwrap() error { return e.Err }
