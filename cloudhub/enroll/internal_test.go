package enroll

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func TestIPPool(t *testing.T) {
	for _, c := range []struct {
		prefix, first, last string
		size                uint64
	}{
		{"100.64.0.0/16", "100.64.0.1", "100.64.255.254", 65534},
		{"10.0.0.248/30", "10.0.0.249", "10.0.0.250", 2},
		{"100.64.0.0/10", "100.64.0.1", "100.127.255.254", 1<<22 - 2},
		{"fd00:5::/64", "fd00:5::1", "fd00:5::100:0", maxPool},
	} {
		p := newIPPool(netip.MustParsePrefix(c.prefix))
		if p.size != c.size || p.at(1).String() != c.first || p.at(p.size).String() != c.last {
			t.Errorf("%s: %d addresses from %s to %s, want %d from %s to %s", c.prefix, p.size, p.at(1), p.at(p.size), c.size, c.first, c.last)
		}
		for _, off := range []uint64{1, 2, p.size} {
			if got, ok := p.offset(p.at(off)); !ok || got != off {
				t.Errorf("%s: offset of %s is %d, want %d", c.prefix, p.at(off), got, off)
			}
		}
	}
}

func TestIPPoolRotates(t *testing.T) {
	p := newIPPool(netip.MustParsePrefix("10.0.0.0/29")) // .1 to .6
	taken := map[netip.Addr]bool{netip.MustParseAddr("10.0.0.5"): true}
	p.startAfter([]netip.Addr{netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("192.0.2.1")})
	var got []string
	for {
		ip, ok := p.next(func(ip netip.Addr) bool { return taken[ip] })
		if !ok {
			break
		}
		taken[ip] = true
		got = append(got, ip.String())
	}
	if want := "[10.0.0.4 10.0.0.6 10.0.0.1 10.0.0.2 10.0.0.3]"; fmt.Sprint(got) != want {
		t.Errorf("proposed %v, want %s", got, want)
	}
}

func TestClaimNames(t *testing.T) {
	for _, s := range []string{"100.64.0.7", "fd00::1:0", "fd00:1::"} {
		ip := netip.MustParseAddr(s)
		if got, ok := claimedAddress(claimName(ip)); !ok || got != ip {
			t.Errorf("%s is claimed as %s, which is read as %s", ip, claimName(ip), got)
		}
	}
}

func TestLimitersAreBounded(t *testing.T) {
	l := newLimiters(rate.Limit(1), 2)
	now := time.Now()
	for i := range 3 * maxLimiters {
		l.allow(fmt.Sprint(i), now)
	}
	if len(l.byName) > maxLimiters {
		t.Errorf("%d callers are remembered, more than %d", len(l.byName), maxLimiters)
	}
	if l.allow("newcomer", now) {
		t.Error("a flood from many addresses does not use up the shared bucket")
	}
	later := now.Add(time.Minute)
	if !l.allow("newcomer", later) || !l.allow("newcomer", later) || l.allow("newcomer", later) {
		t.Error("after the flood a caller does not get exactly its burst")
	}
}

func TestAddressKey(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:5000":           "192.0.2.1",
		"[::ffff:192.0.2.1]:5000":  "192.0.2.1",
		"[2001:db8:1:2:3::4]:5000": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:5000":      "fe80::/64",
	} {
		if got := addressKey(in); got != want {
			t.Errorf("%s is limited as %s, want %s", in, got, want)
		}
	}
}

func TestRefusalsAreBounded(t *testing.T) {
	m, now := newRefusals(), time.Now()
	for i := range 2 * maxRefusals {
		m.put(fmt.Sprint(i), "key", now, ErrNoNode)
	}
	if len(m.seen) > maxRefusals {
		t.Errorf("%d refusals are remembered, more than %d", len(m.seen), maxRefusals)
	}
	if m.get("1", "key", now) == nil || m.get("1", "key", now.Add(refusalTTL)) != nil {
		t.Error("a refusal is not remembered for exactly its time")
	}
}

// An older state that arrives late must not undo a newer one.
func TestIndexKeepsNewest(t *testing.T) {
	x := newIndex()
	ip := netip.MustParseAddr("100.64.0.1")
	x.put(NodeRecord{Name: "a", Enrollment: "2", VirtualIP: ip}, "20")
	x.put(NodeRecord{Name: "a", Enrollment: "1", VirtualIP: ip}, "10")
	if rec, _ := x.node("a"); rec.Enrollment != "2" {
		t.Errorf("enrollment %s is in the index, want 2", rec.Enrollment)
	}
}

func FuzzJoinRequest(f *testing.F) {
	f.Add([]byte(`{"tokenID":"abcdefgh","tokenSecret":"x","nodeName":"edge-7","csr":"MIIB"}`))
	f.Add([]byte(`{} {}`))
	f.Add([]byte(`{"nodeName":"\u0000"}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := decodeJoin(bytes.NewReader(body))
		if err != nil {
			return
		}
		attempt, err := req.check()
		if err != nil {
			return
		}
		if err := checkNodeName(attempt.node); err != nil {
			t.Errorf("node name %q passed: %v", attempt.node, err)
		}
		if err := checkKey(attempt.pub); err != nil {
			t.Errorf("key passed: %v", err)
		}
	})
}

func FuzzRecords(f *testing.F) {
	rec := NodeRecord{Name: "edge-7", Enrollment: "e", Key: "k", VirtualIP: netip.MustParseAddr("100.64.0.1")}
	body, err := json.Marshal(rec)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{"hash":"","uses":-1}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		secret, err := NodeRecord{Name: "edge-7"}.encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		secret.Data[nodeField] = body
		if rec, err := decodeNode(secret); err == nil && (rec.Name != "edge-7" || rec.Key == "" || !rec.VirtualIP.IsValid()) {
			t.Errorf("a record without %+v passed", rec)
		}
		secret.Name, secret.Data[tokenField] = tokenPrefix+"abcdefgh", body
		if state, err := decodeToken(secret); err == nil && (state.Hash == "" || state.Uses == 0) {
			t.Errorf("a token %+v passed", state)
		}
	})
}

func TestNodeNames(t *testing.T) {
	long := string(bytes.Repeat([]byte("a"), 64))
	for name, ok := range map[string]bool{
		"edge-7": true, "edge-7.berlin.example": true, "7": true, long[:63]: true,
		"": false, "Edge": false, "edge_7": false, "-edge": false, "edge.": false, "a b": false, "../x": false, long: false,
	} {
		err := checkNodeName(name)
		if (err == nil) != ok {
			t.Errorf("node name %q: %v", name, err)
		}
		if err != nil && err.(*edgeapi.JoinError).Code != edgeapi.JoinBadName {
			t.Errorf("node name %q is refused as %v", name, err)
		}
	}
}
