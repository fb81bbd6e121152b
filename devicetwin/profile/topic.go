package profile

import (
	"fmt"
	"strings"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// reserved is where this node speaks for itself: a mapping to there could act
// in the name of another namespace.
const reserved = "skerry/"

// maxTopic is what a model may make of a topic.
const maxTopic = 1024

func checkFilter(s string) error {
	if len(s) > maxTopic {
		return fmt.Errorf("topic %.40q…: longer than %d bytes", s, maxTopic)
	}
	return mqtt.CheckFilter(s)
}

func checkTopic(s string) error {
	if len(s) > maxTopic {
		return fmt.Errorf("topic %.40q…: longer than %d bytes", s, maxTopic)
	}
	return mqtt.CheckTopic(s)
}

// isOurs tells whether a topic is this node's own, or the broker's.
func isOurs(topic string) bool {
	return strings.HasPrefix(topic, reserved) || strings.HasPrefix(topic, "$SYS/")
}
