package mqtt

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// maxTopic is what MQTT's length field can say [MQTT-1.5.3].
const maxTopic = 65535

// CheckTopic says why name is not one that can be published to.
func CheckTopic(name string) error {
	if err := checkText(name); err != nil {
		return err
	}
	if strings.ContainsAny(name, "+#") {
		return fmt.Errorf("topic %q has a wildcard", name) // [MQTT-3.3.2-2]
	}
	return nil
}

// CheckFilter says why filter is not one that can be subscribed to. A shared
// subscription's $share/group/ may be before it.
func CheckFilter(filter string) error {
	if err := checkText(filter); err != nil {
		return err
	}
	if rest, ok := strings.CutPrefix(filter, "$share/"); ok {
		group, inner, ok := strings.Cut(rest, "/")
		if !ok || group == "" || inner == "" || strings.ContainsAny(group, "+#") {
			return fmt.Errorf("filter %q: a shared subscription is $share/<group>/<filter>", filter)
		}
		filter = inner
	}
	for level := range strings.SplitSeq(filter, "/") {
		if len(level) > 1 && strings.ContainsAny(level, "+#") {
			return fmt.Errorf("filter %q: a wildcard must stand alone between slashes", filter) // [MQTT-4.7.1-2]
		}
	}
	if i := strings.IndexByte(filter, '#'); i >= 0 && i != len(filter)-1 {
		return fmt.Errorf("filter %q: # must come last", filter)
	}
	return nil
}

func checkText(s string) error {
	switch {
	case s == "":
		return errors.New("an empty topic") // [MQTT-4.7.3-1]
	case len(s) > maxTopic:
		return fmt.Errorf("a topic of %d bytes: %d are the most", len(s), maxTopic)
	case !utf8.ValidString(s):
		return errors.New("a topic that is not UTF-8") // [MQTT-1.5.3-1]
	case strings.IndexByte(s, 0) >= 0:
		return errors.New("a topic with a zero byte") // [MQTT-1.5.3-2]
	}
	return nil
}

// Match says whether what is published to topic goes to subscribers of filter.
func Match(filter, topic string) bool {
	if rest, ok := strings.CutPrefix(filter, "$share/"); ok {
		_, filter, _ = strings.Cut(rest, "/")
	}
	if strings.HasPrefix(topic, "$") && !strings.HasPrefix(filter, "$") {
		return false // [MQTT-4.7.2-1]
	}
	return Covers(filter, topic)
}

// Covers says whether every topic that matches filter b matches filter a. Where
// b has no wildcard it is as good as a topic.
func Covers(a, b string) bool {
	if strings.HasPrefix(b, "$") && !strings.HasPrefix(a, "$") {
		return false
	}
	for {
		aLevel, aRest, aMore := strings.Cut(a, "/")
		bLevel, bRest, bMore := strings.Cut(b, "/")
		if aLevel == "#" {
			return true
		}
		if bLevel == "#" || aLevel != bLevel && aLevel != "+" {
			return false
		}
		switch {
		case !aMore && !bMore:
			return true
		case !bMore:
			return aRest == "#" // a/# is for a too [MQTT-4.7.1-2]
		case !aMore:
			return false
		}
		a, b = aRest, bRest
	}
}
