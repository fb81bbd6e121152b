package mqtt

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// Directions of a BridgeTopic.
const (
	BridgeOut  = "out"  // from here to the remote broker
	BridgeIn   = "in"   // from there to here
	BridgeBoth = "both" // each way
)

// BridgeTopic is what one topic line of mosquitto's configuration says: what
// matches Pattern behind the prefix of one side is published behind the prefix
// of the other, at QoS or less.
type BridgeTopic struct {
	Pattern      string // "": exactly LocalPrefix and RemotePrefix
	Direction    string
	QoS          byte
	LocalPrefix  string
	RemotePrefix string
}

// ParseBridgeTopic reads
//
//	topic <pattern> [[[out|in|both] qos] local-prefix remote-prefix]
//
// The word topic may be left out. "" stands for nothing.
func ParseBridgeTopic(line string) (BridgeTopic, error) {
	fields := strings.Fields(line)
	if len(fields) > 0 && fields[0] == "topic" {
		fields = fields[1:]
	}
	if len(fields) == 0 {
		return BridgeTopic{}, errors.New("a topic line without a pattern")
	}
	if len(fields) > 5 {
		return BridgeTopic{}, fmt.Errorf("topic line %q: %d words after topic, and 5 are the most", line, len(fields))
	}
	word := func(i int) string {
		if i >= len(fields) || fields[i] == `""` {
			return ""
		}
		return fields[i]
	}
	t := BridgeTopic{Pattern: word(0), Direction: BridgeOut, LocalPrefix: word(3), RemotePrefix: word(4)}
	if len(fields) > 1 {
		t.Direction = word(1)
	}
	if len(fields) > 2 {
		qos, err := strconv.ParseUint(fields[2], 10, 8)
		if err != nil || qos > 2 {
			return BridgeTopic{}, fmt.Errorf("topic line %q: QoS %q: it must be 0, 1 or 2", line, fields[2])
		}
		t.QoS = byte(qos)
	}
	if err := t.check(); err != nil {
		return BridgeTopic{}, fmt.Errorf("topic line %q: %w", line, err)
	}
	return t, nil
}

// String is the line.
func (t BridgeTopic) String() string {
	word := func(s string) string {
		if s == "" {
			return `""`
		}
		return s
	}
	return fmt.Sprintf("topic %s %s %d %s %s", word(t.Pattern), t.Direction, t.QoS, word(t.LocalPrefix), word(t.RemotePrefix))
}

func (t BridgeTopic) check() error {
	switch t.Direction {
	case BridgeOut, BridgeIn, BridgeBoth:
	default:
		return fmt.Errorf("direction %q: it must be out, in or both", t.Direction)
	}
	if t.QoS > 2 {
		return fmt.Errorf("there is no QoS %d", t.QoS)
	}
	for _, prefix := range []string{t.LocalPrefix, t.RemotePrefix} {
		if strings.ContainsAny(prefix, "+#") {
			return fmt.Errorf("prefix %q has a wildcard", prefix)
		}
	}
	if t.Pattern == "" && (t.LocalPrefix == "" || t.RemotePrefix == "") {
		return errors.New(`with the pattern "" both prefixes are topics and must be there`)
	}
	if err := CheckFilter(t.local()); err != nil {
		return err
	}
	return CheckFilter(t.remote())
}

func (t BridgeTopic) local() string  { return t.LocalPrefix + t.Pattern }
func (t BridgeTopic) remote() string { return t.RemotePrefix + t.Pattern }

func (t BridgeTopic) out() bool { return t.Direction != BridgeIn }
func (t BridgeTopic) in() bool  { return t.Direction != BridgeOut }

// toRemote is what a local topic is called there; false: it does not match.
func (t BridgeTopic) toRemote(topic string) (string, bool) {
	if !Match(t.local(), topic) {
		return "", false
	}
	return t.RemotePrefix + topic[len(t.LocalPrefix):], true
}

// toLocal is what a remote topic is called here; false: it does not match.
func (t BridgeTopic) toLocal(topic string) (string, bool) {
	if !Match(t.remote(), topic) {
		return "", false
	}
	return t.LocalPrefix + topic[len(t.RemotePrefix):], true
}

// BridgeSpec is a bridge as mosquitto's configuration puts it.
type BridgeSpec struct {
	Name   string // connection
	URL    string // of address, and whether there is TLS
	Topics []BridgeTopic

	ClientID     string // remote_clientid
	Username     string // remote_username
	Password     string // remote_password
	CAFile       string // bridge_cafile
	CertFile     string // bridge_certfile
	KeyFile      string // bridge_keyfile
	CleanSession bool   // cleansession: of the session there
	// LocalCleanSession: what comes while there is no connection is not kept;
	// what cleansession is, if it is not said.
	LocalCleanSession bool
	KeepAlive         time.Duration // keepalive_interval

	NoNotifications   bool   // notifications false
	NotificationTopic string // notification_topic
	NotificationsHere bool   // notifications_local_only

	Lazy        bool          // start_type lazy
	IdleTimeout time.Duration // idle_timeout
	Threshold   int           // threshold
	MinRestart  time.Duration // restart_timeout, its base
	MaxRestart  time.Duration // and its cap
	NoPrivate   bool          // try_private false
	MaxInFlight int           // max_inflight_messages
	localsaid   bool          // local_cleansession was there
}

// maxBridgeConfig bounds what ParseBridges reads.
const maxBridgeConfig = 1 << 20

// ParseBridges reads the bridges of a mosquitto configuration: each connection
// line and what follows it. What stands before the first, or is not of bridges,
// is an error, as is an option that is not carried.
func ParseBridges(r io.Reader) ([]BridgeSpec, error) {
	var specs []BridgeSpec
	lines := bufio.NewScanner(io.LimitReader(r, maxBridgeConfig))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		key, value, _ := strings.Cut(line, " ")
		value = strings.TrimSpace(value)
		if key == "connection" {
			if value == "" {
				return nil, fmt.Errorf("line %d: a connection without a name", n)
			}
			specs = append(specs, BridgeSpec{Name: value})
			continue
		}
		if len(specs) == 0 {
			return nil, fmt.Errorf("line %d: %s stands before the first connection", n, key)
		}
		if err := specs[len(specs)-1].set(key, value); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	for i := range specs {
		if err := specs[i].complete(); err != nil {
			return nil, fmt.Errorf("connection %s: %w", specs[i].Name, err)
		}
	}
	return specs, nil
}

func (s *BridgeSpec) set(key, value string) (err error) {
	switch key {
	case "address", "addresses":
		if strings.ContainsAny(value, " \t") {
			return errors.New("more than one address: one is carried; use a name that has several")
		}
		if s.URL, err = bridgeAddress(value); err != nil {
			return err
		}
	case "topic":
		t, err := ParseBridgeTopic(value)
		if err != nil {
			return err
		}
		s.Topics = append(s.Topics, t)
	case "remote_clientid", "clientid":
		s.ClientID = value
	case "remote_username", "username":
		s.Username = value
	case "remote_password", "password":
		s.Password = value
	case "bridge_cafile":
		s.CAFile = value
	case "bridge_certfile":
		s.CertFile = value
	case "bridge_keyfile":
		s.KeyFile = value
	case "cleansession":
		s.CleanSession, err = parseBool(value)
	case "local_cleansession":
		s.localsaid = true
		s.LocalCleanSession, err = parseBool(value)
	case "notifications":
		var on bool
		on, err = parseBool(value)
		s.NoNotifications = !on
	case "notification_topic":
		s.NotificationTopic = value
		err = CheckTopic(value)
	case "notifications_local_only":
		s.NotificationsHere, err = parseBool(value)
	case "try_private":
		var on bool
		on, err = parseBool(value)
		s.NoPrivate = !on
	case "start_type":
		switch value {
		case "automatic":
		case "lazy":
			s.Lazy = true
		default:
			return fmt.Errorf("start_type %q: it must be automatic or lazy", value)
		}
	case "keepalive_interval":
		s.KeepAlive, err = parseSeconds(value)
	case "idle_timeout":
		s.IdleTimeout, err = parseSeconds(value)
	case "threshold":
		s.Threshold, err = parseCount(value)
	case "max_inflight_messages":
		s.MaxInFlight, err = parseCount(value)
	case "restart_timeout":
		base, limit, both := strings.Cut(value, " ")
		if s.MinRestart, err = parseSeconds(base); err == nil {
			s.MaxRestart = s.MinRestart
			if both {
				s.MaxRestart, err = parseSeconds(strings.TrimSpace(limit))
			}
		}
		if err == nil && s.MaxRestart < s.MinRestart {
			err = errors.New("its cap is less than its base")
		}
	case "bridge_insecure", "bridge_tls_insecure":
		var on bool
		if on, err = parseBool(value); on {
			err = errors.New("the other broker's certificate is always verified: take it out, and name its CA in bridge_cafile")
		}
	case "bridge_protocol_version":
		if value != "mqttv311" {
			err = errors.New("mqttv311 is what is spoken")
		}
	default:
		return fmt.Errorf("%s is not an option of bridges that is carried", key)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", key, value, err)
	}
	return nil
}

func (s *BridgeSpec) complete() error {
	switch {
	case s.URL == "":
		return errors.New("no address")
	case len(s.Topics) == 0:
		return errors.New("no topic")
	}
	if s.CAFile != "" || s.CertFile != "" {
		s.URL = "mqtts" + strings.TrimPrefix(s.URL, "mqtt")
	}
	if !s.localsaid {
		s.LocalCleanSession = s.CleanSession
	}
	return nil
}

// Carries says whether messages go in a direction, out or in.
func (s BridgeSpec) Carries(direction string) bool {
	for _, t := range s.Topics {
		if t.Direction == direction || t.Direction == BridgeBoth {
			return true
		}
	}
	return false
}

// Config is the bridge on a node, but for its local broker and its queues.
func (s BridgeSpec) Config(node string) BridgeConfig {
	remote := ExternalConfig{
		URL: s.URL, ClientID: s.ClientID, Username: s.Username, Password: s.Password,
		CAFile: s.CAFile, CertFile: s.CertFile, KeyFile: s.KeyFile,
		CleanSession: s.CleanSession, KeepAlive: s.KeepAlive,
		MinBackoff: s.MinRestart, MaxBackoff: s.MaxRestart, Window: s.MaxInFlight,
	}
	if remote.ClientID == "" {
		remote.ClientID, remote.Node = s.Name, node
	}
	return BridgeConfig{
		Name: s.Name, Topics: s.Topics, Remote: remote, NoPrivate: s.NoPrivate, LocalCleanSession: s.LocalCleanSession,
		NoNotifications: s.NoNotifications, NotificationTopic: s.NotificationTopic, NotificationsHere: s.NotificationsHere,
		Lazy: s.Lazy, IdleTimeout: s.IdleTimeout, Threshold: s.Threshold,
	}
}

// bridgeAddress makes a URL of host[:port].
func bridgeAddress(value string) (string, error) {
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		host, port = value, "1883"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("address %s: port %q", value, port)
	}
	address := "mqtt://" + net.JoinHostPort(strings.Trim(host, "[]"), port)
	if _, err := brokerURL(address); err != nil {
		return "", err
	}
	return address, nil
}

func parseBool(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, errors.New("it must be true or false")
}

func parseCount(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, errors.New("it must be a number from 1 to 65535")
	}
	return int(n), nil
}

func parseSeconds(s string) (time.Duration, error) {
	n, err := parseCount(s)
	return time.Duration(n) * time.Second, err
}
