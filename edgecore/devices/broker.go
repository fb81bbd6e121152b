package devices

import (
	"context"
	"crypto/subtle"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/profile"
)

// embedded makes the node's own broker.
func (r *running) embedded() (mqtt.Broker, error) {
	cfg := r.part.cfg.MQTT
	var listeners []mqtt.ListenerConfig
	if cfg.Listen != off {
		listeners = append(listeners, mqtt.ListenerConfig{Address: cfg.Listen, Plaintext: cfg.Plaintext})
	}
	if cfg.PodListen != off && cfg.PodListen != "" && cfg.PodListen != cfg.Listen {
		// The address is of this machine's loopback interface, or the operator's
		// choice for pods; the link from pod to node is within the machine.
		listeners = append(listeners, mqtt.ListenerConfig{Address: cfg.PodListen, Plaintext: true})
	}
	if cfg.TLS.Listen != "" {
		listeners = append(listeners, mqtt.ListenerConfig{Address: cfg.TLS.Listen, TLS: &mqtt.TLSConfig{
			CertFile: cfg.TLS.Cert, KeyFile: cfg.TLS.Key, ClientCAFile: cfg.TLS.ClientCA,
		}})
	}
	who := mqtt.AnyOf{r.gate, mqtt.Tokens{Verify: r.gate.verifyPod}}
	if cfg.UsersFile != "" {
		passwords, err := mqtt.NewPasswords(cfg.UsersFile)
		if err != nil {
			return nil, err
		}
		who = append(who, passwords)
	}
	if cfg.TLS.ClientCA != "" {
		who = append(who, mqtt.Certificates{})
	}
	if *cfg.AnonymousLoopback {
		who = append(who, mqtt.Anonymous{})
	}
	return mqtt.NewEmbedded(mqtt.EmbeddedConfig{
		Listeners: listeners, Capture: r.capture, CaptureAll: r.captureAll, Auth: who, ACL: r.gate,
		Retained: ownRetained{r.db}, Sessions: r.gate.session, Log: r.log,
	})
}

func (r *running) external(url string) (mqtt.Broker, error) {
	cfg := r.externalConfig(url)
	cfg.Capture, cfg.OnState = r.capture, r.brokerChanged
	return mqtt.NewExternal(cfg)
}

func (r *running) externalConfig(url string) mqtt.ExternalConfig {
	cfg := r.part.cfg.MQTT
	return mqtt.ExternalConfig{
		URL: url, ClientID: cfg.ClientID, Node: r.part.cfg.NodeName, Username: cfg.Username, PasswordFile: cfg.PasswordFile,
		CAFile: cfg.CA, CertFile: cfg.Cert, KeyFile: cfg.Key, Log: r.log,
	}
}

// brokerChanged is told by an external broker's client: while there is no
// connection, nothing is known of who is there.
func (r *running) brokerChanged(s mqtt.State) {
	if r.connected.Swap(s.Connected) && !s.Connected {
		r.twins.Forget("MQTTNotConnected")
	}
}

// ownRetained keeps devices' retained messages, and not this node's own: those
// are told anew at each start.
type ownRetained struct{ db mqtt.RetainedDB }

func (o ownRetained) Load(bucket string, fn func(key string, value []byte) error) error {
	return o.db.Load(bucket, fn)
}

func (o ownRetained) Dirty(bucket, key string, encode func() []byte) {
	if !strings.HasPrefix(key, topicRoot) {
		o.db.Dirty(bucket, key, encode)
	}
}

// gate says who may do what at the embedded broker.
type gate struct {
	access Access
	table  *mqtt.ACLTable
	judged judgements

	sight func(devicetwin.Key, devicetwin.Sighting) // nil: nobody is told

	known atomic.Pointer[map[string]credentials] // by principal

	mu      sync.Mutex
	clients map[string]string // who a client is, by its id
}

// credentials are of one Device, from its Secret. A certificate is the DER of
// the device's.
type credentials struct {
	user, password string
	certificate    []byte
	devices        []devicetwin.Key // that are known by them
}

// anyUser holds what the operator's users may.
const anyUser = "*"

func newGate(access Access, local bool) *gate {
	g := &gate{access: access, clients: map[string]string{}}
	g.table = mqtt.NewACLTable(mqtt.ACLConfig{Local: local, Reserved: g.reserved})
	g.known.Store(&map[string]credentials{})
	return g
}

// set derives rights from the devices' mappings.
func (g *gate) set(node string, devices []devicetwin.Bound, secret func(namespace, name string) (map[string][]byte, bool)) error {
	grants, known := map[string]mqtt.Grants{}, map[string]credentials{}
	add := func(name string, publish, subscribe []string) {
		have := grants[name]
		have.Publish, have.Subscribe = append(have.Publish, publish...), append(have.Subscribe, subscribe...)
		grants[name] = have
	}
	var errs []error
	for _, b := range devices {
		publish, subscribe := profile.Filters(node, b)
		add(anyUser, publish, subscribe)
		name := b.Device.Spec.CredentialsSecret
		if name == "" {
			continue
		}
		data, ok := secret(b.Device.Namespace, name)
		if !ok {
			continue // it comes, or the device stays out
		}
		c := credentials{user: string(data["username"]), password: string(data["password"])}
		if block, _ := pem.Decode(data["certificate"]); block != nil {
			c.certificate = block.Bytes
		}
		if c.user == "" && c.certificate != nil {
			c.user = b.Device.Namespace + "/" + b.Device.Name
		}
		if c.user == "" || c.password == "" && c.certificate == nil {
			errs = append(errs, fmt.Errorf("device %s/%s: Secret %s has neither username and password nor certificate", b.Device.Namespace, b.Device.Name, name))
			continue
		}
		if other, twice := known[c.user]; twice && (other.password != c.password || string(other.certificate) != string(c.certificate)) {
			errs = append(errs, fmt.Errorf("device %s/%s: user %q is another device's too, with other credentials", b.Device.Namespace, b.Device.Name, c.user))
			continue
		}
		c.devices = append(known[c.user].devices, devicetwin.Key{Namespace: b.Device.Namespace, Name: b.Device.Name})
		known[c.user] = c
		add(c.user, publish, subscribe)
	}
	g.known.Store(&known)
	return errors.Join(append(errs, g.table.Set(grants))...)
}

// Authenticate implements mqtt.Authenticator for devices with a Secret.
func (g *gate) Authenticate(_ context.Context, c mqtt.Credentials) (mqtt.Principal, error) {
	known := *g.known.Load()
	if c.User != "" {
		have, ok := known[c.User]
		if !ok || have.password == "" {
			return mqtt.Principal{}, mqtt.ErrUnknownCredentials
		}
		if subtle.ConstantTimeCompare([]byte(have.password), c.Password) != 1 {
			return mqtt.Principal{}, mqtt.ErrBadCredentials
		}
		return mqtt.Principal{Kind: mqtt.PrincipalDevice, Name: c.User}, nil
	}
	if c.Certificate != nil {
		for name, have := range known {
			if have.certificate != nil && subtle.ConstantTimeCompare(have.certificate, c.Certificate.Raw) == 1 {
				return mqtt.Principal{Kind: mqtt.PrincipalDevice, Name: name}, nil
			}
		}
	}
	return mqtt.Principal{}, mqtt.ErrUnknownCredentials
}

func (g *gate) verifyPod(_ context.Context, token string) (mqtt.Principal, error) {
	who, err := g.access.Authenticate(token)
	if err != nil {
		return mqtt.Principal{}, fmt.Errorf("%w: %w", mqtt.ErrBadCredentials, err)
	}
	return mqtt.Principal{Name: who.GetName(), Data: who}, nil
}

// who names a client.
func (g *gate) who(client string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if name := g.clients[client]; name != "" {
		return name
	}
	return byMQTT
}

// session hears of clients that come and go; there are as many at once as the
// broker lets in. One that is known as a single device is evidence of its being
// there.
func (g *gate) session(s mqtt.Session) {
	g.mu.Lock()
	if s.Connected {
		g.clients[s.Client] = s.User
	} else {
		delete(g.clients, s.Client)
	}
	g.mu.Unlock()
	c, ok := (*g.known.Load())[s.User]
	if !ok || len(c.devices) != 1 || g.sight == nil {
		return
	}
	state := v1alpha1.PhaseOffline
	if s.Connected {
		state = v1alpha1.PhaseOnline
	}
	g.sight(c.devices[0], devicetwin.Sighting{Evidence: devicetwin.EvidenceSession, State: state})
}

// May implements mqtt.ACL.
func (g *gate) May(p mqtt.Principal, topic string, write bool) bool {
	if g.table.May(p, topic, write) {
		return true
	}
	if p.Kind != mqtt.PrincipalDevice || topic == strings.TrimSuffix(topicRoot, "/") || strings.HasPrefix(topic, topicRoot) {
		return false
	}
	if _, own := (*g.known.Load())[p.Name]; own {
		return false
	}
	return g.table.May(mqtt.Principal{Kind: p.Kind, Name: anyUser}, topic, write)
}

// reserved judges the API's topics, by RBAC: they are for pods.
func (g *gate) reserved(p mqtt.Principal, topic string, write bool) bool {
	who, ok := p.Data.(user.Info)
	if p.Kind != mqtt.PrincipalPod || !ok {
		return false
	}
	rest := strings.TrimPrefix(topic, topicRoot)
	parts := strings.Split(rest, "/")
	for _, part := range parts {
		if part == "" || strings.ContainsAny(part, "+#") {
			return false
		}
	}
	var r right
	switch {
	case len(parts) == 3 && parts[0] == "telemetry" && write:
		r = mayTelemeter
	case len(parts) < 3 || parts[0] != "twin":
		return false
	case write && len(parts) == 5 && parts[3] == "desired" && parts[4] == "set":
		r = maySet
	case write && len(parts) == 6 && parts[3] == "cmd":
		r = mayCommand
	case write:
		return false // those are this node's to publish
	default:
		r = mayGet
	}
	return g.judged.ask(r, who, parts[1], parts[2], func() bool {
		ok, _, err := g.access.Allowed(context.Background(), r.attributes(who, parts[1], parts[2]))
		return err == nil && ok
	})
}

// judgements are kept for a moment: the ACL is asked for each message.
type judgements struct {
	mu   sync.Mutex
	kept map[judgement]verdict
}

type judgement struct {
	right
	who, pod, namespace, name string
}

type verdict struct {
	ok bool
	at time.Time
}

const (
	judgedFor = 5 * time.Second
	maxJudged = 8192
)

func (j *judgements) ask(r right, who user.Info, namespace, name string, judge func() bool) bool {
	k := judgement{r, who.GetName(), who.GetUID(), namespace, name}
	now := time.Now()
	j.mu.Lock()
	v, ok := j.kept[k]
	j.mu.Unlock()
	if ok && now.Sub(v.at) < judgedFor {
		return v.ok
	}
	v = verdict{judge(), now}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.kept == nil || len(j.kept) >= maxJudged {
		j.kept = map[judgement]verdict{}
	}
	j.kept[k] = v
	return v.ok
}
