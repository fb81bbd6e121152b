package devices

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

var morning = time.Date(2026, 11, 24, 7, 0, 0, 0, time.UTC)

func payloadOf(t *testing.T, out []message, topic string) string {
	t.Helper()
	for _, m := range out {
		if m.topic == topic {
			return m.payload
		}
	}
	t.Fatalf("nothing on %s in %+v", topic, out)
	return ""
}

func numbers(t *testing.T, payload string) map[string]any {
	t.Helper()
	m := map[string]any{}
	if err := json.Unmarshal([]byte(payload), &m); err != nil {
		t.Fatalf("%s: %v", payload, err)
	}
	return m
}

func TestThermostatHeatsToItsSetpoint(t *testing.T) {
	d := NewThermostat(ThermostatConfig{})
	d.connected(morning)
	out := d.handle(morning, "zigbee2mqtt/trv-kitchen/set", []byte(`{"occupied_heating_setpoint":22.5}`))
	st := numbers(t, payloadOf(t, out, "zigbee2mqtt/trv-kitchen"))
	if st["occupied_heating_setpoint"] != 22.5 || st["running_state"] != "heat" {
		t.Fatalf("after a set: %v", st)
	}
	reports := 0
	for at := morning; at.Before(morning.Add(3 * time.Hour)); at = at.Add(time.Second) {
		for _, m := range d.tick(at) {
			reports++
			st = numbers(t, m.payload)
		}
	}
	if temp := st["local_temperature"].(float64); temp < 22.2 || temp > 22.8 {
		t.Errorf("%v °C after three hours at 22.5", temp)
	}
	// Each tenth of a degree on the way, and one in five minutes afterwards.
	if reports < 40 || reports > 110 {
		t.Errorf("%d reports", reports)
	}
}

func TestThermostatRefusesAsZigbee2MQTTDoes(t *testing.T) {
	for payload, complaint := range map[string]string{
		`{"occupied_heating_setpoint":45}`:    "INVALID_VALUE",
		`{"occupied_heating_setpoint":"hot"}`: "not a number",
		`{"system_mode":"auto"}`:              "is not one of off, heat",
		`{"colour":"red"}`:                    "No converter available for 'colour'",
		`{"occ`:                               "Invalid JSON",
	} {
		d := NewThermostat(ThermostatConfig{})
		before := d.kept
		out := d.handle(morning, "zigbee2mqtt/trv-kitchen/set", []byte(payload))
		if got := payloadOf(t, out, "zigbee2mqtt/bridge/logging"); !strings.Contains(got, complaint) {
			t.Errorf("%s: it says %s; want %q", payload, got, complaint)
		}
		if d.kept != before {
			t.Errorf("%s changed it to %+v", payload, d.kept)
		}
	}
}

func TestThermostatTakesOneAttribute(t *testing.T) {
	d := NewThermostat(ThermostatConfig{})
	d.handle(morning, "zigbee2mqtt/trv-kitchen/set/system_mode", []byte("off"))
	d.handle(morning, "zigbee2mqtt/trv-kitchen/set/occupied_heating_setpoint", []byte("7.5"))
	st := numbers(t, payloadOf(t, d.handle(morning, "zigbee2mqtt/trv-kitchen/get", []byte(`{"local_temperature":""}`)), "zigbee2mqtt/trv-kitchen"))
	if st["system_mode"] != "off" || st["occupied_heating_setpoint"] != 7.5 || st["running_state"] != "idle" {
		t.Errorf("%v", st)
	}
}

func TestPlugAnswersCommands(t *testing.T) {
	p := NewPlug(PlugConfig{Started: morning})
	p.connected(morning)
	for _, c := range []struct{ command, arg, topic, want string }{
		{"POWER", "ON", "stat/plug-1/RESULT", `{"POWER":"ON"}`},
		{"POWER", "", "stat/plug-1/POWER", `ON`},
		{"power", "toggle", "stat/plug-1/POWER", `OFF`},
		{"Power1", "1", "stat/plug-1/RESULT", `{"POWER":"ON"}`},
		{"State", "", "stat/plug-1/RESULT", `"POWER":"ON"`},
		{"Status", "10", "stat/plug-1/STATUS10", `{"StatusSNS":{"Time":"2026-11-24T07:00:00","ENERGY":{`},
		{"TelePeriod", "5", "stat/plug-1/RESULT", `{"TelePeriod":300}`},
		{"TelePeriod", "20", "stat/plug-1/RESULT", `{"TelePeriod":20}`},
		{"Dance", "", "stat/plug-1/RESULT", `{"Command":"Unknown"}`},
	} {
		got := payloadOf(t, p.handle(morning, "cmnd/plug-1/"+c.command, []byte(c.arg)), c.topic)
		if !strings.Contains(got, c.want) {
			t.Errorf("%s %q: %s has %s; want %s", c.command, c.arg, c.topic, got, c.want)
		}
		if c.topic != "stat/plug-1/POWER" && !json.Valid([]byte(got)) {
			t.Errorf("%s %q: not JSON: %s", c.command, c.arg, got)
		}
	}
}

func TestPlugMeters(t *testing.T) {
	p := NewPlug(PlugConfig{Started: morning, Load: 100, TelePeriod: time.Minute})
	p.connected(morning)
	p.handle(morning, "cmnd/plug-1/POWER", []byte("ON"))
	at, telemetry := morning, 0
	var last string
	for range 3600 {
		at = at.Add(time.Second)
		for _, m := range p.tick(at) {
			if m.topic == "tele/plug-1/SENSOR" {
				telemetry, last = telemetry+1, m.payload
			}
		}
	}
	energy := numbers(t, last)["ENERGY"].(map[string]any)
	if total := energy["Total"].(float64); total < 0.098 || total > 0.102 {
		t.Errorf("%v kWh after an hour of 100 W", total)
	}
	if watts := energy["Power"].(float64); watts < 95 || watts > 105 {
		t.Errorf("%v W", watts)
	}
	if telemetry != 60 {
		t.Errorf("telemetry %d times in an hour, each minute", telemetry)
	}
	off := p.handle(at, "cmnd/plug-1/POWER", []byte("OFF"))
	payloadOf(t, off, "stat/plug-1/RESULT")
	sns := numbers(t, payloadOf(t, p.handle(at, "cmnd/plug-1/Status", []byte("8")), "stat/plug-1/STATUS8"))
	if watts := sns["StatusSNS"].(map[string]any)["ENERGY"].(map[string]any)["Power"]; watts != 0.0 {
		t.Errorf("off, it draws %v W", watts)
	}
}

func TestAnnouncementsAreJSON(t *testing.T) {
	for _, d := range []Device{NewThermostat(ThermostatConfig{}), NewPlug(PlugConfig{})} {
		for _, m := range d.connected(morning) {
			bare := strings.HasSuffix(m.topic, "/LWT") || strings.HasSuffix(m.topic, "/POWER")
			if !bare && !json.Valid([]byte(m.payload)) {
				t.Errorf("%s: not JSON: %s", m.topic, m.payload)
			}
		}
	}
}

func TestStateIsKept(t *testing.T) {
	a := NewPlug(PlugConfig{})
	a.handle(morning, "cmnd/plug-1/POWER", []byte("ON"))
	b := NewPlug(PlugConfig{})
	if err := b.restore(a.save()); err != nil {
		t.Fatal(err)
	}
	if b.kept.Power != "ON" {
		t.Errorf("the plug is %s after a power cut", b.kept.Power)
	}
	if err := b.restore([]byte(`{"power":"MAYBE"}`)); err == nil {
		t.Error("a state that is none was taken")
	}
}
