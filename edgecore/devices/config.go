package devices

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"

	"context"

	"github.com/skerry-io/skerry/edgecore/store"
)

// Access tells who a token is of and what they may.
type Access interface {
	Authenticate(token string) (user.Info, error)
	Allowed(ctx context.Context, attr kubeauthorizer.Attributes) (ok bool, reason string, err error)
}

// Config of a Part.
type Config struct {
	Store    *store.Store // required
	NodeName string       // required
	// Dir is for what the part keeps: its database, logs of routes; required.
	Dir    string
	Access Access // required
	MQTT   MQTT
	// BytesPerDay is what reported values may cost the disk: beyond it they
	// wait longer for it; zero means 2 GB.
	BytesPerDay uint64
	// Socket is the unix socket of the API for pods; empty: there is none.
	Socket string
	// MapperSocket is the unix socket of mappers (profile external); empty:
	// there is none.
	MapperSocket string
	// Now is the time of day as the hub has corrected it, and whether it is
	// known to be right; required.
	Now func() (now time.Time, synced bool)
	Log *slog.Logger // nil discards
}

// MQTT is the node's broker, its own or another.
type MQTT struct {
	// Mode is auto (default), embedded or external.
	Mode string `json:"mode,omitempty"`
	// Listen is the embedded broker's plain listener; default 127.0.0.1:1883,
	// "off" for none. Beyond loopback nobody is anonymous.
	Listen string `json:"listen,omitempty"`
	// Plaintext allows Listen an address beyond loopback although it has no
	// TLS: who is on that network reads passwords and values.
	Plaintext bool `json:"plaintext,omitempty"`
	// PodListen is a second one, where pods find it; default
	// 169.254.20.20:1883 if localAPI.pods is set, else "off".
	PodListen string `json:"podListen,omitempty"`
	// TLS is its TLS listener.
	TLS MQTTTLS `json:"tls,omitempty"`
	// UsersFile has lines of user:hash (bcrypt, argon2id, or as
	// mosquitto_passwd writes them), mode 0600. Its users are the operator's:
	// they may use the topics of all devices of the node.
	UsersFile string `json:"usersFile,omitempty"`
	// AnonymousLoopback lets clients on this machine in without a name;
	// default true.
	AnonymousLoopback *bool `json:"anonymousLoopback,omitempty"`

	// URL of an external broker: mqtt://, mqtts://, ws:// or wss://.
	URL string `json:"url,omitempty"`
	// ClientID of this node there, with the node's name behind it; default
	// skerry.
	ClientID     string `json:"clientID,omitempty"`
	Username     string `json:"username,omitempty"`
	PasswordFile string `json:"passwordFile,omitempty"`
	CA           string `json:"ca,omitempty"` // default: the system's
	Cert         string `json:"cert,omitempty"`
	Key          string `json:"key,omitempty"`

	// BridgesFile has bridges to other brokers, as mosquitto's configuration
	// has them: connection and what follows it. With a password in it, mode
	// 0600.
	BridgesFile string `json:"bridgesFile,omitempty"`
}

// MQTTTLS is a TLS listener. With ClientCA, clients need a certificate of it.
type MQTTTLS struct {
	Listen   string `json:"listen,omitempty"`
	Cert     string `json:"cert,omitempty"`
	Key      string `json:"key,omitempty"`
	ClientCA string `json:"clientCA,omitempty"`
}

// Modes of MQTT.
const (
	ModeAuto     = "auto"
	ModeEmbedded = "embedded"
	ModeExternal = "external"
)

// off turns a listener off.
const off = "off"

// Complete sets defaults; podIP is where pods find this node, if they do.
func (m *MQTT) Complete(podIP netip.Addr) {
	if m.Mode == "" {
		m.Mode = ModeAuto
	}
	if m.Listen == "" {
		m.Listen = defaultListen
	}
	if m.PodListen == "" {
		m.PodListen = off
		if podIP.IsValid() {
			m.PodListen = netip.AddrPortFrom(podIP, 1883).String()
		}
	}
	if m.AnonymousLoopback == nil {
		yes := true
		m.AnonymousLoopback = &yes
	}
}

// defaultListen is loopback: devices on a network are let in by intent.
const defaultListen = "127.0.0.1:1883"

// named tells whether the configuration asks for a broker, devices or not.
func (m MQTT) named() bool {
	return m.Mode != ModeAuto || m.URL != "" || m.Listen != defaultListen || m.TLS.Listen != "" || m.BridgesFile != ""
}

// Check is of completed ones.
func (m MQTT) Check() error {
	switch m.Mode {
	case ModeAuto, ModeEmbedded:
	case ModeExternal:
		if m.URL == "" {
			return errors.New("devices.mqtt.mode is external: devices.mqtt.url is required")
		}
	default:
		return fmt.Errorf("devices.mqtt.mode %q: use auto, embedded or external", m.Mode)
	}
	for key, addr := range map[string]string{"listen": m.Listen, "podListen": m.PodListen, "tls.listen": m.TLS.Listen} {
		if addr == off || addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("devices.mqtt.%s %q is not an address with a port: %w", key, addr, err)
		}
	}
	if m.TLS.Listen != "" && (m.TLS.Cert == "" || m.TLS.Key == "") {
		return errors.New("devices.mqtt.tls.listen needs devices.mqtt.tls.cert and key")
	}
	if (m.Cert == "") != (m.Key == "") {
		return errors.New("devices.mqtt.cert and key need each other")
	}
	return nil
}

func (c *Config) check() error {
	if c.Store == nil || c.NodeName == "" || c.Dir == "" || c.Access == nil || c.Now == nil {
		return errors.New("devices: Store, NodeName, Dir, Access and Now are required")
	}
	for key, path := range map[string]string{"api.socket": c.Socket, "mapperSocket": c.MapperSocket} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("devices.%s %q is not an absolute path", key, path)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c.MQTT.Check()
}

// Conditions of the Node that this part keeps.
const ConditionReady corev1.NodeConditionType = "DevicesReady"
