package devices

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"time"
)

// ThermostatConfig is a radiator thermostat and the Zigbee2MQTT before it.
type ThermostatConfig struct {
	Name     string        // friendly name; default trv-kitchen
	Base     string        // Zigbee2MQTT's base topic; default zigbee2mqtt
	IEEE     string        // its address; default 0x842e14fffe000001
	Interval time.Duration // longest time between two reports; default 5m
	Speed    float64       // how much faster than in a real room temperatures change; default 1
}

// Thermostat speaks as Zigbee2MQTT 2 does of a Danfoss Ally (014G2461), with
// its defaults: the device's state is not retained and is asked for with
// <name>/get, availability is JSON and retained, the bridge has a will.
type Thermostat struct {
	cfg  ThermostatConfig
	last time.Time // of the physics
	said time.Time // of the last report
	told float64   // the temperature then

	kept thermostatKept
	temp float64 // of the room, at the device
	heat int     // how far the valve is open, in percent
}

type thermostatKept struct {
	Setpoint float64 `json:"occupied_heating_setpoint"`
	Mode     string  `json:"system_mode"`
	Locked   string  `json:"keypad_lockout"`
}

const (
	outside    = 12.0        // what the room would be without heating, in °C
	heating    = 40.0 / 3600 // what an open valve gives, in °C per second
	losing     = 1.0 / 3600  // of the difference to outside, per second
	leastSet   = 5.0         // setpoints the device takes
	mostSet    = 35.0
	reportStep = 0.1 // a smaller change of temperature is not reported
)

// NewThermostat makes one in a room of 19 °C, set to 20 °C.
func NewThermostat(cfg ThermostatConfig) *Thermostat {
	if cfg.Name == "" {
		cfg.Name = "trv-kitchen"
	}
	if cfg.Base == "" {
		cfg.Base = "zigbee2mqtt"
	}
	if cfg.IEEE == "" {
		cfg.IEEE = "0x842e14fffe000001"
	}
	if cfg.Interval <= 0 {
		cfg.Interval = 5 * time.Minute
	}
	if cfg.Speed <= 0 {
		cfg.Speed = 1
	}
	return &Thermostat{cfg: cfg, temp: 19, kept: thermostatKept{Setpoint: 20, Mode: "heat", Locked: "unlock"}}
}

// Topic is the device's own.
func (t *Thermostat) Topic() string { return t.cfg.Base + "/" + t.cfg.Name }

func (t *Thermostat) clientID() string { return "mqttjs_" + t.cfg.IEEE[2:] }

func (t *Thermostat) will() message {
	return message{t.cfg.Base + "/bridge/state", `{"state":"offline"}`, 1, true}
}

func (t *Thermostat) filters() []string {
	return []string{t.Topic() + "/set", t.Topic() + "/set/+", t.Topic() + "/get"}
}

func (t *Thermostat) connected(now time.Time) []message {
	return []message{
		{t.cfg.Base + "/bridge/state", `{"state":"online"}`, 1, true},
		{t.cfg.Base + "/bridge/info", `{"version":"2.1.1","commit":"unknown","coordinator":{"type":"zStack3x0"},"network":{"channel":11,"pan_id":6754},"log_level":"info","permit_join":false}`, 0, true},
		{t.cfg.Base + "/bridge/devices", t.bridgeDevices(), 0, true},
		{t.Topic() + "/availability", `{"state":"online"}`, 1, true},
		t.state(now),
	}
}

func (t *Thermostat) farewell() []message {
	return []message{
		{t.Topic() + "/availability", `{"state":"offline"}`, 1, true},
		{t.cfg.Base + "/bridge/state", `{"state":"offline"}`, 1, true},
	}
}

func (t *Thermostat) handle(now time.Time, topic string, payload []byte) []message {
	t.pass(now)
	what := strings.TrimPrefix(topic, t.Topic()+"/")
	if what == "get" {
		return []message{t.state(now)}
	}
	want := map[string]json.RawMessage{}
	if attribute, ok := strings.CutPrefix(what, "set/"); ok {
		if !json.Valid(payload) { // Zigbee2MQTT takes bare words
			payload, _ = json.Marshal(string(payload))
		}
		want[attribute] = payload
	} else if err := json.Unmarshal(payload, &want); err != nil {
		return []message{t.complain(fmt.Sprintf("Invalid JSON '%s', skipping...", payload))}
	}
	var out []message
	for _, attribute := range sortedKeys(want) {
		if err := t.set(attribute, want[attribute]); err != nil {
			out = append(out, t.complain(fmt.Sprintf("Publish 'set' '%s' to '%s' failed: '%v'", attribute, t.cfg.Name, err)))
		}
	}
	return append(out, t.state(now))
}

func (t *Thermostat) set(attribute string, value json.RawMessage) error {
	switch attribute {
	case "occupied_heating_setpoint":
		var v float64
		if err := json.Unmarshal(value, &v); err != nil {
			return fmt.Errorf("not a number: %s", value)
		}
		if v < leastSet || v > mostSet {
			return fmt.Errorf("ZCL command %s/1 hvacThermostat.write({\"occupiedHeatingSetpoint\":%.0f}) failed (Status 'INVALID_VALUE')", t.cfg.IEEE, v*100)
		}
		t.kept.Setpoint = math.Round(v*100) / 100
	case "system_mode":
		return oneOf(value, &t.kept.Mode, "off", "heat")
	case "keypad_lockout":
		return oneOf(value, &t.kept.Locked, "unlock", "lock1")
	default:
		return fmt.Errorf("No converter available for '%s' (%s)", attribute, value) //nolint:staticcheck // Zigbee2MQTT's words
	}
	return nil
}

func oneOf(value json.RawMessage, into *string, words ...string) error {
	var v string
	if err := json.Unmarshal(value, &v); err != nil {
		return fmt.Errorf("not a string: %s", value)
	}
	for _, w := range words {
		if v == w {
			*into = v
			return nil
		}
	}
	return fmt.Errorf("value '%s' is not one of %s", v, strings.Join(words, ", "))
}

// press turns the wheel half a degree up.
func (t *Thermostat) press(now time.Time) []message {
	t.pass(now)
	t.kept.Setpoint = min(t.kept.Setpoint+0.5, mostSet)
	return []message{t.state(now)}
}

func (t *Thermostat) tick(now time.Time) []message {
	t.pass(now)
	if math.Abs(t.temp-t.told) < reportStep && now.Sub(t.said) < t.cfg.Interval {
		return nil
	}
	return []message{t.state(now)}
}

// pass moves the room's temperature on to now.
func (t *Thermostat) pass(now time.Time) {
	if t.last.IsZero() {
		t.last = now
	}
	// In steps, as the valve follows the temperature.
	left := min(now.Sub(t.last).Seconds()*t.cfg.Speed, 24*3600)
	t.last = now
	for left > 0 {
		step := min(left, 30)
		left -= step
		t.turn()
		t.temp += step * (heating*float64(t.heat)/100 - losing*(t.temp-outside))
	}
}

// turn sets the valve.
func (t *Thermostat) turn() {
	t.heat = 0
	if t.kept.Mode == "heat" {
		t.heat = int(math.Round(min(max((t.kept.Setpoint-t.temp)*100+25, 0), 100)))
	}
}

func (t *Thermostat) state(now time.Time) message {
	t.pass(now)
	t.turn()
	t.said, t.told = now, t.temp
	running := "idle"
	if t.heat > 0 {
		running = "heat"
	}
	payload, _ := json.Marshal(struct { // in Zigbee2MQTT's order, which is by name
		Battery     int     `json:"battery"`
		LastSeen    string  `json:"last_seen"`
		LinkQuality int     `json:"linkquality"`
		Local       float64 `json:"local_temperature"`
		Demand      int     `json:"pi_heating_demand"`
		Running     string  `json:"running_state"`
		thermostatKept
	}{97, now.UTC().Format(time.RFC3339), 142, math.Round(t.temp*100) / 100, t.heat, running, t.kept})
	return message{topic: t.Topic(), payload: string(payload)}
}

func (t *Thermostat) complain(text string) message {
	payload, _ := json.Marshal(map[string]string{"level": "error", "message": "z2m: " + text, "namespace": "z2m"})
	return message{topic: t.cfg.Base + "/bridge/logging", payload: string(payload)}
}

func (t *Thermostat) bridgeDevices() string {
	type object = map[string]any
	expose := func(name, kind string, access int, more object) object {
		e := object{"name": name, "property": name, "type": kind, "access": access, "label": name}
		for k, v := range more {
			e[k] = v
		}
		return e
	}
	list := []object{
		{"ieee_address": "0x00124b0000000000", "type": "Coordinator", "friendly_name": "Coordinator", "supported": true,
			"disabled": false, "interview_completed": true, "network_address": 0, "definition": nil},
		{"ieee_address": t.cfg.IEEE, "type": "EndDevice", "friendly_name": t.cfg.Name, "supported": true, "disabled": false,
			"interview_completed": true, "network_address": 29159, "power_source": "Battery", "manufacturer": "Danfoss", "model_id": "eTRV0100",
			"software_build_id": "1.22.0008 1.22", "date_code": "20200326",
			"definition": object{"model": "014G2461", "vendor": "Danfoss", "description": "Ally thermostat", "supports_ota": true,
				"exposes": []object{
					expose("battery", "numeric", 5, object{"unit": "%", "value_min": 0, "value_max": 100, "category": "diagnostic"}),
					{"type": "climate", "features": []object{
						expose("occupied_heating_setpoint", "numeric", 7, object{"unit": "°C", "value_min": leastSet, "value_max": mostSet, "value_step": 0.5}),
						expose("local_temperature", "numeric", 5, object{"unit": "°C"}),
						expose("system_mode", "enum", 7, object{"values": []string{"off", "heat"}}),
						expose("running_state", "enum", 5, object{"values": []string{"idle", "heat"}}),
						expose("pi_heating_demand", "numeric", 5, object{"unit": "%", "value_min": 0, "value_max": 100}),
					}},
					expose("keypad_lockout", "enum", 7, object{"values": []string{"unlock", "lock1"}}),
					expose("linkquality", "numeric", 1, object{"unit": "lqi", "value_min": 0, "value_max": 255}),
				}, "options": []object{}}},
	}
	payload, _ := json.Marshal(list)
	return string(payload)
}

func (t *Thermostat) save() []byte {
	data, _ := json.Marshal(t.kept)
	return data
}

func (t *Thermostat) restore(data []byte) error { return json.Unmarshal(data, &t.kept) }
