package identity

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// RenewerConfig configures a Renewer.
type RenewerConfig struct {
	Identity *Identity // required
	// HubURL is where to renew; empty means the hub that was joined, at the
	// address it was joined by.
	HubURL string
	// Renewed is called after each renewal; nil means nobody cares.
	Renewed func()
	Log     *slog.Logger // nil discards
}

// Renewer trades the node's certificate for a younger one in time. Nothing is
// sent while none is due.
type Renewer struct {
	id      *Identity
	log     *slog.Logger
	renewed func()
	kick    chan struct{}

	// attempt renews once; tests of the schedule replace it.
	attempt func(context.Context) error
}

const (
	// lookAgain bounds how long the schedule trusts the wall clock to stay.
	lookAgain     = time.Hour
	firstRetry    = time.Minute
	maxRetry      = time.Hour
	attemptBudget = 2 * time.Minute

	// minGap is between any two tries, whoever asks for them: a hub that
	// refuses each connection must not be asked for a certificate as often.
	minGap = 30 * time.Second
)

// NewRenewer checks cfg; it starts nothing.
func NewRenewer(cfg RenewerConfig) (*Renewer, error) {
	if cfg.Identity == nil {
		return nil, errors.New("identity: RenewerConfig.Identity is required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	hub := cfg.Identity.HubURL()
	if cfg.HubURL != "" {
		var err error
		if hub, err = ParseHubURL(cfg.HubURL); err != nil {
			return nil, fmt.Errorf("identity: %w", err)
		}
	}
	r := &Renewer{id: cfg.Identity, log: cfg.Log.With("node", cfg.Identity.NodeName()), kick: make(chan struct{}, 1), renewed: cfg.Renewed}
	if r.renewed == nil {
		r.renewed = func() {}
	}
	r.attempt = func(ctx context.Context) error { return cfg.Identity.renew(ctx, hub, r.log) }
	return r, nil
}

// Kick asks for a renewal now, as when the hub refused the certificate as
// expired although this machine's clock says otherwise.
func (r *Renewer) Kick() {
	select {
	case r.kick <- struct{}{}:
	default: // one is asked for already
	}
}

// Run renews when a third of the certificate's life is left, and tries again
// for ever if that fails: minutes at first, then hourly. It returns when ctx
// ends.
func (r *Renewer) Run(ctx context.Context) error {
	retry := time.Duration(0)
	told := Reason("")
	var tried time.Time
	for {
		due := retry
		if retry == 0 {
			due = r.id.renewIn()
		}
		bounded := due
		if retry == 0 {
			bounded = min(due, lookAgain)
		}
		if kicked, ended := r.wait(ctx, bounded); ended {
			return nil
		} else if !kicked && retry == 0 && due > lookAgain {
			continue
		}

		if left := minGap - time.Since(tried); !tried.IsZero() && left > 0 {
			if pause(ctx, left) != nil {
				return nil
			}
		}
		tried = time.Now()
		err := r.attempt(ctx)
		switch {
		case err == nil:
			r.log.Info("certificate renewed", "until", r.id.Certificate().NotAfter)
			retry, told = 0, ""
			r.renewed()
		case ctx.Err() != nil:
			return nil
		default:
			if why := reasonOf(err); why != told {
				r.log.Warn("certificate not renewed; it is tried again", "validUntil", r.id.Certificate().NotAfter, "error", err)
				told = why
			}
			retry = min(max(2*retry, firstRetry), maxRetry)
			retry += rand.N(retry / 2)
		}
	}
}

// wait sleeps for d or until kicked.
func (r *Renewer) wait(ctx context.Context, d time.Duration) (kicked, ended bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, true
	case <-r.kick:
		return true, false
	case <-timer.C:
		return false, false
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

func reasonOf(err error) Reason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return Reason(err.Error())
}

// renewIn is how long until a third of the certificate's life is left, less a
// little that differs from node to node, so that nodes that joined together
// do not renew together.
func (id *Identity) renewIn() time.Duration {
	cert := id.Certificate()
	begun := cert.NotBefore
	if at := id.IssuedAt(); at.After(begun) {
		begun = at // the hub backdates certificates, which says nothing of their life
	}
	life := cert.NotAfter.Sub(begun)
	spread := time.Duration(float64(life) / 20 * (float64(cert.SerialNumber.Bytes()[len(cert.SerialNumber.Bytes())-1]) / 256))
	return max(0, cert.NotAfter.Add(-life/3-spread).Sub(id.now()))
}

// Renew trades the certificate for a younger one with a fresh key now. The old
// one stays good until the new one has been used.
func (id *Identity) Renew(ctx context.Context, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return id.renew(ctx, id.HubURL(), log)
}

func (id *Identity) renew(ctx context.Context, at *url.URL, log *slog.Logger) error {
	release, err := lock(id.dataDir)
	if err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, attemptBudget)
	defer cancel()

	present := id.material()
	key, keyPEM, err := id.nextKey()
	if err != nil {
		return err
	}
	csr, err := newCSR(key)
	if err != nil {
		return fmt.Errorf("renew: make a certificate request: %w", err)
	}
	hub := &hubClient{url: at, node: present.meta.NodeName, op: "renew", log: log}
	resp, err := hub.post(ctx, id.ClientTLS(), edgeapi.RenewPath, edgeapi.RenewRequest{CSR: csr})
	if err != nil {
		return err
	}
	m, err := accept(resp, acceptance{hub: present.hub, node: present.meta.NodeName, key: key, keyPEM: keyPEM, trusted: present.cas})
	if err != nil {
		return hub.fail(ReasonBadAnswer, err, "the hub's answer cannot be used: "+err.Error(), "update edgecore or cloudhub so that their versions fit")
	}
	if m.meta.IssuedAt.Before(present.meta.IssuedAt) {
		m.meta.IssuedAt = present.meta.IssuedAt // time does not run backwards
	}
	m.meta.Join = present.meta.Join
	if err := install(id.dataDir, m); err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	id.adopt(m)
	return nil
}

// nextKey returns the key of the renewal under way, or begins one. It is on
// disk before the hub hears of it: if the answer is lost, the next try asks
// for the same key.
func (id *Identity) nextKey() (*ecdsa.PrivateKey, []byte, error) {
	path := filepath.Join(id.dataDir, dirName, nextKeyFile)
	if keyPEM, err := readBounded(path); err == nil {
		if key, err := parseKey(keyPEM); err == nil {
			return key, keyPEM, nil
		}
	}
	key, keyPEM, err := newKey()
	if err != nil {
		return nil, nil, fmt.Errorf("renew: make a key: %w", err)
	}
	if err := replaceFile(path, 0o600, keyPEM); err != nil {
		return nil, nil, fmt.Errorf("renew: keep the new key: %w", explainWrite(err))
	}
	return key, keyPEM, nil
}
