package kubelet

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func ips(all ...string) []net.IP {
	var parsed []net.IP
	for _, s := range all {
		parsed = append(parsed, net.ParseIP(s))
	}
	return parsed
}

func TestChoose(t *testing.T) {
	for name, c := range map[string]struct {
		links []link
		want  string
	}{
		"nothing": {nil, ""},
		"default route wins": {[]link{
			{name: "eth0", hardware: true, addresses: ips("10.0.0.5")},
			{name: "wwan0", hardware: true, defaultRoute: true, addresses: ips("100.70.1.2")},
		}, "100.70.1.2"},
		"lower metric wins": {[]link{
			{name: "wlan0", defaultRoute: true, metric: 600, addresses: ips("192.168.1.9")},
			{name: "eth0", defaultRoute: true, metric: 100, addresses: ips("192.168.1.8")},
		}, "192.168.1.8"},
		"no default route": {[]link{
			{name: "tailscale0", addresses: ips("100.100.1.1")},
			{name: "eth0", hardware: true, addresses: ips("10.0.0.5")},
		}, "10.0.0.5"},
		"container networks never": {[]link{
			{name: "cni0", addresses: ips("10.244.0.1")},
			{name: "docker0", addresses: ips("172.17.0.1")},
		}, ""},
		"bridge of the user's": {[]link{
			{name: "cni0", addresses: ips("10.244.0.1")},
			{name: "br-lan", addresses: ips("192.168.8.1")},
		}, "192.168.8.1"},
		"IPv4 before IPv6": {[]link{
			{name: "eth0", defaultRoute: true, addresses: ips("2001:db8::5")},
			{name: "eth1", hardware: true, addresses: ips("10.0.0.5")},
		}, "10.0.0.5"},
		"IPv6 alone": {[]link{
			{name: "eth0", hardware: true, addresses: ips("fe80::1", "2001:db8::5")},
		}, "2001:db8::5"},
		"link-local never": {[]link{
			{name: "eth0", hardware: true, addresses: ips("169.254.3.4", "fe80::1")},
		}, ""},
		"cable out, address kept": {[]link{
			{name: "eth0", hardware: true, addresses: nil},
			{name: "wlan0", hardware: true, addresses: ips("192.168.1.9")},
		}, "192.168.1.9"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := choose(c.links); !got.Equal(net.ParseIP(c.want)) {
				t.Errorf("chose %v, want %q", got, c.want)
			}
		})
	}
}

func TestDefaultRoutesOfProc(t *testing.T) {
	root := fixture(t, map[string]string{
		"proc/net/route": `Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	010200C0	0003	0	0	100	00000000	0	0	0
wlan0	00000000	0101A8C0	0003	0	0	600	00000000	0	0	0
wlan0	00000000	0101A8C0	0003	0	0	50	00000000	0	0	0
eth0	000200C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
`,
		"proc/net/ipv6_route": `00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003   wwan0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001   eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200      lo
`,
	})
	got := defaultRoutes(hostAt(root))
	want := map[string]uint32{"eth0": 100, "wlan0": 50, "wwan0": 1024}
	if len(got) != len(want) {
		t.Errorf("routes %v, want %v", got, want)
	}
	for name, metric := range want {
		if got[name] != metric {
			t.Errorf("%s: metric %d, want %d", name, got[name], metric)
		}
	}
}

func TestAddressWatch(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	eth := []link{{name: "eth0", hardware: true, addresses: ips("10.0.0.5")}}
	wlan := []link{{name: "wlan0", hardware: true, addresses: ips("192.168.1.9")}}

	t.Run("gone without another", func(t *testing.T) {
		w := addressWatch{current: net.ParseIP("10.0.0.5"), settle: addressSettle}
		for i := range 100 {
			if got := w.look(nil, start.Add(time.Duration(i)*addressPeriod)); got != nil {
				t.Fatalf("changes to %v", got)
			}
		}
	})
	t.Run("still there beside a better one", func(t *testing.T) {
		w := addressWatch{current: net.ParseIP("10.0.0.5"), settle: addressSettle}
		both := append([]link{{name: "wwan0", defaultRoute: true, addresses: ips("100.64.9.9")}}, eth...)
		for i := range 100 {
			if got := w.look(both, start.Add(time.Duration(i)*addressPeriod)); got != nil {
				t.Fatalf("changes to %v", got)
			}
		}
	})
	t.Run("another settles", func(t *testing.T) {
		w := addressWatch{current: net.ParseIP("10.0.0.5"), settle: addressSettle}
		if got := w.look(wlan, start); got != nil {
			t.Fatalf("changes at once to %v", got)
		}
		if got := w.look(wlan, start.Add(addressSettle-time.Second)); got != nil {
			t.Fatalf("changes too early to %v", got)
		}
		if got := w.look(wlan, start.Add(addressSettle)); !got.Equal(net.ParseIP("192.168.1.9")) {
			t.Fatalf("changes to %v", got)
		}
	})
	t.Run("comes back before another settles", func(t *testing.T) {
		w := addressWatch{current: net.ParseIP("10.0.0.5"), settle: addressSettle}
		w.look(wlan, start)
		w.look(eth, start.Add(addressSettle/2))
		if got := w.look(wlan, start.Add(addressSettle)); got != nil {
			t.Fatalf("the time before was counted: changes to %v", got)
		}
	})
	t.Run("first address appears", func(t *testing.T) {
		w := addressWatch{settle: addressSettle}
		w.look(nil, start)
		w.look(eth, start.Add(time.Minute))
		if got := w.look(eth, start.Add(time.Minute+addressSettle)); !got.Equal(net.ParseIP("10.0.0.5")) {
			t.Fatalf("changes to %v", got)
		}
	})
}

func TestCheckAddress(t *testing.T) {
	eth := []link{{name: "eth0", hardware: true, addresses: ips("10.0.0.5")}}
	wants(t, checkAddress(nil, eth), "", "", "", "")
	wants(t, checkAddress(net.ParseIP("10.0.0.5"), eth), "", "", "", "")
	wants(t, checkAddress(nil, nil), Warning, "node address", "no interface has an address", "bring an interface up")
	wants(t, checkAddress(net.ParseIP("10.0.0.6"), eth), Warning, "node address", "10.0.0.6 is on no interface", "node.ip")
}

// fixture makes files below a root of its own.
func fixture(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}
