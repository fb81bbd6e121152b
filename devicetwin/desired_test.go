package devicetwin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// desiredAt is a Device whose desired property was set at that time.
func desiredAt(gen int64, property, v string, at time.Time) *v1alpha1.Device {
	d := trvDevice(gen, map[string]string{property: v})
	times, _ := json.Marshal(map[string]time.Time{property: at})
	d.Annotations = map[string]string{v1alpha1.AnnotationDesiredTimes: string(times)}
	return d
}

// Each row of the package doc's table, away from the hub.
func TestConflicts(t *testing.T) {
	for _, c := range []struct {
		name      string
		property  string
		authority string
		local     string
		spec      func(local time.Time) *v1alpha1.Device // what comes after the local write
		want      string
		overrides bool
		event     string
	}{
		{name: "cloud, spec as is", property: "setpoint", local: "25",
			spec: func(time.Time) *v1alpha1.Device { return trvDevice(2, map[string]string{"setpoint": "20"}) }, want: "25", overrides: true},
		{name: "cloud, changed too", property: "setpoint", local: "25",
			spec: func(time.Time) *v1alpha1.Device { return trvDevice(3, map[string]string{"setpoint": "18"}) }, want: "18", event: ReasonDesiredConflict},
		{name: "cloud, taken out", property: "setpoint", local: "25",
			spec: func(time.Time) *v1alpha1.Device { return trvDevice(3, nil) }, want: "", event: ReasonDesiredConflict},
		{name: "cloud, another changed", property: "setpoint", local: "25",
			spec: func(time.Time) *v1alpha1.Device {
				return trvDevice(3, map[string]string{"setpoint": "20", "boost": "7"})
			}, want: "25", overrides: true},
		{name: "edge, changed too", property: "mode", local: `"off"`,
			spec: func(time.Time) *v1alpha1.Device { return trvDevice(3, map[string]string{"mode": `"eco"`}) }, want: `"off"`, overrides: true, event: ReasonDesiredConflict},
		{name: "lww, the cloud later", property: "boost", local: "5",
			spec: func(at time.Time) *v1alpha1.Device { return desiredAt(3, "boost", "9", at.Add(time.Second)) }, want: "9", event: ReasonDesiredConflict},
		{name: "lww, the node later", property: "boost", local: "5",
			spec: func(at time.Time) *v1alpha1.Device { return desiredAt(3, "boost", "9", at.Add(-time.Second)) }, want: "5", overrides: true, event: ReasonDesiredConflict},
		{name: "lww, a tie", property: "boost", local: "5",
			spec: func(at time.Time) *v1alpha1.Device { return desiredAt(3, "boost", "9", at) }, want: "9", event: ReasonDesiredConflict},
		{name: "generation went back, cloud", property: "setpoint", local: "25",
			spec: func(time.Time) *v1alpha1.Device { return trvDevice(1, map[string]string{"setpoint": "20"}) }, want: "20", event: ReasonGenerationWentBack},
		{name: "generation went back, edge", property: "mode", local: `"off"`,
			spec: func(time.Time) *v1alpha1.Device { return trvDevice(1, map[string]string{"mode": `"heat"`}) }, want: `"heat"`, event: ReasonGenerationWentBack},
		{name: "another UID", property: "mode", local: `"off"`,
			spec: func(time.Time) *v1alpha1.Device {
				d := trvDevice(1, map[string]string{"mode": `"heat"`})
				d.UID = "u2"
				return d
			}, want: `"heat"`},
	} {
		// With the power gone between the two or not, the answer is the same.
		for _, reboot := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, reboot %v", c.name, reboot), func(t *testing.T) {
				virtual(t, func(r *rig) {
					before := map[string]string{"setpoint": "20", "mode": `"heat"`}
					r.set(trvDevice(2, before))
					time.Sleep(time.Hour)
					local := time.Now()
					if res := r.patch(c.property, c.local); res.Code != 200 || res.State != v1alpha1.DesiredApplied {
						t.Fatalf("%+v", res)
					}
					r.want(c.property, c.local, v1alpha1.DesiredApplied)
					if reboot {
						r.reboot()
						r.set(trvDevice(2, before))
						if p := r.doc().Properties[c.property]; string(p.Want) != c.local {
							t.Errorf("after the reboot %s is wanted", p.Want)
						}
					}
					d := c.spec(local)
					for p, v := range before {
						// The row is about one property: the other one stays.
						if _, ok := d.Spec.Desired[p]; !ok && p != c.property {
							if d.Spec.Desired == nil {
								d.Spec.Desired = make(map[string]v1alpha1.JSON)
							}
							d.Spec.Desired[p] = v1alpha1.JSON{Raw: []byte(v)}
						}
					}
					r.set(d)
					time.Sleep(time.Minute)
					p := r.doc().Properties[c.property]
					if string(p.Want) != c.want || (p.Override != nil) != c.overrides {
						t.Errorf("wanted %s, override %+v; expected %s", p.Want, p.Override, c.want)
					}
					if c.event != "" && !r.hadEvent(c.event) {
						t.Errorf("no event %s: %v", c.event, r.events)
					}
					if c.want != "" && string(p.Reported.Value) != c.want {
						t.Errorf("the device has %s", p.Reported.Value)
					}
					// What is on the disk says the same.
					r.reboot()
					r.set(d)
					if p := r.doc().Properties[c.property]; string(p.Want) != c.want || (p.Override != nil) != c.overrides {
						t.Errorf("after a reboot: wanted %s, override %+v; expected %s", p.Want, p.Override, c.want)
					}
				})
			})
		}
	}
}

func TestAnOverrideEndsWithItsTime(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		res := r.tw.SetDesired(context.Background(), trv, Patch{Props: map[string]json.RawMessage{"setpoint": []byte("25")}, TTL: time.Hour, By: "console"})
		if res.Code != 200 {
			t.Fatalf("%+v", res)
		}
		time.Sleep(50 * time.Minute)
		r.reboot()
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		r.report("setpoint", 25.0)
		r.want("setpoint", "25", v1alpha1.DesiredApplied)
		time.Sleep(11 * time.Minute)
		r.want("setpoint", "20", v1alpha1.DesiredApplied)
		if len(r.disk.data[bucketOverride]) != 0 {
			t.Errorf("left on the disk: %s", r.disk.data[bucketOverride])
		}
	})
}

func TestWhatTheModelDoesNotLetTheNodeSet(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		for _, c := range []struct {
			property, v string
			code        int
		}{
			{"temp", "20", 422}, {"setpoint", "20.3", 422}, {"setpoint", "31", 422}, {"colour", "1", 422},
			{"setpoint", `"20"`, 422}, {"fixed", "true", 403}, {"free", "true", 200},
		} {
			if res := r.patch(c.property, c.v); res.Code != c.code {
				t.Errorf("%s=%s: %+v", c.property, c.v, res)
			}
		}
		// A patch is taken whole or not at all.
		res := r.tw.SetDesired(context.Background(), trv, Patch{Props: map[string]json.RawMessage{"setpoint": []byte("20"), "temp": []byte("1")}})
		if res.Code != 422 || len(res.Props) != 1 || r.doc().Properties["setpoint"].Override != nil {
			t.Errorf("%+v", res)
		}
		if res := r.tw.SetDesired(context.Background(), Key{"a", "b"}, Patch{Props: map[string]json.RawMessage{"x": []byte("1")}}); res.Code != 404 {
			t.Errorf("%+v", res)
		}
		if res := r.tw.SetDesired(context.Background(), trv, Patch{}); res.Code != 400 {
			t.Errorf("%+v", res)
		}
	})
}

func TestABaseThatIsBehind(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		seen := r.doc().Version
		set := func(v string, base v1alpha1.Version) int {
			return r.tw.SetDesired(context.Background(), trv, Patch{Props: map[string]json.RawMessage{"setpoint": []byte(v)}, Base: &base}).Code
		}
		// A reading, or another property's being set, is no conflict.
		r.report("temp", 21.0)
		r.patch("free", "true")
		if code := set("21", seen); code != 200 {
			t.Fatalf("code %d", code)
		}
		if code := set("22", seen); code != 409 {
			t.Errorf("code %d of what was set meanwhile", code)
		}
		now := r.doc().Version
		if code := set("22", now); code != 200 {
			t.Errorf("code %d", code)
		}
		r.reboot()
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		if code := set("23", now); code != 409 {
			t.Errorf("code %d of what was set meanwhile, and the power gone", code)
		}
		gen := int64(0)
		if res := r.tw.SetDesired(context.Background(), trv, Patch{Props: map[string]json.RawMessage{"setpoint": []byte("23")}, BaseGen: &gen}); res.Code != 409 {
			t.Errorf("%+v", res)
		}
	})
}

func TestTheSameIDIsSetOnce(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		p := Patch{ID: "a1", Props: map[string]json.RawMessage{"setpoint": []byte("20")}}
		first := r.tw.SetDesired(context.Background(), trv, p)
		r.patch("setpoint", "25")
		again := r.tw.SetDesired(context.Background(), trv, p)
		if first.Code != 200 || again.Version != first.Version {
			t.Errorf("%+v, then %+v", first, again)
		}
		r.want("setpoint", "25", v1alpha1.DesiredApplied)
		// null takes an override back.
		if res := r.patch("setpoint", "null"); res.Code != 200 {
			t.Errorf("%+v", res)
		}
		r.want("setpoint", "", "")
	})
}

func TestWritersAtOnceLoseNothing(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		var wg sync.WaitGroup
		for _, p := range []string{"setpoint", "free", "boost", "mode"} {
			wg.Go(func() {
				v := map[string]string{"setpoint": "20", "free": "true", "boost": "3", "mode": `"off"`}[p]
				for range 50 {
					if res := r.patch(p, v); res.Code != 200 {
						t.Errorf("%s: %+v", p, res)
					}
				}
			})
		}
		wg.Wait()
		r.reboot()
		r.set(trvDevice(1, nil))
		for _, p := range []string{"setpoint", "free", "boost", "mode"} {
			if r.doc().Properties[p].Override == nil {
				t.Errorf("%s was acknowledged and lost", p)
			}
		}
	})
}

func TestAnInvalidDesiredValueIsWithheld(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "99", "boost": "3"}))
		time.Sleep(time.Minute)
		r.want("boost", "3", v1alpha1.DesiredApplied)
		if p := r.doc().Properties["setpoint"]; p.State != v1alpha1.DesiredInvalid || p.Desired.Message == "" {
			t.Errorf("%+v", p)
		}
		if told := r.gadget.told(); len(told) != 1 {
			t.Errorf("told %v", told)
		}
	})
}

func TestDesiredTimes(t *testing.T) {
	at := metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	later := metav1.NewTime(at.Add(time.Hour))
	entry := func(m string, when *metav1.Time, sub, fields string) metav1.ManagedFieldsEntry {
		return metav1.ManagedFieldsEntry{Manager: m, Time: when, Subresource: sub, FieldsV1: &metav1.FieldsV1{Raw: []byte(fields)}}
	}
	got := v1alpha1.DesiredTimes([]metav1.ManagedFieldsEntry{
		entry("kubectl", &at, "", `{"f:spec":{"f:desired":{".":{},"f:relay":{},"f:speed":{}}}}`),
		entry("argo", &later, "", `{"f:spec":{"f:desired":{"f:speed":{}}}}`),
		entry("hub", &later, "status", `{"f:spec":{"f:desired":{"f:relay":{}}}}`),
		entry("broken", &later, "", `{`),
	})
	if len(got) != 2 || !got["relay"].Equal(at.Time) || !got["speed"].Equal(later.Time) {
		t.Errorf("%v", got)
	}
}

func TestCommands(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		call := func(c CommandCall) CommandStatus { return r.tw.Command(context.Background(), trv, c) }
		args := map[string]json.RawMessage{"seconds": []byte("5")}

		s := call(CommandCall{ID: "1", Name: "identify", Args: args})
		if s.State != CommandSucceeded || s.Code != 200 {
			t.Errorf("%+v", s)
		}
		// The same ID is the same command.
		if s := call(CommandCall{ID: "1", Name: "identify", Args: args}); s.State != CommandSucceeded || len(r.gadget.cmds) != 1 {
			t.Errorf("%+v; sent %d times", s, len(r.gadget.cmds))
		}
		if s := call(CommandCall{ID: "1", Name: "later"}); s.Code != 409 {
			t.Errorf("%+v", s)
		}
		if s := call(CommandCall{Name: "identify", Args: map[string]json.RawMessage{"seconds": []byte("61")}}); s.Code != 422 {
			t.Errorf("%+v", s)
		}
		if s := call(CommandCall{Name: "explode"}); s.Code != 404 {
			t.Errorf("%+v", s)
		}
		r.gadget.set(func(g *gadget) { g.err = fmt.Errorf("%w: no", ErrRejected) })
		if s := call(CommandCall{Name: "identify"}); s.State != CommandFailed || s.Code != 502 {
			t.Errorf("%+v", s)
		}
		r.gadget.set(func(g *gadget) {
			g.answer = func(ctx context.Context, c CommandRequest) (json.RawMessage, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			g.cmds = nil
		})
		if s := call(CommandCall{Name: "identify"}); s.State != CommandTimeout || len(r.gadget.cmds) != 1 {
			t.Errorf("%+v; sent %d times", s, len(r.gadget.cmds))
		}
		r.gadget.set(func(g *gadget) { g.cmds = nil })
		if s := call(CommandCall{Name: "again"}); s.State != CommandTimeout || len(r.gadget.cmds) != maxTries {
			t.Errorf("%+v; sent %d times", s, len(r.gadget.cmds))
		}
		// What shows in a property has succeeded.
		r.gadget.set(func(g *gadget) { g.answer, g.err = nil, nil })
		r.report("mode", "heat")
		time.AfterFunc(3*time.Second, func() { r.tw.Report(trv, []Reading{{Property: "mode", Value: "off"}}) })
		if s := call(CommandCall{Name: "seen"}); s.State != CommandSucceeded {
			t.Errorf("%+v", s)
		}
		if s := call(CommandCall{Name: "seen"}); s.State != CommandTimeout {
			t.Errorf("%+v of what was not seen anew", s)
		}
	})
}

func TestACommandToADeviceThatIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		away := func() { r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline}) }
		call := func(c CommandCall) CommandStatus { return r.tw.Command(context.Background(), trv, c) }
		away()
		if s := call(CommandCall{Name: "identify"}); s.State != CommandFailed || s.Code != 503 {
			t.Errorf("%+v", s)
		}
		if s := call(CommandCall{ID: "q1", Name: "later"}); s.State != CommandQueued || s.Code != 202 {
			t.Errorf("%+v", s)
		}
		if s := call(CommandCall{ID: "q2", Name: "later"}); s.State != CommandQueued {
			t.Errorf("%+v", s)
		}
		r.reboot() // what was accepted is on the disk
		r.set(trvDevice(1, nil))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if n := len(r.gadget.cmds); n != 2 || r.gadget.cmds[0].ID != "q1" {
			t.Errorf("sent %+v", r.gadget.cmds)
		}
		away()
		call(CommandCall{ID: "q3", Name: "later"})
		time.Sleep(2 * time.Minute)
		if s, ok := r.tw.CommandStatus(trv, "q3"); !ok || s.State != CommandExpired {
			t.Errorf("%+v", s)
		}
		r.report("temp", 20.0)
		if n := len(r.gadget.cmds); n != 2 {
			t.Errorf("sent %d", n)
		}
	})
}

// The power goes while the device does it: it is not told again, but for what
// may be.
func TestAtMostOnceAcrossAPowerCut(t *testing.T) {
	for _, c := range []struct {
		name string
		sent int
	}{{"identify", 1}, {"again", 2}} {
		t.Run(c.name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.set(trvDevice(1, nil))
				r.gadget.set(func(g *gadget) {
					g.answer = func(ctx context.Context, c CommandRequest) (json.RawMessage, error) {
						<-ctx.Done()
						return nil, ctx.Err()
					}
				})
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				if s := r.tw.Command(ctx, trv, CommandCall{ID: "x", Name: c.name}); s.State != CommandSent || s.Code != 202 {
					t.Fatalf("%+v", s)
				}
				r.gadget.set(func(g *gadget) { g.answer = nil })
				r.reboot()
				r.set(trvDevice(1, nil))
				r.report("temp", 20.0)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if n := len(r.gadget.cmds); n != c.sent {
					t.Errorf("sent %d times", n)
				}
				// Whoever asks again by ID does not have it done again.
				s := r.tw.Command(context.Background(), trv, CommandCall{ID: "x", Name: c.name})
				if n := len(r.gadget.cmds); n != c.sent || !s.Done() {
					t.Errorf("sent %d times; %+v", n, s)
				}
			})
		})
	}
}

func TestACommandThatTheDiskDoesNotTakeIsNotSent(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		r.disk.mu.Lock()
		r.disk.err = errors.New("no space left on device")
		r.disk.mu.Unlock()
		if s := r.tw.Command(context.Background(), trv, CommandCall{Name: "identify"}); s.State != CommandFailed || s.Code != 503 {
			t.Errorf("%+v", s)
		}
		if len(r.gadget.cmds) != 0 {
			t.Errorf("sent %+v", r.gadget.cmds)
		}
	})
}

func TestWatch(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		ctx, cancel := context.WithCancel(context.Background())
		changes := make(chan Change)
		var wg sync.WaitGroup
		watch := func(from v1alpha1.Version) {
			wg.Go(func() {
				for c := range r.tw.Watch(ctx, from) {
					select {
					case changes <- c:
					case <-ctx.Done():
						return
					}
				}
			})
		}
		next := func() Change {
			t.Helper()
			select {
			case c := <-changes:
				return c
			case <-time.After(time.Minute):
				t.Fatal("nothing is told")
				return Change{}
			}
		}
		watch(v1alpha1.Version{})
		if c := next(); c.Type != ChangeSnapshot || c.Key != trv || len(c.Reported) == 0 {
			t.Errorf("%+v", c)
		}
		synced := next()
		if synced.Type != ChangeSynced || synced.Version.IsZero() {
			t.Errorf("%+v", synced)
		}
		r.report("temp", 21.0)
		c := next()
		if c.Type != ChangeUpdate || len(c.Reported) != 1 || c.Reported[0] != "temp" || len(c.Wanted) != 0 {
			t.Errorf("%+v", c)
		}
		// A slow reader is told the newest, once.
		for i := range 1000 {
			r.tw.Report(trv, []Reading{{Property: "temp", Value: float64(i%50) + 0.5}})
		}
		for n := 0; ; n++ {
			if c = next(); string(c.Doc.Properties["temp"].Reported.Value) == "49.5" {
				break
			}
			if n == 2 {
				t.Fatal("each change is told to a slow reader")
			}
		}
		cancel()
		wg.Wait()
		// From where it was, nothing is told twice and nothing missed.
		ctx, cancel = context.WithCancel(context.Background())
		defer wg.Wait()
		defer cancel()
		r.report("temp", 30.0)
		watch(c.Version)
		if c := next(); c.Type != ChangeUpdate || string(c.Doc.Properties["temp"].Reported.Value) != "30" {
			t.Errorf("%+v", c)
		}
		r.tw.Set(nil, nil)
		if c := next(); c.Type != ChangeDelete || c.Key != trv {
			t.Errorf("%+v", c)
		}
		cancel()
		wg.Wait()
		// Of another run, or too long ago: all of it.
		r.set(trvDevice(1, nil))
		for i := range ringSize + 10 {
			r.tw.Report(trv, []Reading{{Property: "temp", Value: float64(i%60) + 0.25}})
		}
		ctx, cancel = context.WithCancel(context.Background())
		defer cancel()
		watch(c.Version)
		if c := next(); c.Type != ChangeSnapshot {
			t.Errorf("%+v", c)
		}
	})
}
