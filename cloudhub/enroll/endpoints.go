package enroll

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// bodyTimeout bounds how long a caller may take to send its request.
const bodyTimeout = 15 * time.Second

// JoinHandler serves edgeapi.JoinPath. It asks for no client certificate: the
// token is what a machine has to show.
func (e *Enroll) JoinHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := e.serveJoin(w, r)
		e.answer(w, r, "join", resp, err)
	})
}

// RenewHandler serves edgeapi.RenewPath, for nodes that show their present
// certificate.
func (e *Enroll) RenewHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := e.serveRenew(w, r)
		e.answer(w, r, "renew", resp, err)
	})
}

func (e *Enroll) serveJoin(w http.ResponseWriter, r *http.Request) (*edgeapi.JoinResponse, error) {
	leave, err := e.enterGate(w, r)
	if err != nil {
		return nil, err
	}
	defer leave()
	req, err := decodeJoin(http.MaxBytesReader(w, r.Body, edgeapi.MaxJoinBody))
	if err != nil {
		return nil, err
	}
	attempt, err := req.check()
	if err != nil {
		return nil, err
	}

	// A caller that goes away in the middle must not leave half a join.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), joinTimeout)
	defer cancel()
	if err := e.awaitSync(ctx); err != nil {
		return nil, err
	}
	rec, cert, err := e.join(ctx, attempt)
	if err != nil {
		return nil, err
	}
	e.log.Info("node joined", "node", rec.Name, "token", attempt.tokenID, "address", r.RemoteAddr,
		"virtualIP", rec.VirtualIP.String(), "enrollment", rec.Enrollment)
	return e.respond(rec, cert.Raw), nil
}

func (e *Enroll) respond(rec NodeRecord, cert []byte) *edgeapi.JoinResponse {
	return &edgeapi.JoinResponse{
		NodeName:    rec.Name,
		Certificate: cert,
		CAs:         [][]byte{e.ca.cert.Raw},
		VirtualIP:   rec.VirtualIP.String(),
		Time:        e.now().UTC(),
	}
}

// enterGate applies what holds for every request before it is read: method,
// form, rate of its address, number under way, time to send it.
func (e *Enroll) enterGate(w http.ResponseWriter, r *http.Request) (leave func(), err error) {
	if r.Method != http.MethodPost {
		return nil, errMethod
	}
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return nil, refuse(edgeapi.JoinBadRequest, "the request is not application/json")
	}
	if !e.limits.allow(r.RemoteAddr, e.now()) {
		return nil, refuse(edgeapi.JoinTooMany, "too many requests from this address")
	}
	select {
	case e.inFlight <- struct{}{}:
	default:
		return nil, refuse(edgeapi.JoinTooMany, "the hub has %d joins under way", cap(e.inFlight))
	}
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		<-e.inFlight
		return nil, &unavailable{"limit the time to read a request", err}
	}
	return func() { <-e.inFlight }, nil
}

var errMethod = refuse(edgeapi.JoinBadRequest, "only POST is served here")

// awaitSync keeps joins back until this replica knows which addresses are
// taken.
func (e *Enroll) awaitSync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	select {
	case <-e.synced:
		return nil
	case <-ctx.Done():
		return refuse(edgeapi.JoinUnavailable, "the hub is still reading its nodes")
	}
}

func (e *Enroll) answer(w http.ResponseWriter, r *http.Request, what string, resp *edgeapi.JoinResponse, err error) {
	if err == nil {
		writeJSON(w, http.StatusOK, resp)
		return
	}
	if errors.Is(err, errMethod) {
		// An edge asks with HEAD for nothing but the Date, to judge its clock.
		w.Header().Set("Allow", http.MethodPost)
		w.Header().Set(edgeapi.HubHeader, edgeapi.HubHeaderValue)
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	if isUnavailable(err) {
		e.log.Error(what+" failed", "address", r.RemoteAddr, "error", err)
	} else {
		e.log.Info(what+" refused", "address", r.RemoteAddr, "why", err.Error())
	}
	WriteRefusal(w, err, e.now())
}

type joinRequest edgeapi.JoinRequest

// decodeJoin reads a join request and nothing after it.
func decodeJoin(body io.Reader) (*joinRequest, error) {
	var req joinRequest
	return &req, decodeBody(body, &req)
}

func decodeBody(body io.Reader, into any) error {
	dec := json.NewDecoder(body)
	if err := dec.Decode(into); err != nil {
		return badBody(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		if err == nil {
			err = errors.New("something follows the JSON value")
		}
		return badBody(err)
	}
	return nil
}

func badBody(err error) error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return refuse(edgeapi.JoinBadRequest, "the request is longer than %d bytes", tooLarge.Limit)
	}
	return refuse(edgeapi.JoinBadRequest, "the request cannot be read: %s", clip(fmt.Sprint(err), 200))
}

// check judges all that can be judged without looking anything up.
func (r *joinRequest) check() (*joinAttempt, error) {
	if err := checkNodeName(r.NodeName); err != nil {
		return nil, err
	}
	pub, key, err := requestedKey(r.CSR)
	if err != nil {
		return nil, err
	}
	return &joinAttempt{
		tokenID: r.TokenID, tokenSecret: r.TokenSecret,
		node: r.NodeName, replace: r.Replace, pub: pub, key: key,
	}, nil
}

func (e *Enroll) serveRenew(w http.ResponseWriter, r *http.Request) (*edgeapi.JoinResponse, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil, refuse(edgeapi.JoinNoCertificate, "a renewal needs the present certificate; this connection shows none")
	}
	leave, err := e.enterGate(w, r)
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), joinTimeout)
	defer cancel()

	present := r.TLS.PeerCertificates[0]
	rec, err := e.identify(ctx, present, e.cfg.GraceAfterExpiry)
	if err != nil {
		return nil, err
	}
	if !e.renewals.allow(rec.Name, e.now()) {
		return nil, refuse(edgeapi.JoinTooMany, "node %s renews too often", rec.Name)
	}
	var req edgeapi.RenewRequest
	if err := decodeBody(http.MaxBytesReader(w, r.Body, edgeapi.MaxJoinBody), &req); err != nil {
		return nil, err
	}
	pub, next, err := requestedKey(req.CSR)
	if err != nil {
		return nil, err
	}
	cert, err := e.ca.issueNode(rec.Name, pub, e.now(), e.cfg.CertLifetime)
	if err != nil {
		return nil, &unavailable{"issue the certificate of " + rec.Name, err}
	}
	shown := fingerprint(present.RawSubjectPublicKeyInfo)
	rec, err = e.updateNode(ctx, rec.Name, func(r *NodeRecord) error {
		if err := r.admits(shown); err != nil {
			return err
		}
		if shown == r.NextKey { // it was used, by this very request
			r.Key, r.NextKey = shown, ""
		}
		if next != r.Key {
			r.NextKey = next
		}
		r.RenewedAt = e.now().UTC().Truncate(time.Second)
		r.Serial, r.NotAfter = serialText(cert), cert.NotAfter.UTC()
		return nil
	})
	if errors.Is(err, ErrNoNode) {
		err = refuse(edgeapi.JoinUnknownNode, "the hub has no node %s: it was forgotten", present.Subject.CommonName)
	}
	if err != nil {
		return nil, joinWriteError(rec.Name, err)
	}
	e.log.Info("node renewed its certificate", "node", rec.Name, "until", rec.NotAfter)
	return e.respond(rec, cert.Raw), nil
}
