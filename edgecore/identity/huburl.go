package identity

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
)

// DefaultHubPort is the port a hub listens on unless told otherwise. It is
// meant when an address without a scheme names no port; https:// alone means
// 443, as everywhere.
const DefaultHubPort = "10443"

// ParseHubURL reads the address of a hub as people write it: an https URL
// without path, or just HOST or HOST:PORT.
func ParseHubURL(s string) (*url.URL, error) {
	text, defaultPort := strings.TrimSpace(s), "443"
	if text == "" {
		return nil, errors.New("the hub's URL is missing; give it as https://HOST:" + DefaultHubPort)
	}
	if !strings.Contains(text, "://") {
		if net.ParseIP(text) != nil && strings.Contains(text, ":") {
			text = "[" + text + "]" // an IPv6 address as it is
		}
		text, defaultPort = "https://"+text, DefaultHubPort
	}
	bad := func(why string) error {
		return fmt.Errorf("hub URL %q %s; give it as https://HOST:%s", s, why, DefaultHubPort)
	}
	u, err := url.Parse(text)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, bad("cannot be read: " + err.Error())
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "wss":
		return nil, bad(fmt.Sprintf("begins with %s://; a hub speaks https only", u.Scheme))
	case u.User != nil:
		return nil, bad("names a user; a hub knows nodes by certificate only")
	case u.Hostname() == "":
		return nil, bad("names no host")
	case strings.ContainsAny(u.Hostname(), " \t/\\"):
		return nil, bad("names no host")
	case u.Path != "" && u.Path != "/":
		return nil, bad("has a path; the hub's address has none")
	case u.RawQuery != "" || u.Fragment != "":
		return nil, bad("has a query or fragment; the hub's address has none")
	}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return nil, bad("has port " + port + ", which is not within 1 to 65535")
	}
	return &url.URL{Scheme: "https", Host: net.JoinHostPort(strings.ToLower(u.Hostname()), port)}, nil
}
