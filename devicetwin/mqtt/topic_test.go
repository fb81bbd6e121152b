package mqtt

import (
	"strings"
	"testing"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		filter, topic string
		want          bool
	}{
		{"a/b", "a/b", true},
		{"a/b", "a/bc", false},
		{"a/b", "a", false},
		{"a", "a/b", false},
		{"+", "a", true},
		{"+", "a/b", false},
		{"+", "/a", false},
		{"+/+", "/a", true},
		{"/+", "/a", true},
		{"a/+/c", "a/b/c", true},
		{"a/+/c", "a//c", true},
		{"a/+", "a", false},
		{"a/+", "a/", true},
		{"#", "a/b/c", true},
		{"a/#", "a", true},
		{"a/#", "a/b/c", true},
		{"a/#", "ab", false},
		{"+/#", "a", true},
		{"#", "$SYS/x", false},
		{"+/x", "$SYS/x", false},
		{"$SYS/#", "$SYS/x", true},
		{"$share/g/a/+", "a/b", true},
		{"$share/g/#", "$SYS/x", false},
	} {
		if got := Match(c.filter, c.topic); got != c.want {
			t.Errorf("Match(%q, %q) = %v", c.filter, c.topic, got)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"#", "a/#", true},
		{"a/#", "#", false},
		{"a/+", "a/b", true},
		{"a/+", "a/+", true},
		{"a/b", "a/+", false},
		{"a/#", "a/+/c", true},
		{"+/b", "a/+", false},
		{"a/+", "a/#", false},
		{"#", "$SYS/#", false},
		{"+/#", "+", true},
	} {
		if got := Covers(c.a, c.b); got != c.want {
			t.Errorf("Covers(%q, %q) = %v", c.a, c.b, got)
		}
	}
}

func TestChecks(t *testing.T) {
	for _, bad := range []string{"", "a/+", "#", "a\x00b", "\xff", strings.Repeat("x", 65536)} {
		if CheckTopic(bad) == nil {
			t.Errorf("topic %.20q passes", bad)
		}
	}
	for _, bad := range []string{"", "a+/b", "#/a", "a/#/b", "a#", "$share/g", "$share//a", "$share/+/a", "a\x00"} {
		if CheckFilter(bad) == nil {
			t.Errorf("filter %.20q passes", bad)
		}
	}
	for _, good := range []string{"a", "/", "a//b", "+", "#", "+/+/#", "$share/g/a/#", "$SYS/#"} {
		if err := CheckFilter(good); err != nil {
			t.Error(err)
		}
	}
}

// FuzzMatch checks matching against the plain reading of the standard.
func FuzzMatch(f *testing.F) {
	f.Add("a/+/#", "a/b")
	f.Add("#", "$SYS")
	f.Add("+//+", "a//b")
	f.Fuzz(func(t *testing.T, filter, topic string) {
		if CheckFilter(filter) != nil || CheckTopic(topic) != nil || strings.HasPrefix(filter, "$share/") {
			return
		}
		want := slowMatch(strings.Split(filter, "/"), strings.Split(topic, "/")) &&
			(topic[0] != '$' || filter[0] == '$')
		if got := Match(filter, topic); got != want {
			t.Errorf("Match(%q, %q) = %v", filter, topic, got)
		}
		if want && !Covers("#", filter) && filter[0] != '$' {
			t.Errorf("# does not cover %q", filter)
		}
	})
}

func slowMatch(filter, topic []string) bool {
	switch {
	case len(filter) == 0:
		return len(topic) == 0
	case filter[0] == "#":
		return true
	case len(topic) == 0:
		return false
	case filter[0] != "+" && filter[0] != topic[0]:
		return false
	case len(topic) == 1 && len(filter) == 2 && filter[1] == "#":
		return true
	}
	return slowMatch(filter[1:], topic[1:])
}
