package enroll

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const servingLifetime = 365 * 24 * time.Hour

// ServerTLS returns the TLS configuration of the hub's port: TLS 1.3, the
// hub's certificate with its CA behind it (an edge that joins looks for the CA
// there), renewed in memory.
//
// A client certificate is optional, as an edge that joins has none. One that
// is given must end in the hub's CA; it may have expired only if it is a
// known, unrevoked node's within the grace, who needs it for edgeapi.RenewPath
// and whom Identify refuses everywhere else. A handler must not look at peer
// certificates itself but ask Identify.
//
// Serve it through a tls.Listener or set TLSNextProto: the tunnel is a
// WebSocket, so HTTP/2 is not offered.
func (e *Enroll) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		NextProtos:     []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return e.server.get() },
		// A resumed session would show the certificate it began with for as
		// long as the ticket lives, past renewals that dropped its key. It
		// saves no round trip either, as tunnels send nothing early.
		SessionTicketsDisabled: true,
		// Not VerifyClientCertIfGiven: it knows no grace.
		ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			return e.verifyPeer(cs.PeerCertificates[0])
		},
		Time: e.now,
	}
}

// verifyPeer lets a genuine certificate that is in date through to HTTP, even
// an unwelcome one: there its holder can be told why it is refused, which a
// TLS alert cannot say. One out of date must be a node's that may renew.
func (e *Enroll) verifyPeer(cert *x509.Certificate) error {
	if err := e.verifyChain(cert, e.now(), 0); err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	_, err := e.identify(ctx, cert, e.cfg.GraceAfterExpiry)
	return err
}

// servingCert is the certificate this replica shows. Its key lives in memory
// only; a restart makes another.
type servingCert struct {
	ca    *authority
	names []string
	ips   []net.IP
	now   func() time.Time
	log   *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	renewAt time.Time
}

func newServingCert(ca *authority, names []string, now func() time.Time, log *slog.Logger) (*servingCert, error) {
	if len(names) == 0 {
		var err error
		if names, err = hostNames(); err != nil {
			return nil, fmt.Errorf("enroll: find this host's names for the hub's certificate: %w; set server names", err)
		}
	}
	s := &servingCert{ca: ca, now: now, log: log}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			s.ips = append(s.ips, ip)
		} else {
			s.names = append(s.names, name)
		}
	}
	if _, err := s.get(); err != nil {
		return nil, err
	}
	return s, nil
}

// get returns the certificate, a new one when a third of the present one's
// life is left.
func (s *servingCert) get() (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.current != nil && now.Before(s.renewAt) {
		return s.current, nil
	}
	fresh, err := s.issue(now)
	if err != nil {
		err = fmt.Errorf("enroll: issue the hub's certificate: %w", err)
		if s.current == nil {
			return nil, err
		}
		s.log.Error("the hub's certificate could not be renewed; keeping the present one", "error", err)
		s.renewAt = now.Add(time.Hour)
		return s.current, nil
	}
	s.current = fresh
	s.renewAt = now.Add(fresh.Leaf.NotAfter.Sub(now) * 2 / 3)
	return s.current, nil
}

func (s *servingCert) issue(now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := s.ca.issue(&x509.Certificate{
		Subject: pkix.Name{Organization: []string{edgeapi.HubOrganization}, CommonName: "cloudhub"},
		// As old as the CA: an edge whose clock runs behind, but not behind
		// its own enrolment, must not lose the hub over a renewal here.
		NotBefore:   s.ca.cert.NotBefore,
		NotAfter:    now.Add(servingLifetime),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    s.names,
		IPAddresses: s.ips,
	}, key.Public())
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{
		Certificate: [][]byte{leaf.Raw, s.ca.cert.Raw},
		PrivateKey:  key,
		Leaf:        leaf,
	}, nil
}

// hostNames returns the names by which this host may be reached.
func hostNames() ([]string, error) {
	names := []string{"localhost"}
	if host, err := os.Hostname(); err == nil && host != "" && host != "localhost" {
		names = append(names, host)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	for _, addr := range addrs {
		if n, ok := addr.(*net.IPNet); ok && !n.IP.IsLinkLocalUnicast() {
			names = append(names, n.IP.String())
		}
	}
	return names, nil
}
