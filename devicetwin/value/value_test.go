package value_test

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

func compile(t *testing.T, p v1alpha1.Property) *value.Type {
	t.Helper()
	if p.Access == "" {
		p.Access = "rw"
	}
	typ, err := value.Compile(&p)
	if err != nil {
		t.Fatal(err)
	}
	return typ
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		prop v1alpha1.Property
		raw  string
		want string // JSON; "": refused
	}{
		{v1alpha1.Property{Type: "bool"}, `true`, `true`},
		{v1alpha1.Property{Type: "bool"}, `1`, ``},
		{v1alpha1.Property{Type: "bool"}, `"true"`, ``},
		{v1alpha1.Property{Type: "int64"}, `9007199254740993`, `9007199254740993`}, // 2^53+1
		{v1alpha1.Property{Type: "int64"}, `-9223372036854775808`, `-9223372036854775808`},
		{v1alpha1.Property{Type: "int64"}, `9223372036854775808`, ``},
		{v1alpha1.Property{Type: "int64"}, `5.0`, `5`},
		{v1alpha1.Property{Type: "int64"}, `1e3`, `1000`},
		{v1alpha1.Property{Type: "int64"}, `5.5`, ``},
		{v1alpha1.Property{Type: "int64"}, `9007199254740993.0`, ``},
		{v1alpha1.Property{Type: "int64"}, `0x10`, ``},
		{v1alpha1.Property{Type: "int64", Min: "9007199254740993"}, `9007199254740992`, ``},
		{v1alpha1.Property{Type: "int64", Min: "9007199254740993"}, `9007199254740993`, `9007199254740993`},
		{v1alpha1.Property{Type: "int64", Max: "0.5"}, `1`, ``},
		{v1alpha1.Property{Type: "float64"}, `0.1`, `0.1`},
		{v1alpha1.Property{Type: "float64"}, `7`, `7`},
		{v1alpha1.Property{Type: "float64"}, `1e400`, ``},
		{v1alpha1.Property{Type: "float64"}, `NaN`, ``},
		{v1alpha1.Property{Type: "float64"}, `Inf`, ``},
		{v1alpha1.Property{Type: "float64"}, `1_0`, ``},
		{v1alpha1.Property{Type: "float64", Min: "-40", Max: "80"}, `80.5`, ``},
		{v1alpha1.Property{Type: "float64", Min: "-40", Max: "80"}, `-40`, `-40`},
		{v1alpha1.Property{Type: "string"}, `"a\u00e4"`, `"aä"`},
		{v1alpha1.Property{Type: "string"}, "\"\xff\"", ``},
		{v1alpha1.Property{Type: "string", MaxLength: 3}, `"abcd"`, ``},
		{v1alpha1.Property{Type: "string"}, `"` + strings.Repeat("a", 1025) + `"`, ``},
		{v1alpha1.Property{Type: "string", MaxLength: 1 << 20}, `"` + strings.Repeat("a", value.MaxLength+1) + `"`, ``},
		{v1alpha1.Property{Type: "enum", Enum: []string{"on", "off"}}, `"on"`, `"on"`},
		{v1alpha1.Property{Type: "enum", Enum: []string{"on", "off"}}, `"auto"`, ``},
		{v1alpha1.Property{Type: "bytes"}, `"AQID"`, `"AQID"`},
		{v1alpha1.Property{Type: "bytes"}, `"%"`, ``},
		{v1alpha1.Property{Type: "object"}, `{"a": [1, 2]}`, `{"a":[1,2]}`},
		{v1alpha1.Property{Type: "object"}, `{"a":`, ``},
		{v1alpha1.Property{Type: "object"}, strings.Repeat("[", 1000) + strings.Repeat("]", 1000), ``},
		{v1alpha1.Property{Type: "object"}, `"[[[[` + strings.Repeat("[", 100) + `"`, `"[[[[` + strings.Repeat("[", 100) + `"`},
		{v1alpha1.Property{Type: "object"}, `null`, ``},
	} {
		typ := compile(t, c.prop)
		v, err := typ.Parse([]byte(c.raw))
		if (err == nil) != (c.want != "") {
			t.Errorf("%s of %+v: value %v, error %v", c.raw, c.prop, v, err)
			continue
		}
		if err == nil && string(value.JSON(v)) != c.want {
			t.Errorf("%s of %+v: %s, want %s", c.raw, c.prop, value.JSON(v), c.want)
		}
	}
}

func TestDesired(t *testing.T) {
	for _, c := range []struct {
		prop v1alpha1.Property
		raw  string
		ok   bool
	}{
		{v1alpha1.Property{Type: "float64", Min: "5", Max: "30", Step: "0.5"}, `20.5`, true},
		{v1alpha1.Property{Type: "float64", Min: "5", Max: "30", Step: "0.5"}, `20.4`, false},
		{v1alpha1.Property{Type: "float64", Step: "0.1"}, `0.3`, true},
		{v1alpha1.Property{Type: "float64", Step: "0.1"}, `1234.7`, true},
		{v1alpha1.Property{Type: "int64", Min: "-9223372036854775808", Step: "5"}, `9223372036854775807`, true},
		{v1alpha1.Property{Type: "int64", Min: "-9223372036854775808", Step: "5"}, `9223372036854775806`, false},
		{v1alpha1.Property{Type: "int64", Min: "1", Step: "2"}, `4`, false},
		{v1alpha1.Property{Type: "bool", Access: "r"}, `true`, false},
		{v1alpha1.Property{Type: "bool", Access: "w"}, `true`, true},
	} {
		_, err := compile(t, c.prop).ParseDesired([]byte(c.raw))
		if (err == nil) != c.ok {
			t.Errorf("%s of %+v: %v", c.raw, c.prop, err)
		}
	}
}

func TestReadingsOfAnotherTypeAreRefused(t *testing.T) {
	typ := compile(t, v1alpha1.Property{Type: "float64"})
	for _, v := range []any{nil, "1", int64(1), float32(1), 1, math.NaN(), math.Inf(-1), []byte("1"), json.RawMessage("1")} {
		if typ.Check(v) == nil {
			t.Errorf("%T %v was taken as a float64", v, v)
		}
	}
}

func TestSame(t *testing.T) {
	near := compile(t, v1alpha1.Property{Type: "float64", Tolerance: 0.25})
	exact := compile(t, v1alpha1.Property{Type: "float64"})
	count := compile(t, v1alpha1.Property{Type: "int64"})
	object := compile(t, v1alpha1.Property{Type: "object"})
	for _, c := range []struct {
		typ  *value.Type
		a, b any
		want bool
	}{
		{near, 20.0, 20.25, true},
		{near, 20.0, 20.3, false},
		{exact, 0.1 + 0.2, 0.3, true},
		{exact, 0.3, 0.31, false},
		{count, int64(1<<53 + 1), int64(1 << 53), false},
		{object, json.RawMessage(`{"a": 1}`), json.RawMessage(`{"a":1}`), true},
		{object, json.RawMessage(`{"a":1}`), nil, false},
		{exact, nil, 0.0, false},
	} {
		if got := c.typ.Same(c.a, c.b); got != c.want {
			t.Errorf("same(%v, %v) = %v", c.a, c.b, got)
		}
	}
}

func TestCheckDesired(t *testing.T) {
	model := &v1alpha1.DeviceModel{Spec: v1alpha1.DeviceModelSpec{Properties: []v1alpha1.Property{
		{Name: "relay", Type: "bool", Access: "rw"},
		{Name: "power", Type: "float64", Access: "r"},
		{Name: "speed", Type: "int64", Access: "rw", Min: "0", Max: "60"},
	}}}
	raw := func(s string) v1alpha1.JSON { return v1alpha1.JSON{Raw: []byte(s)} }
	bad := value.CheckDesired(model, map[string]v1alpha1.JSON{
		"relay": raw(`true`), "power": raw(`3`), "speed": raw(`61`), "colour": raw(`"red"`),
	})
	if len(bad) != 3 || bad["power"] == nil || bad["speed"] == nil || bad["colour"] == nil {
		t.Errorf("refused: %v", bad)
	}
	if bad := value.CheckDesired(model, map[string]v1alpha1.JSON{"speed": raw(`60`)}); bad != nil {
		t.Errorf("refused: %v", bad)
	}
}

func TestModelsThatCannotBe(t *testing.T) {
	for _, p := range []v1alpha1.Property{
		{Type: "stream", Access: "r"},
		{Type: "bool"},
		{Type: "enum", Access: "r"},
		{Type: "int64", Access: "r", Min: "a"},
		{Type: "int64", Access: "r", Min: "3", Max: "2"},
		{Type: "int64", Access: "r", Step: "0"},
		{Type: "float64", Access: "r", Tolerance: -1},
	} {
		if _, err := value.Compile(&p); err == nil {
			t.Errorf("%+v was taken", p)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{`1`, `-0`, `1e999`, `"a"`, `"\ud800"`, `{"a":[]}`, `true`, `null`, "\"\xff\"", ` 5.0 `} {
		f.Add(s)
	}
	kinds := []v1alpha1.Property{
		{Type: "bool", Access: "rw"}, {Type: "int64", Access: "rw", Step: "3"}, {Type: "float64", Access: "rw", Step: "0.1"},
		{Type: "string", Access: "rw"}, {Type: "enum", Access: "rw", Enum: []string{"a"}}, {Type: "bytes", Access: "rw"}, {Type: "object", Access: "rw"},
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, p := range kinds {
			typ, err := value.Compile(&p)
			if err != nil {
				t.Fatal(err)
			}
			v, err := typ.Parse([]byte(s))
			if err != nil {
				continue
			}
			// What was taken reads back as itself.
			raw := value.JSON(v)
			again, err := typ.Parse(raw)
			if err != nil || !value.Equal(v, again) || !typ.Same(v, again) {
				t.Fatalf("%s: %q became %s and then %v, %v", p.Type, s, raw, again, err)
			}
			typ.ParseDesired(raw)
		}
	})
}
