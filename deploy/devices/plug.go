package devices

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// PlugConfig is a plug that measures what is drawn from it.
type PlugConfig struct {
	Topic      string        // Tasmota's Topic; default plug-1
	Name       string        // DeviceName; default the Topic
	MAC        string        // twelve hexadecimal digits; default 98F4AB000001
	Load       float64       // what hangs on it draws, in W; default 42
	TelePeriod time.Duration // default 5m, as Tasmota's; it can be set by command, 10 s to 1 h
	Started    time.Time     // when it got power; default now
}

// Plug speaks as Tasmota 14 does, with its defaults: FullTopic
// %prefix%/%topic%/, its will on LWT, answers to commands on stat/…/RESULT,
// telemetry each TelePeriod.
type Plug struct {
	cfg    PlugConfig
	last   time.Time // of the meter
	told   time.Time // of the last telemetry
	clears bool      // it ran with a connection before
	kept   plugKept
}

type plugKept struct {
	Power string  `json:"power"` // ON or OFF
	Total float64 `json:"total"` // kWh, as last written: at most once an hour, and with each command
	Tele  int     `json:"teleperiod"`

	total float64 // kWh, now
}

// NewPlug makes one that is off and has counted nothing.
func NewPlug(cfg PlugConfig) *Plug {
	if cfg.Topic == "" {
		cfg.Topic = "plug-1"
	}
	if cfg.Name == "" {
		cfg.Name = cfg.Topic
	}
	if cfg.MAC == "" {
		cfg.MAC = "98F4AB000001"
	}
	if cfg.Load <= 0 {
		cfg.Load = 42
	}
	if cfg.TelePeriod <= 0 {
		cfg.TelePeriod = 5 * time.Minute
	}
	if cfg.Started.IsZero() {
		cfg.Started = time.Now()
	}
	return &Plug{cfg: cfg, kept: plugKept{Power: "OFF", Tele: int(cfg.TelePeriod.Seconds())}}
}

func (p *Plug) clientID() string { return "DVES_" + p.cfg.MAC[6:] }

func (p *Plug) tele(what string) string { return "tele/" + p.cfg.Topic + "/" + what }
func (p *Plug) stat(what string) string { return "stat/" + p.cfg.Topic + "/" + what }

func (p *Plug) will() message { return message{p.tele("LWT"), "Offline", 1, true} }

func (p *Plug) filters() []string {
	return []string{"cmnd/" + p.cfg.Topic + "/#", "cmnd/tasmotas/#", "cmnd/" + p.clientID() + "_fb/#"}
}

func (p *Plug) connected(now time.Time) []message {
	p.pass(now)
	p.told = now
	out := []message{
		{p.tele("LWT"), "Online", 1, true},
		// Tasmota asks itself so, which clears what may have been retained there.
		{topic: "cmnd/" + p.cfg.Topic + "/POWER"},
		{"tasmota/discovery/" + p.cfg.MAC + "/config", p.discovery(), 1, true},
		{"tasmota/discovery/" + p.cfg.MAC + "/sensors", p.sensors(now), 1, true},
	}
	if !p.clears {
		out = append(out,
			message{topic: p.tele("INFO1"), payload: `{"Info1":{"Module":"Nous A1T","Version":"14.4.1(tasmota)","FallbackTopic":"cmnd/` + p.clientID() + `_fb/","GroupTopic":"cmnd/tasmotas/"}}`},
			message{topic: p.tele("INFO3"), payload: `{"Info3":{"RestartReason":"Power On","BootCount":1}}`},
			message{topic: p.stat("RESULT"), payload: p.power()},
			message{topic: p.stat("POWER"), payload: p.kept.Power},
		)
		p.clears = true
	}
	return append(out, p.telemetry(now)...)
}

// farewell: a plug is pulled.
func (p *Plug) farewell() []message { return nil }

func (p *Plug) handle(now time.Time, topic string, payload []byte) []message {
	p.pass(now)
	command := strings.ToUpper(topic[strings.LastIndexByte(topic, '/')+1:])
	arg := strings.ToUpper(strings.TrimSpace(string(payload)))
	switch command {
	case "POWER", "POWER1":
		switch arg {
		case "ON", "1", "TRUE":
			p.kept.Power = "ON"
		case "OFF", "0", "FALSE":
			p.kept.Power = "OFF"
		case "TOGGLE", "2":
			p.toggle()
		}
		p.kept.Total = p.kept.total
		return []message{{topic: p.stat("RESULT"), payload: p.power()}, {topic: p.stat("POWER"), payload: p.kept.Power}}
	case "STATE":
		return []message{{topic: p.stat("RESULT"), payload: p.state(now)}}
	case "STATUS":
		switch arg {
		case "8", "10":
			return []message{{topic: p.stat("STATUS" + arg), payload: `{"StatusSNS":` + p.energy(now) + `}`}}
		case "11":
			return []message{{topic: p.stat("STATUS11"), payload: `{"StatusSTS":` + p.state(now) + `}`}}
		}
		return []message{{topic: p.stat("STATUS"), payload: fmt.Sprintf(
			`{"Status":{"Module":0,"DeviceName":%q,"FriendlyName":[%q],"Topic":%q,"Power":%q}}`, p.cfg.Name, p.cfg.Name, p.cfg.Topic, strconv.Itoa(p.onOff()))}}
	case "TELEPERIOD":
		if n, err := strconv.Atoi(arg); err == nil && (n == 0 || n >= 10 && n <= 3600) {
			p.kept.Tele = n
		}
		return []message{{topic: p.stat("RESULT"), payload: fmt.Sprintf(`{"TelePeriod":%d}`, p.kept.Tele)}}
	}
	return []message{{topic: p.stat("RESULT"), payload: `{"Command":"Unknown"}`}}
}

// press is the button.
func (p *Plug) press(now time.Time) []message {
	p.pass(now)
	p.toggle()
	return []message{{topic: p.stat("RESULT"), payload: p.power()}, {topic: p.stat("POWER"), payload: p.kept.Power}}
}

func (p *Plug) toggle() {
	if p.kept.Power == "ON" {
		p.kept.Power = "OFF"
	} else {
		p.kept.Power = "ON"
	}
}

func (p *Plug) tick(now time.Time) []message {
	p.pass(now)
	if p.kept.total-p.kept.Total > p.cfg.Load/1000 { // an hour's worth
		p.kept.Total = p.kept.total
	}
	if p.kept.Tele == 0 || now.Sub(p.told) < time.Duration(p.kept.Tele)*time.Second {
		return nil
	}
	p.told = now
	return p.telemetry(now)
}

// pass runs the meter on to now.
func (p *Plug) pass(now time.Time) {
	if p.last.IsZero() {
		p.last = now
	}
	p.kept.total += p.watts(p.last) * now.Sub(p.last).Hours() / 1000
	p.last = now
}

// watts sway by a twentieth over a minute, as loads do.
func (p *Plug) watts(at time.Time) float64 {
	if p.kept.Power != "ON" {
		return 0
	}
	return p.cfg.Load * (1 + math.Sin(float64(at.UnixMilli()%60000)/60000*2*math.Pi)/20)
}

func (p *Plug) onOff() int {
	if p.kept.Power == "ON" {
		return 1
	}
	return 0
}

func (p *Plug) power() string { return `{"POWER":"` + p.kept.Power + `"}` }

func (p *Plug) telemetry(now time.Time) []message {
	return []message{{topic: p.tele("STATE"), payload: p.state(now)}, {topic: p.tele("SENSOR"), payload: p.energy(now)}}
}

const tasmotaTime = "2006-01-02T15:04:05" // local time without a zone, as Tasmota has it

func (p *Plug) state(now time.Time) string {
	up := now.Sub(p.cfg.Started)
	return fmt.Sprintf(`{"Time":"%s","Uptime":"%dT%02d:%02d:%02d","UptimeSec":%d,"Heap":25,"SleepMode":"Dynamic","Sleep":50,"LoadAvg":19,"MqttCount":1,"POWER":"%s","Wifi":{"AP":1,"SSId":"home","BSSId":"2C:91:AB:00:00:01","Channel":6,"Mode":"11n","RSSI":78,"Signal":-61,"LinkCount":1,"Downtime":"0T00:00:03"}}`,
		now.UTC().Format(tasmotaTime), int(up.Hours())/24, int(up.Hours())%24, int(up.Minutes())%60, int(up.Seconds())%60, int(up.Seconds()), p.kept.Power)
}

func (p *Plug) energy(now time.Time) string {
	const volts, factor = 230, 0.92
	watts := p.watts(now)
	apparent := watts / factor
	return fmt.Sprintf(`{"Time":"%s","ENERGY":{"TotalStartTime":"%s","Total":%.3f,"Yesterday":0.000,"Today":%.3f,"Period":0,"Power":%.0f,"ApparentPower":%.0f,"ReactivePower":%.0f,"Factor":%.2f,"Voltage":%d,"Current":%.3f}}`,
		now.UTC().Format(tasmotaTime), p.cfg.Started.UTC().Format(tasmotaTime), p.kept.total, p.kept.total,
		watts, apparent, math.Sqrt(apparent*apparent-watts*watts), factorOf(watts, factor), volts, apparent/volts)
}

func factorOf(watts, factor float64) float64 {
	if watts == 0 {
		return 0
	}
	return factor
}

func (p *Plug) discovery() string {
	payload, _ := json.Marshal(map[string]any{
		"ip": "192.168.1.50", "dn": p.cfg.Name, "fn": []any{p.cfg.Name, nil, nil, nil, nil, nil, nil, nil},
		"hn": p.cfg.Topic, "mac": p.cfg.MAC, "md": "Nous A1T", "ty": 0, "if": 0, "cam": 0,
		"ofln": "Offline", "onln": "Online", "state": []string{"OFF", "ON", "TOGGLE", "HOLD"},
		"sw": "14.4.1", "t": p.cfg.Topic, "ft": "%prefix%/%topic%/", "tp": []string{"cmnd", "stat", "tele"},
		"rl": []int{1, 0, 0, 0, 0, 0, 0, 0}, "swc": []int{-1, -1, -1, -1, -1, -1, -1, -1}, "btn": []int{0, 0, 0, 0, 0, 0, 0, 0},
		"so": map[string]int{"4": 0, "11": 0, "13": 0, "17": 0, "20": 0, "30": 0, "68": 0, "73": 0, "82": 0, "114": 0, "117": 0},
		"lk": 0, "lt_st": 0, "sho": []int{0, 0, 0, 0}, "ver": 1,
	})
	return string(payload)
}

func (p *Plug) sensors(now time.Time) string { return `{"sn":` + p.energy(now) + `,"ver":1}` }

func (p *Plug) save() []byte {
	data, _ := json.Marshal(p.kept)
	return data
}

func (p *Plug) restore(data []byte) error {
	if err := json.Unmarshal(data, &p.kept); err != nil {
		return err
	}
	if p.kept.Power != "ON" && p.kept.Power != "OFF" {
		return fmt.Errorf("power is %q", p.kept.Power)
	}
	p.kept.total = p.kept.Total
	return nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
