package mqtt

import (
	"context"
	"crypto/x509"
	"errors"
)

// Credentials are what a client of the embedded broker shows when it connects.
type Credentials struct {
	ClientID    string
	User        string
	Password    []byte
	Certificate *x509.Certificate // verified against the listener's client CA; nil: it showed none
	Remote      string            // its address
	Loopback    bool              // both ends are on this machine: 127.0.0.0/8, ::1 or a unix socket
	Listener    string
}

// Kinds of Principal.
const (
	PrincipalLocal  = "local"  // anonymous, on loopback
	PrincipalDevice = "device" // by password or certificate
	PrincipalPod    = "pod"    // by token
)

// Principal is who a client is.
type Principal struct {
	Kind string // one of the Principal constants
	Name string // for a device the user name or the certificate's common name
	Data any    // what the verifier of a pod's token said of it, for the ACL
}

func (p *Principal) is(other Principal) bool { return p.Kind == other.Kind && p.Name == other.Name }

// Authenticator says who a client is. ErrUnknownCredentials: it cannot judge
// such credentials and another one may; any other error refuses the client.
type Authenticator interface {
	Authenticate(ctx context.Context, c Credentials) (Principal, error)
}

// ErrUnknownCredentials says that credentials are of a kind, or of a user, that
// an Authenticator does not know.
var ErrUnknownCredentials = errors.New("nobody here knows such credentials")

// ErrBadCredentials says that they are wrong.
var ErrBadCredentials = errors.New("bad credentials")

// AnyOf asks each in turn until one knows the credentials.
type AnyOf []Authenticator

func (a AnyOf) Authenticate(ctx context.Context, c Credentials) (Principal, error) {
	for _, each := range a {
		p, err := each.Authenticate(ctx, c)
		if !errors.Is(err, ErrUnknownCredentials) {
			return p, err
		}
	}
	return Principal{}, ErrUnknownCredentials
}

// Anonymous lets in who shows nothing and comes over loopback.
type Anonymous struct{}

func (Anonymous) Authenticate(_ context.Context, c Credentials) (Principal, error) {
	if !c.Loopback || c.User != "" || len(c.Password) > 0 {
		return Principal{}, ErrUnknownCredentials
	}
	return Principal{Kind: PrincipalLocal}, nil
}

// Certificates knows a device by the common name of its certificate.
type Certificates struct{}

func (Certificates) Authenticate(_ context.Context, c Credentials) (Principal, error) {
	if c.Certificate == nil || c.Certificate.Subject.CommonName == "" {
		return Principal{}, ErrUnknownCredentials
	}
	return Principal{Kind: PrincipalDevice, Name: c.Certificate.Subject.CommonName}, nil
}

// Tokens knows a pod by the token it gives as its password.
type Tokens struct {
	User   string // whose password is a token; empty means pod
	Verify func(ctx context.Context, token string) (Principal, error)
}

func (t Tokens) Authenticate(ctx context.Context, c Credentials) (Principal, error) {
	user := t.User
	if user == "" {
		user = "pod"
	}
	if c.User != user || len(c.Password) == 0 {
		return Principal{}, ErrUnknownCredentials
	}
	p, err := t.Verify(ctx, string(c.Password))
	if err != nil {
		return Principal{}, err
	}
	p.Kind = PrincipalPod
	return p, nil
}
