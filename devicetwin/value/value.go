// Package value knows the types of a DeviceModel's properties: which Go value
// stands for what, what is within bounds, what equals what.
//
// It is pure: it keeps nothing and reaches nothing, so that the hub, the node
// and the mapping profiles judge a value alike. It never corrects a value; what
// does not fit is refused with the reason.
//
// In Go a value is a bool, an int64, a float64, a string (of type string and
// enum), a []byte or, of type object, a json.RawMessage. In JSON bytes are
// base64 and an int64 keeps all its digits.
package value

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

const (
	// MaxLength bounds strings, bytes and objects whatever a model says.
	MaxLength     = 64 << 10
	defaultLength = 1024
	// maxDepth of an object.
	maxDepth = 64
)

// Type is a property of a model, made ready to judge values.
type Type struct {
	kind     string
	readable bool
	writable bool

	min, max, step number
	maxLength      int
	enum           []string
	tolerance      float64
}

// number is a bound. An int64 is compared with whole bounds exactly.
type number struct {
	set   bool
	whole bool
	i     int64
	f     float64
}

// Compile makes p ready. The error tells what of the model cannot be.
func Compile(p *v1alpha1.Property) (*Type, error) {
	t := &Type{kind: p.Type, maxLength: p.MaxLength, enum: p.Enum, tolerance: p.Tolerance}
	switch p.Type {
	case v1alpha1.TypeBool, v1alpha1.TypeInt64, v1alpha1.TypeFloat64, v1alpha1.TypeString,
		v1alpha1.TypeBytes, v1alpha1.TypeObject:
	case v1alpha1.TypeEnum:
		if len(p.Enum) == 0 {
			return nil, fmt.Errorf("property %.64q: of type enum and without values; give enum", p.Name)
		}
	default:
		return nil, fmt.Errorf("property %.64q: unknown type %.32q", p.Name, p.Type)
	}
	switch p.Access {
	case "r":
		t.readable = true
	case "w":
		t.writable = true
	case "rw":
		t.readable, t.writable = true, true
	default:
		return nil, fmt.Errorf("property %.64q: access %.32q is none of r, w, rw", p.Name, p.Access)
	}
	var err error
	for _, b := range []struct {
		to   *number
		from json.Number
		name string
	}{{&t.min, p.Min, "min"}, {&t.max, p.Max, "max"}, {&t.step, p.Step, "step"}} {
		if *b.to, err = bound(b.from); err != nil {
			return nil, fmt.Errorf("property %.64q: %s: %w", p.Name, b.name, err)
		}
	}
	if t.step.set && t.step.f <= 0 {
		return nil, fmt.Errorf("property %.64q: step %v is not positive", p.Name, t.step.f)
	}
	if t.min.set && t.max.set && t.min.f > t.max.f {
		return nil, fmt.Errorf("property %.64q: min %v is above max %v", p.Name, t.min.f, t.max.f)
	}
	if math.IsNaN(t.tolerance) || t.tolerance < 0 {
		return nil, fmt.Errorf("property %.64q: tolerance %v is negative", p.Name, t.tolerance)
	}
	if t.maxLength <= 0 {
		t.maxLength = defaultLength
		if t.kind == v1alpha1.TypeObject {
			t.maxLength = MaxLength
		}
	}
	t.maxLength = min(t.maxLength, MaxLength)
	return t, nil
}

func bound(n json.Number) (number, error) {
	if n == "" {
		return number{}, nil
	}
	if i, err := strconv.ParseInt(string(n), 10, 64); err == nil {
		return number{set: true, whole: true, i: i, f: float64(i)}, nil
	}
	f, err := strconv.ParseFloat(string(n), 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return number{}, fmt.Errorf("%.32q is not a finite number", string(n))
	}
	return number{set: true, f: f}, nil
}

// Kind is the v1alpha1 Type constant.
func (t *Type) Kind() string { return t.kind }

// Readable and Writable are of the model's access.
func (t *Type) Readable() bool { return t.readable }
func (t *Type) Writable() bool { return t.writable }

// Check tells whether v is one of the type's values, whoever says it.
func (t *Type) Check(v any) error {
	switch v := v.(type) {
	case bool:
		if t.kind == v1alpha1.TypeBool {
			return nil
		}
	case int64:
		if t.kind == v1alpha1.TypeInt64 {
			return t.checkInt(v)
		}
	case float64:
		if t.kind == v1alpha1.TypeFloat64 {
			return t.checkFloat(v)
		}
	case string:
		switch t.kind {
		case v1alpha1.TypeString:
			if len(v) > t.maxLength {
				return fmt.Errorf("%d bytes exceed the maximum length of %d", len(v), t.maxLength)
			}
			if !utf8.ValidString(v) {
				return errors.New("not valid UTF-8")
			}
			return nil
		case v1alpha1.TypeEnum:
			if !slices.Contains(t.enum, v) {
				return fmt.Errorf("%.64q is none of %.256q", v, t.enum)
			}
			return nil
		}
	case []byte:
		if t.kind == v1alpha1.TypeBytes {
			if len(v) > t.maxLength {
				return fmt.Errorf("%d bytes exceed the maximum length of %d", len(v), t.maxLength)
			}
			return nil
		}
	case json.RawMessage:
		if t.kind == v1alpha1.TypeObject {
			return t.checkObject(v)
		}
	}
	return fmt.Errorf("a value of type %s is wanted, not %s", t.kind, kindOf(v))
}

// CheckDesired tells whether v may be wanted of the device.
func (t *Type) CheckDesired(v any) error {
	if !t.writable {
		return errors.New("the model has it read-only")
	}
	if err := t.Check(v); err != nil {
		return err
	}
	if !t.step.set {
		return nil
	}
	from := t.min
	switch v := v.(type) {
	case int64:
		if t.step.whole && (from.whole || !from.set) {
			// In uint64: the distance between two int64 may not fit into one.
			d := uint64(v) - uint64(from.i)
			if v < from.i {
				d = uint64(from.i) - uint64(v)
			}
			if d%uint64(t.step.i) != 0 {
				return fmt.Errorf("%d is not a multiple of the step %d from %d", v, t.step.i, from.i)
			}
			return nil
		}
		return t.checkStep(float64(v), from.f)
	case float64:
		return t.checkStep(v, from.f)
	}
	return nil
}

// checkStep allows for what binary fractions do to a step such as 0.1.
func (t *Type) checkStep(v, from float64) error {
	n := (v - from) / t.step.f
	if math.Abs(n-math.Round(n)) > 1e-6 {
		return fmt.Errorf("%v is not a multiple of the step %v from %v", v, t.step.f, from)
	}
	return nil
}

func (t *Type) checkInt(v int64) error {
	if c := compareInt(v, t.min); t.min.set && c < 0 {
		return fmt.Errorf("%d is below the minimum of %v", v, t.min)
	}
	if c := compareInt(v, t.max); t.max.set && c > 0 {
		return fmt.Errorf("%d is above the maximum of %v", v, t.max)
	}
	return nil
}

func (t *Type) checkFloat(v float64) error {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return fmt.Errorf("%v is not a finite number", v)
	case t.min.set && v < t.min.f:
		return fmt.Errorf("%v is below the minimum of %v", v, t.min)
	case t.max.set && v > t.max.f:
		return fmt.Errorf("%v is above the maximum of %v", v, t.max)
	}
	return nil
}

func (t *Type) checkObject(v json.RawMessage) error {
	if len(v) > t.maxLength {
		return fmt.Errorf("%d bytes exceed the maximum length of %d", len(v), t.maxLength)
	}
	if err := checkDepth(v); err != nil {
		return err
	}
	if !json.Valid(v) {
		return errors.New("not valid JSON")
	}
	if !utf8.Valid(v) {
		return errors.New("not valid UTF-8")
	}
	return nil
}

// checkDepth counts brackets outside of strings; that the JSON is valid is
// checked after it, by code that a deep nesting could not hurt any more.
func checkDepth(v []byte) error {
	depth, in := 0, false
	for i := 0; i < len(v); i++ {
		switch c := v[i]; {
		case in && c == '\\':
			i++
		case c == '"':
			in = !in
		case in:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return fmt.Errorf("nested deeper than %d", maxDepth)
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

func compareInt(v int64, b number) int {
	if b.whole {
		return cmp.Compare(v, b.i)
	}
	return cmp.Compare(float64(v), b.f)
}

func (n number) String() string {
	if n.whole {
		return strconv.FormatInt(n.i, 10)
	}
	return strconv.FormatFloat(n.f, 'g', -1, 64)
}

func kindOf(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case bool:
		return "bool"
	case int64:
		return "int64"
	case float64:
		return "float64"
	case string:
		return "string"
	case []byte:
		return "bytes"
	case json.RawMessage:
		return "object"
	}
	return fmt.Sprintf("%T", v)
}

// Parse reads JSON as a value of the type, and checks it.
func (t *Type) Parse(raw []byte) (any, error) {
	v, err := t.parse(raw)
	if err != nil {
		return nil, err
	}
	if err := t.Check(v); err != nil {
		return nil, err
	}
	return v, nil
}

// ParseDesired reads JSON as a value that may be wanted of the device.
func (t *Type) ParseDesired(raw []byte) (any, error) {
	v, err := t.parse(raw)
	if err != nil {
		return nil, err
	}
	if err := t.CheckDesired(v); err != nil {
		return nil, err
	}
	return v, nil
}

func (t *Type) parse(raw []byte) (any, error) {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
		return nil, fmt.Errorf("a value of type %s is wanted, not null", t.kind)
	}
	switch t.kind {
	case v1alpha1.TypeBool:
		switch string(raw) {
		case "true":
			return true, nil
		case "false":
			return false, nil
		}
	case v1alpha1.TypeInt64:
		if isNumber(raw) {
			return ParseInt(string(raw))
		}
	case v1alpha1.TypeFloat64:
		if isNumber(raw) {
			f, err := strconv.ParseFloat(string(raw), 64)
			if err != nil {
				return nil, fmt.Errorf("%.32q does not fit a float64", raw)
			}
			return f, nil
		}
	case v1alpha1.TypeString, v1alpha1.TypeEnum:
		if raw[0] == '"' {
			if len(raw) > 6*MaxLength+2 {
				return nil, fmt.Errorf("%d bytes exceed the maximum length of %d", len(raw), t.maxLength)
			}
			// The decoder would put U+FFFD in place of what is not UTF-8.
			if !utf8.Valid(raw) {
				return nil, errors.New("not valid UTF-8")
			}
			var s string
			if err := json.Unmarshal(raw, &s); err != nil {
				return nil, errors.New("not a valid JSON string")
			}
			return s, nil
		}
	case v1alpha1.TypeBytes:
		if raw[0] == '"' {
			var s string
			if err := json.Unmarshal(raw, &s); err != nil {
				return nil, errors.New("not a valid JSON string")
			}
			b, err := base64.StdEncoding.DecodeString(s)
			if err != nil {
				return nil, fmt.Errorf("not base64: %w", err)
			}
			return b, nil
		}
	case v1alpha1.TypeObject:
		if len(raw) > t.maxLength {
			return nil, fmt.Errorf("%d bytes exceed the maximum length of %d", len(raw), t.maxLength)
		}
		return json.RawMessage(bytes.Clone(raw)), nil
	}
	return nil, fmt.Errorf("a value of type %s is wanted, not %.32s", t.kind, raw)
}

// isNumber tells whether raw is a number as JSON has it: ParseFloat would take
// Inf, hexadecimal digits and underscores too.
func isNumber(raw []byte) bool {
	return (raw[0] == '-' || raw[0] >= '0' && raw[0] <= '9') && json.Valid(raw)
}

// ParseInt reads a JSON number as an int64. 5.0 and 1e3 are whole numbers too,
// as long as a float64 tells them from their neighbours.
func ParseInt(s string) (any, error) {
	i, err := strconv.ParseInt(s, 10, 64)
	if err == nil {
		return i, nil
	}
	if strings.ContainsAny(s, ".eE") {
		if f, err := strconv.ParseFloat(s, 64); err == nil && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
			return int64(f), nil
		}
		return nil, fmt.Errorf("%.32s is not a whole number", s)
	}
	return nil, fmt.Errorf("%.32s does not fit an int64", s)
}

// Same tells whether a reported value counts as the desired one.
func (t *Type) Same(reported, desired any) bool {
	switch r := reported.(type) {
	case int64:
		d, ok := desired.(int64)
		if !ok {
			return false
		}
		if t.tolerance == 0 || r == d {
			return r == d
		}
		return math.Abs(float64(r)-float64(d)) <= t.tolerance
	case float64:
		d, ok := desired.(float64)
		// What a decimal fraction became on its way is no difference.
		return ok && math.Abs(r-d) <= max(t.tolerance, 1e-9*max(math.Abs(r), math.Abs(d)))
	}
	return Equal(reported, desired)
}

// Equal tells whether two values are the same. Objects are compared as they are
// written.
func Equal(a, b any) bool {
	switch a := a.(type) {
	case []byte:
		b, ok := b.([]byte)
		return ok && bytes.Equal(a, b)
	case json.RawMessage:
		b, ok := b.(json.RawMessage)
		return ok && (bytes.Equal(a, b) || bytes.Equal(compact(a), compact(b)))
	}
	switch b.(type) {
	case []byte, json.RawMessage:
		return false
	}
	return a == b
}

func compact(v []byte) []byte {
	var b bytes.Buffer
	if json.Compact(&b, v) != nil {
		return v
	}
	return b.Bytes()
}

// Within tells whether a is less than band away from b. Only numbers are near
// each other.
func Within(a, b any, band float64) bool {
	if x, ok := a.(int64); ok {
		y, ok := b.(int64)
		return ok && math.Abs(float64(x)-float64(y)) < band
	}
	x, ok1 := a.(float64)
	y, ok2 := b.(float64)
	return ok1 && ok2 && math.Abs(x-y) < band
}

// JSON writes a value that was checked.
func JSON(v any) json.RawMessage { return Append(nil, v) }

// Append appends what JSON returns.
func Append(dst []byte, v any) []byte {
	switch v := v.(type) {
	case bool:
		return strconv.AppendBool(dst, v)
	case int64:
		return strconv.AppendInt(dst, v, 10)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return append(dst, "null"...)
		}
		format := byte('f')
		if abs := math.Abs(v); abs != 0 && (abs < 1e-6 || abs >= 1e21) {
			format = 'e'
		}
		return strconv.AppendFloat(dst, v, format, -1, 64)
	case string:
		b, err := json.Marshal(v)
		if err != nil {
			return append(dst, "null"...)
		}
		return append(dst, b...)
	case []byte:
		dst = append(dst, '"')
		dst = base64.StdEncoding.AppendEncode(dst, v)
		return append(dst, '"')
	case json.RawMessage:
		return append(dst, compact(v)...)
	}
	return append(dst, "null"...)
}

// CheckDesired tells which desired values the model does not allow, and why.
// The others stand. It is nil when all do.
func CheckDesired(model *v1alpha1.DeviceModel, desired map[string]v1alpha1.JSON) map[string]error {
	var bad map[string]error
	refuse := func(name string, err error) {
		if bad == nil {
			bad = make(map[string]error)
		}
		bad[name] = err
	}
	for name, raw := range desired {
		i := slices.IndexFunc(model.Spec.Properties, func(p v1alpha1.Property) bool { return p.Name == name })
		if i < 0 {
			refuse(name, fmt.Errorf("the model %.64q has no such property", model.Name))
			continue
		}
		t, err := Compile(&model.Spec.Properties[i])
		if err != nil {
			refuse(name, err)
			continue
		}
		if _, err := t.ParseDesired(raw.Raw); err != nil {
			refuse(name, err)
		}
	}
	return bad
}

// CheckArgs tells whether a command takes these arguments.
func CheckArgs(cmd *v1alpha1.Command, args map[string]json.RawMessage) error {
	for _, p := range cmd.Params {
		raw, ok := args[p.Name]
		if !ok {
			if p.Required {
				return fmt.Errorf("command %.64q: argument %.64q is missing", cmd.Name, p.Name)
			}
			continue
		}
		t, err := Compile(&v1alpha1.Property{Name: p.Name, Type: p.Type, Access: "w", Min: p.Min, Max: p.Max, Enum: p.Enum})
		if err != nil {
			return fmt.Errorf("command %.64q: %w", cmd.Name, err)
		}
		if _, err := t.ParseDesired(raw); err != nil {
			return fmt.Errorf("command %.64q: argument %.64q: %w", cmd.Name, p.Name, err)
		}
	}
	for name := range args {
		if !slices.ContainsFunc(cmd.Params, func(p v1alpha1.CommandParam) bool { return p.Name == name }) {
			return fmt.Errorf("command %.64q takes no argument %.64q", cmd.Name, name)
		}
	}
	return nil
}
