package kubelet

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrAddressChanged ends Run when the address the node was started with is gone
// and another one can be reported: the kubelet takes its address at start only,
// so the process must be restarted, at once and without backoff. Pods do not
// notice.
var ErrAddressChanged = errors.New("kubelet: the node's address changed; restart the process")

// ChooseAddress picks the address the node reports, or nil when no interface
// has one that can be reported.
//
// The kubelet would look the node's name up in DNS before every status update
// and then insist on a default route. Offline, the first costs up to half a
// minute each time and the second leaves the node without an address, its
// hostNetwork pods without an IP. So the address is chosen here, from the
// interfaces alone, best first:
//
//  1. the interface of the default route with the lowest metric;
//  2. interfaces of real hardware, in the kernel's order;
//  3. other interfaces, but for those a container network makes.
//
// IPv4 comes before IPv6. Loopback and link-local addresses are never chosen;
// the kubelet refuses them.
func ChooseAddress() (net.IP, error) {
	links, err := listLinks()
	if err != nil {
		return nil, fmt.Errorf("kubelet: choose the node's address: %w", err)
	}
	return choose(links), nil
}

// link is an interface that is up, as far as the choice needs it.
type link struct {
	name         string
	hardware     bool // backed by a device
	defaultRoute bool
	metric       uint32 // of the default route
	addresses    []net.IP
}

func choose(links []link) net.IP {
	ranked := slices.Clone(links)
	slices.SortStableFunc(ranked, func(a, b link) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.metric, b.metric))
	})
	for _, v4 := range []bool{true, false} {
		for _, l := range ranked {
			if l.rank() == rankContainers {
				continue
			}
			for _, ip := range l.addresses {
				if (ip.To4() != nil) == v4 && reportable(ip) {
					return ip
				}
			}
		}
	}
	return nil
}

const (
	rankDefaultRoute = iota
	rankHardware
	rankVirtual
	rankContainers
)

func (l link) rank() int {
	switch {
	case l.defaultRoute:
		return rankDefaultRoute
	case l.hardware:
		return rankHardware
	case slices.ContainsFunc(containerLinks, func(p string) bool { return strings.HasPrefix(l.name, p) }):
		return rankContainers
	}
	return rankVirtual
}

// containerLinks begin the names of interfaces that container networks make;
// their addresses are the same on every node.
var containerLinks = []string{"cni", "veth", "docker", "podman", "flannel", "cali", "cilium", "lxc", "virbr", "kube-", "nerdctl", "weave", "ovn", "dummy"}

func present(ip net.IP, links []link) bool {
	return slices.ContainsFunc(links, func(l link) bool { return slices.ContainsFunc(l.addresses, ip.Equal) })
}

func reportable(ip net.IP) bool {
	return ip.IsGlobalUnicast() // excludes loopback, multicast, link-local and unspecified
}

func listLinks() ([]link, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	routes := defaultRoutes(hostAt("/"))
	var links []link
	for _, i := range interfaces {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		l := link{name: i.Name}
		l.metric, l.defaultRoute = routes[i.Name]
		_, err := os.Stat(filepath.Join("/sys/class/net", i.Name, "device"))
		l.hardware = err == nil
		addrs, err := i.Addrs()
		if err != nil {
			continue // the interface went away meanwhile
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				l.addresses = append(l.addresses, n.IP)
			}
		}
		links = append(links, l)
	}
	return links, nil
}

// defaultRoutes maps interfaces to the lowest metric of their default routes.
func defaultRoutes(h host) map[string]uint32 {
	routes := make(map[string]uint32)
	note := func(name string, metric uint32) {
		if old, ok := routes[name]; !ok || metric < old {
			routes[name] = metric
		}
	}
	// Iface Destination Gateway Flags RefCnt Use Metric Mask ...
	if text, err := h.read("/proc/net/route"); err == nil {
		for f := range fields(text, 8) {
			metric, err := strconv.ParseUint(f[6], 10, 32)
			if err == nil && f[1] == "00000000" && f[7] == "00000000" && f[0] != "lo" {
				note(f[0], uint32(metric))
			}
		}
	}
	// destination prefixlen source prefixlen nexthop metric refcnt use flags iface
	if text, err := h.read("/proc/net/ipv6_route"); err == nil {
		for f := range fields(text, 10) {
			metric, err := strconv.ParseUint(f[5], 16, 32)
			if err == nil && f[0] == strings.Repeat("0", 32) && f[1] == "00" && f[9] != "lo" {
				note(f[9], uint32(metric))
			}
		}
	}
	return routes
}

// fields yields the lines of a kernel table that have at least n fields.
func fields(text string, n int) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
			if f := strings.Fields(s.Text()); len(f) >= n && !yield(f) {
				return
			}
		}
	}
}

// chooseAddress is the configured address, or the chosen one.
func (k *Kubelet) chooseAddress() net.IP {
	if k.cfg.NodeIP != nil {
		return k.cfg.NodeIP
	}
	ip, err := ChooseAddress()
	switch {
	case err != nil:
		k.cfg.Log.Warn("node address", "err", err)
	case ip == nil:
		k.cfg.Log.Warn("no interface has an address to report; the node starts without one and is restarted when one appears")
	default:
		k.cfg.Log.Info("node address chosen", "address", ip)
	}
	return ip
}

const (
	addressPeriod = 15 * time.Second
	// addressSettle is how long another address must have been the choice:
	// long enough for a cable that is moved or a DHCP lease that is renewed.
	addressSettle = time.Minute
)

// watchAddress cancels with ErrAddressChanged when the address the kubelet was
// started with is on no interface any more and another one has been there for
// addressSettle. An address that is gone without another is kept: the kubelet
// goes on reporting it.
func (k *Kubelet) watchAddress(ctx context.Context, current net.IP, cancel context.CancelCauseFunc) {
	if k.cfg.NodeIP != nil {
		return
	}
	tick := time.NewTicker(k.addressPeriod)
	defer tick.Stop()
	w := addressWatch{current: current, settle: k.addressSettle}
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			links, err := listLinks()
			if err != nil {
				continue
			}
			if next := w.look(links, now); next != nil {
				k.cfg.Log.Warn("the node's address changed", "from", current, "to", next)
				cancel(fmt.Errorf("%w: from %v to %v", ErrAddressChanged, current, next))
				return
			}
		}
	}
}

// addressWatch decides when another address has settled.
type addressWatch struct {
	current   net.IP
	settle    time.Duration
	candidate net.IP
	since     time.Time
}

// look returns the address to change to, once it has settled.
func (w *addressWatch) look(links []link, now time.Time) net.IP {
	next := choose(links)
	if next == nil || (w.current != nil && present(w.current, links)) {
		w.candidate = nil
		return nil
	}
	if !next.Equal(w.candidate) {
		w.candidate, w.since = next, now
		return nil
	}
	if now.Sub(w.since) < w.settle {
		return nil
	}
	return next
}
