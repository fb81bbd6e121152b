package enrolment

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// TestJoinErrors holds the text of every way a join fails: what, where, and
// what to do next. {HUB}, {ADDR}, {DIR} stand for what the test drew.
func TestJoinErrors(t *testing.T) {
	cases := []struct {
		name   string
		reason identity.Reason // "" if the error is not about a hub
		setUp  func(t *testing.T, s *situation)
		want   string // a regular expression for the whole text
	}{{
		name:  "no URL",
		setUp: func(t *testing.T, s *situation) { s.opts.HubURL = "" },
		want:  `join: the hub's URL is missing; give it as https://HOST:10443`,
	}, {
		name:  "token cut",
		setUp: func(t *testing.T, s *situation) { s.opts.Token = s.opts.Token[:len(s.opts.Token)-5] },
		want:  `join: token's last part is not a CA hash: it was cut or changed when it was copied; copy the whole line that cloudhub token create printed`,
	}, {
		name:   "token wrong",
		reason: identity.Reason(edgeapi.JoinTokenUnknown),
		setUp: func(t *testing.T, s *situation) {
			token, err := edgeapi.ParseToken(s.opts.Token)
			if err != nil {
				t.Fatal(err)
			}
			token.Secret = strings.Repeat("a", len(token.Secret))
			s.opts.Token = token.Text()
		},
		want: `join {HUB} as node edge-7: the hub does not know this token: it was changed when it was copied, or it was removed long ago; make a new one at the hub with: cloudhub token create`,
	}, {
		name:   "token expired",
		reason: identity.Reason(edgeapi.JoinTokenExpired),
		setUp:  func(t *testing.T, s *situation) { s.clock.advance(25 * time.Hour) },
		want:   `join {HUB} as node edge-7: the token expired at {TIME}, 60 minutes ago; make a new one at the hub with: cloudhub token create`,
	}, {
		name:   "token used",
		reason: identity.Reason(edgeapi.JoinTokenUsed),
		setUp: func(t *testing.T, s *situation) {
			s.join(t, identity.JoinOptions{NodeName: "edge-6", DataDir: t.TempDir()})
		},
		want: `join {HUB} as node edge-7: the token was used up, last by node edge-6 at {TIME}; make a new one at the hub with: cloudhub token create`,
	}, {
		name:   "token revoked",
		reason: identity.Reason(edgeapi.JoinTokenRevoked),
		setUp: func(t *testing.T, s *situation) {
			token, _ := edgeapi.ParseToken(s.opts.Token)
			if err := s.hub.Tokens().Revoke(t.Context(), token.ID); err != nil {
				t.Fatal(err)
			}
		},
		want: `join {HUB} as node edge-7: the token was revoked at {TIME}; make a new one at the hub with: cloudhub token create`,
	}, {
		name:   "token for another node",
		reason: identity.Reason(edgeapi.JoinTokenWrongNode),
		setUp: func(t *testing.T, s *situation) {
			s.opts.Token = s.token(t, enroll.TokenOptions{NodeName: "edge-9"})
		},
		want: `join {HUB} as node edge-7: the token is for node edge-9 only, not for edge-7; join under that name with --node-name, or make a new token at the hub with: cloudhub token create`,
	}, {
		name:   "name in use",
		reason: identity.Reason(edgeapi.JoinNameInUse),
		setUp:  func(t *testing.T, s *situation) { s.occupy(t) },
		want:   `join {HUB} as node edge-7: the name edge-7 belongs to a node that joined at {TIME}; choose another name, take it over with --replace and a token from cloudhub token create --allow-replace, or remove that one with: cloudhub node forget edge-7`,
	}, {
		name:   "name in use, token would replace",
		reason: identity.Reason(edgeapi.JoinNameInUse),
		setUp: func(t *testing.T, s *situation) {
			s.occupy(t)
			s.opts.Token = s.token(t, enroll.TokenOptions{AllowReplace: true})
		},
		want: `join {HUB} as node edge-7: the name edge-7 belongs to a node that joined at {TIME}; choose another name, or take it over with --replace`,
	}, {
		name:   "name in use, token does not replace",
		reason: identity.Reason(edgeapi.JoinNameInUse),
		setUp:  func(t *testing.T, s *situation) { s.occupy(t); s.opts.Replace = true },
		want:   `join {HUB} as node edge-7: the name edge-7 belongs to a node that joined at {TIME}; this token does not allow taking it over: make one with cloudhub token create --allow-replace, or remove that one with: cloudhub node forget edge-7`,
	}, {
		name:   "node revoked",
		reason: identity.Reason(edgeapi.JoinNodeRevoked),
		setUp: func(t *testing.T, s *situation) {
			s.occupy(t)
			if err := s.hub.Revoke(t.Context(), "edge-7", "stolen"); err != nil {
				t.Fatal(err)
			}
		},
		want: `join {HUB} as node edge-7: node edge-7 was revoked at {TIME}; choose another name, take it over with --replace and a token from cloudhub token create --allow-replace, or forget it with: cloudhub node forget edge-7`,
	}, {
		name:  "node name not allowed",
		setUp: func(t *testing.T, s *situation) { s.opts.NodeName = "Edge_7" },
		want:  `join: node name "Edge_7" cannot name a node: a lowercase RFC 1123 subdomain must .*; give another with --node-name, for instance edge-7`,
	}, {
		name: "joined already",
		setUp: func(t *testing.T, s *situation) {
			s.join(t, identity.JoinOptions{})
			s.opts.Token = s.token(t, enroll.TokenOptions{})
		},
		want: `join: this machine has joined {HUB} as node edge-7 already \({DIR}/identity\); to give that up and join anew, add --force, or --replace to keep the name`,
	}, {
		name: "data directory not writable",
		setUp: func(t *testing.T, s *situation) {
			file := filepath.Join(s.opts.DataDir, "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			s.opts.DataDir = filepath.Join(file, "data")
		},
		want: `join: make data directory {DIR}: mkdir .*/file: not a directory; choose another directory with --data-dir`,
	}, {
		name:   "another hub's token",
		reason: identity.ReasonCAMismatch,
		setUp: func(t *testing.T, s *situation) {
			other := enrolltest.Start(t, enroll.Config{})
			text, _, err := other.Tokens().Create(t.Context(), enroll.TokenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			s.opts.Token = text
		},
		want: `join {HUB} as node edge-7: the hub at {ADDR} is not the one that made this token: its CA is sha256:[0-9a-f]{64}, the token names sha256:[0-9a-f]{64}; make a new token at this hub with: cloudhub token create; if the token is this hub's, somebody listens in between`,
	}, {
		name:   "hub under another name",
		reason: identity.ReasonHubName,
		setUp: func(t *testing.T, s *situation) {
			s.start(t, enroll.Config{ServerNames: []string{"hub.example", "192.0.2.1"}})
		},
		want: `join {HUB} as node edge-7: the hub's certificate is for hub.example, 192.0.2.1, not for 127.0.0.1; join by one of those, or start cloudhub with --server-names 127.0.0.1 added`,
	}, {
		name:   "clock behind",
		reason: identity.ReasonClockSkew,
		setUp: func(t *testing.T, s *situation) {
			ahead := &clock{}
			ahead.advance(40 * 24 * time.Hour)
			s.start(t, enroll.Config{Clock: ahead.now})
		},
		want: `join {HUB} as node edge-7: this machine's clock is (39|40) days behind the hub's: it says {TIME}, the hub's says {TIME}; set this machine's clock \(timedatectl set-ntp true, or date -s\) and try again`,
	}, {
		name:   "clock ahead",
		reason: identity.ReasonClockSkew,
		setUp: func(t *testing.T, s *situation) {
			behind := &clock{}
			behind.advance(-3 * 365 * 24 * time.Hour)
			s.start(t, enroll.Config{Clock: behind.now})
		},
		want: `join {HUB} as node edge-7: this machine's clock is [23] years ahead of the hub's: it says {TIME}, the hub's says {TIME}; set this machine's clock \(timedatectl set-ntp true, or date -s\) and try again`,
	}, {
		name:   "hub's own clock wrong",
		reason: identity.ReasonClockSkew,
		setUp: func(t *testing.T, s *situation) {
			jumping := &clock{}
			jumping.advance(40 * 24 * time.Hour)
			s.start(t, enroll.Config{Clock: jumping.now})
			jumping.advance(-80 * 24 * time.Hour)
		},
		want: `join {HUB} as node edge-7: the hub's clock says {TIME}, which its own certificate \(valid {TIME} to {TIME}\) contradicts; this machine's clock says {TIME}; set the hub's clock and restart cloudhub`,
	}, {
		name:   "nothing listens",
		reason: identity.ReasonRefused,
		setUp:  func(t *testing.T, s *situation) { s.opts.HubURL = "https://" + closedPort(t) },
		want:   `join {HUB} as node edge-7: connection refused: nothing listens at {ADDR}; check that cloudhub runs there, and its port \(10443 unless set otherwise\)`,
	}, {
		name:   "no such host",
		reason: identity.ReasonNoSuchHost,
		// A label too long for the DNS is unknown without asking anybody.
		setUp: func(t *testing.T, s *situation) {
			s.opts.HubURL = "https://" + strings.Repeat("a", 64) + ".example:10443"
		},
		want: `join {HUB} as node edge-7: no such host: the DNS does not know "a{64}\.example"; check the name, and the name servers in /etc/resolv.conf`,
	}, {
		name:   "no answer",
		reason: identity.ReasonTimeout,
		setUp: func(t *testing.T, s *situation) {
			s.opts.HubURL = "https://" + listen(t, func(c net.Conn) { <-t.Context().Done(); c.Close() })
			s.opts.Timeout = 200 * time.Millisecond
		},
		want: `join {HUB} as node edge-7: no answer from {ADDR} in time; check the address, and that no firewall drops the way to that port`,
	}, {
		name:   "cut off",
		reason: identity.ReasonCutOff,
		setUp: func(t *testing.T, s *situation) {
			s.opts.HubURL = "https://" + listen(t, func(c net.Conn) {
				_, _ = c.Read(make([]byte, 1))
				c.Close()
			})
		},
		want: `join {HUB} as node edge-7: {ADDR} cut the connection off; check that it is a hub's address and port, and that no firewall or proxy in between forbids TLS 1.3`,
	}, {
		name:   "captive portal, plain HTTP",
		reason: identity.ReasonNotAHub,
		setUp: func(t *testing.T, s *situation) {
			portal := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
			t.Cleanup(portal.Close)
			s.opts.HubURL = strings.Replace(portal.URL, "http:", "https:", 1)
		},
		want: `join {HUB} as node edge-7: {ADDR} answers plain HTTP where a hub speaks TLS; check the address and port; on a guest network a captive portal may be in the way: open it in a browser first`,
	}, {
		name:   "not TLS at all",
		reason: identity.ReasonNotAHub,
		setUp: func(t *testing.T, s *situation) {
			s.opts.HubURL = "https://" + listen(t, func(c net.Conn) {
				_, _ = c.Write([]byte("SSH-2.0-OpenSSH_9.2\r\n"))
				_, _ = c.Read(make([]byte, 4096))
				c.Close()
			})
		},
		want: `join {HUB} as node edge-7: {ADDR} does not speak TLS; check the address and port; .*`,
	}, {
		name:   "captive portal, its own TLS",
		reason: identity.ReasonNotAHub,
		setUp: func(t *testing.T, s *situation) {
			portal := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				t.Error("the portal was sent a request")
			}))
			portal.Config.ErrorLog = nil
			t.Cleanup(portal.Close)
			s.opts.HubURL = portal.URL
		},
		want: `join {HUB} as node edge-7: {ADDR} is no Skerry hub: it shows a certificate for example.com, .*127.0.0.1.* issued by "O=Acme Co"; check the address and port; .*`,
	}, {
		name:   "something else behind the hub's certificate",
		reason: identity.ReasonNotAHub,
		setUp: func(t *testing.T, s *situation) {
			other := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/html")
				w.WriteHeader(http.StatusNotFound)
			}))
			other.Listener = tls.NewListener(other.Listener, s.hub.ServerTLS())
			other.Start()
			t.Cleanup(other.Close)
			s.opts.HubURL = "https://" + other.Listener.Addr().String()
		},
		want: `join {HUB} as node edge-7: something answered "404 Not Found" that is no Skerry hub \(text/html\); check the address and port; .*`,
	}}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSituation(t)
			c.setUp(t, s)
			_, err := identity.Join(t.Context(), s.opts)
			if err == nil {
				t.Fatal("the join succeeded")
			}
			if hub, herr := identity.ParseHubURL(s.opts.HubURL); herr == nil {
				c.want = strings.ReplaceAll(c.want, "{HUB}", regexp.QuoteMeta(hub.String()))
				c.want = strings.ReplaceAll(c.want, "{ADDR}", regexp.QuoteMeta(hub.Host))
			}
			c.want = strings.ReplaceAll(c.want, "{DIR}", regexp.QuoteMeta(s.opts.DataDir))
			c.want = strings.ReplaceAll(c.want, "{TIME}", `\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC`)
			if !regexp.MustCompile("^" + c.want + "$").MatchString(err.Error()) {
				t.Errorf("got  %s\nwant %s", err, c.want)
			}
			var e *identity.Error
			if errors.As(err, &e); c.reason != "" && (e == nil || e.Reason != c.reason) {
				t.Errorf("reason of %#v is not %q", err, c.reason)
			}
			token, terr := edgeapi.ParseToken(s.opts.Token)
			if terr == nil && strings.Contains(err.Error(), token.Secret) {
				t.Error("the error tells the token's secret")
			}
		})
	}
}

// situation is a hub with a fresh token and a machine about to join it.
type situation struct {
	hub   *enrolltest.Hub
	clock *clock
	opts  identity.JoinOptions
}

func newSituation(t *testing.T) *situation {
	s := &situation{clock: &clock{}}
	s.opts = identity.JoinOptions{NodeName: "edge-7", DataDir: t.TempDir(), Timeout: 10 * time.Second}
	s.start(t, enroll.Config{Clock: s.clock.now})
	return s
}

func (s *situation) start(t *testing.T, cfg enroll.Config) {
	s.hub = enrolltest.Start(t, cfg)
	s.opts.HubURL = s.hub.URL
	s.opts.Token = s.token(t, enroll.TokenOptions{})
}

func (s *situation) token(t *testing.T, opts enroll.TokenOptions) string {
	t.Helper()
	text, _, err := s.hub.Tokens().Create(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// join joins with s's options where opts has none.
func (s *situation) join(t *testing.T, opts identity.JoinOptions) *identity.Identity {
	t.Helper()
	if opts.HubURL == "" {
		opts.HubURL = s.opts.HubURL
	}
	if opts.Token == "" {
		opts.Token = s.opts.Token
	}
	if opts.NodeName == "" {
		opts.NodeName = s.opts.NodeName
	}
	if opts.DataDir == "" {
		opts.DataDir = s.opts.DataDir
	}
	id, err := identity.Join(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// occupy lets another machine have the name.
func (s *situation) occupy(t *testing.T) *identity.Identity {
	t.Helper()
	return s.join(t, identity.JoinOptions{Token: s.token(t, enroll.TokenOptions{}), DataDir: t.TempDir()})
}

func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// listen serves every connection with serve until the test ends.
func listen(t *testing.T, serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return l.Addr().String()
}
