package profile

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strconv"
	"strings"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// codec turns what a device says of one property into the property's type, and
// back. It does not judge the value: ranges are the twin's.
type codec struct {
	typ  string
	enum []string
	in   map[string]any    // the device's word → value, as decoded JSON
	out  map[string]string // canonical value → word
}

func newCodec(p *v1alpha1.Property) (*codec, error) {
	c := &codec{typ: p.Type, enum: p.Enum}
	switch p.Type {
	case v1alpha1.TypeBool, v1alpha1.TypeInt64, v1alpha1.TypeFloat64, v1alpha1.TypeString,
		v1alpha1.TypeEnum, v1alpha1.TypeBytes, v1alpha1.TypeObject:
	default:
		return nil, fmt.Errorf("type %q is none of bool, int64, float64, string, enum, bytes, object", p.Type)
	}
	if len(p.Map) == 0 {
		return c, nil
	}
	c.in = make(map[string]any, len(p.Map))
	c.out = make(map[string]string, len(p.Map))
	words := make([]string, 0, len(p.Map))
	for word := range p.Map {
		words = append(words, word)
	}
	slices.Sort(words) // of several words for one value, the first is said
	for _, word := range words {
		raw := p.Map[word].Raw
		if raw == nil {
			raw = []byte("null") // as JSON decodes it
		}
		v, err := decodeJSON(raw)
		if err != nil {
			return nil, fmt.Errorf("map, %q: %w", word, err)
		}
		c.in[word] = v
		if v == nil {
			continue // a word for: nothing to report
		}
		typed, err := c.typed(v)
		if err != nil {
			return nil, fmt.Errorf("map, %q: %w", word, err)
		}
		if key := canonical(typed); c.out[key] == "" {
			c.out[key] = word
		}
	}
	return c, nil
}

// errNothing says that a device said nothing of the property: neither a value
// nor a bad one.
var errNothing = errors.New("no value")

// decode makes a value of what the device said.
func (c *codec) decode(raw any, s *scaling) (any, error) {
	if raw == nil && c.typ != v1alpha1.TypeObject {
		if to, mapped := c.in["null"]; mapped && to != nil {
			return c.typed(to)
		}
		return nil, errNothing
	}
	if c.in != nil {
		if word, ok := wordOf(raw); ok {
			if to, ok := c.in[word]; ok {
				if to == nil {
					return nil, errNothing
				}
				return c.typed(to)
			}
		}
	}
	v, err := c.scaled(raw, s)
	if err != nil && len(c.in) > 0 {
		return nil, fmt.Errorf("%w, and map has no such word", err)
	}
	return v, err
}

// wordOf is how a scalar is spelled as a key of map.
func wordOf(raw any) (string, bool) {
	switch v := raw.(type) {
	case string:
		return v, true
	case []byte:
		return string(v), true
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	case int64:
		return strconv.FormatInt(v, 10), true
	case uint64:
		return strconv.FormatUint(v, 10), true
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64), true
	}
	return "", false
}

func (c *codec) typed(raw any) (any, error) { return c.scaled(raw, nil) }

func (c *codec) scaled(raw any, s *scaling) (any, error) {
	switch c.typ {
	case v1alpha1.TypeBool:
		return toBool(raw)
	case v1alpha1.TypeInt64:
		return toInt(raw, s)
	case v1alpha1.TypeFloat64:
		return toFloat(raw, s)
	case v1alpha1.TypeString:
		return toText(raw)
	case v1alpha1.TypeEnum:
		text, err := toText(raw)
		if err == nil && !slices.Contains(c.enum, text) {
			return nil, fmt.Errorf("%s is none of %s", shown(raw), strings.Join(c.enum, ", "))
		}
		return text, err
	case v1alpha1.TypeBytes:
		switch v := raw.(type) {
		case []byte:
			return bytes.Clone(v), nil
		case string:
			b, err := base64.StdEncoding.DecodeString(v)
			if err != nil {
				return nil, fmt.Errorf("%s is no base64", shown(raw))
			}
			return b, nil
		}
		return nil, fmt.Errorf("%s is no base64", shown(raw))
	}
	if b, ok := raw.([]byte); ok {
		raw = string(b)
	}
	b, err := json.Marshal(raw)
	if err != nil {
		return nil, fmt.Errorf("not to be said in JSON: %w", err)
	}
	return json.RawMessage(b), nil
}

func toBool(raw any) (any, error) {
	word, ok := wordOf(raw)
	if ok {
		switch strings.ToLower(strings.TrimSpace(word)) {
		case "true", "1":
			return true, nil
		case "false", "0":
			return false, nil
		}
	}
	return nil, fmt.Errorf("%s is neither true nor false", shown(raw))
}

func toText(raw any) (string, error) {
	word, ok := wordOf(raw)
	if !ok {
		return "", fmt.Errorf("%s is no text", shown(raw))
	}
	return word, nil
}

// toInt is exact unless a scale is a fraction: then it rounds to the nearest.
func toInt(raw any, s *scaling) (any, error) {
	var literal string
	switch v := raw.(type) {
	case int64:
		if s == nil {
			return v, nil
		}
		literal = strconv.FormatInt(v, 10)
	case json.Number, string, []byte, uint64, float64:
		literal, _ = wordOf(v)
		literal = strings.TrimSpace(literal)
	default:
		return nil, fmt.Errorf("%s is no number", shown(raw))
	}
	if s == nil {
		if n, err := strconv.ParseInt(literal, 10, 64); err == nil {
			return n, nil
		}
	}
	r, err := exactly(literal)
	if err != nil {
		return nil, err
	}
	if s != nil {
		r = s.apply(r)
		if !r.IsInt() && !s.whole() {
			r = nearest(r)
		}
	}
	if !r.IsInt() {
		return nil, fmt.Errorf("%.40s is no whole number", literal)
	}
	if !r.Num().IsInt64() {
		return nil, fmt.Errorf("%.40s is beyond 64 bits", literal)
	}
	return r.Num().Int64(), nil
}

func toFloat(raw any, s *scaling) (any, error) {
	var f float64
	switch v := raw.(type) {
	case float64:
		f = v
	case int64:
		f = float64(v)
	case uint64:
		f = float64(v)
	case json.Number, string, []byte:
		literal, _ := wordOf(v)
		literal = strings.TrimSpace(literal)
		if !isNumber(literal) {
			return nil, fmt.Errorf("%.40q is no number", literal)
		}
		var err error
		if f, err = strconv.ParseFloat(literal, 64); err != nil {
			return nil, fmt.Errorf("%.40s is beyond a float64", literal)
		}
	default:
		return nil, fmt.Errorf("%s is no number", shown(raw))
	}
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return nil, fmt.Errorf("%v is no number", f)
	}
	if s == nil {
		return f, nil
	}
	r := new(big.Rat).SetFloat64(f)
	if exact, err := exactly(strconv.FormatFloat(f, 'g', -1, 64)); err == nil {
		r = exact
	}
	f, _ = s.apply(r).Float64()
	if math.IsInf(f, 0) {
		return nil, errors.New("scaled, it is beyond a float64")
	}
	return f, nil
}

// scaling is value = raw*scale+offset, in the decimal numbers as the model
// writes them: 213 times 0.1 is 21.3.
type scaling struct{ factor, offset *big.Rat }

// newScaling is nil where there is nothing to do.
func newScaling(scale, offset float64) (*scaling, error) {
	if (scale == 0 || scale == 1) && offset == 0 {
		return nil, nil
	}
	if scale == 0 {
		scale = 1
	}
	factor, err := exactly(strconv.FormatFloat(scale, 'g', -1, 64))
	if err != nil {
		return nil, fmt.Errorf("scale: %w", err)
	}
	off, err := exactly(strconv.FormatFloat(offset, 'g', -1, 64))
	if err != nil {
		return nil, fmt.Errorf("offset: %w", err)
	}
	return &scaling{factor, off}, nil
}

func (s *scaling) apply(r *big.Rat) *big.Rat {
	r = new(big.Rat).Mul(r, s.factor)
	return r.Add(r, s.offset)
}

func (s *scaling) undo(r *big.Rat) *big.Rat {
	r = new(big.Rat).Sub(r, s.offset)
	return r.Quo(r, s.factor)
}

// whole tells whether whole numbers stay so.
func (s *scaling) whole() bool { return s.factor.IsInt() && s.offset.IsInt() }

// nearest whole number; halves away from zero.
func nearest(r *big.Rat) *big.Rat {
	half := big.NewRat(1, 2)
	if r.Sign() < 0 {
		half.Neg(half)
	}
	sum := half.Add(half, r)
	return new(big.Rat).SetInt(new(big.Int).Quo(sum.Num(), sum.Denom()))
}

// exactly reads a decimal number without loss. Exponents are bounded: 1e999999
// would be a number of a million digits.
func exactly(literal string) (*big.Rat, error) {
	if !isNumber(literal) {
		return nil, fmt.Errorf("%.40q is no number", literal)
	}
	if len(literal) > 400 {
		return nil, fmt.Errorf("%.40s…: a number of %d digits", literal, len(literal))
	}
	if e := strings.IndexAny(literal, "eE"); e >= 0 {
		if exp, err := strconv.Atoi(literal[e+1:]); err != nil || exp < -400 || exp > 400 {
			return nil, fmt.Errorf("%.40s is beyond a float64", literal)
		}
	}
	r, ok := new(big.Rat).SetString(literal)
	if !ok {
		return nil, fmt.Errorf("%.40q is no number", literal)
	}
	return r, nil
}

// isNumber takes decimal numbers only: no NaN, no hexadecimal, no underscores.
func isNumber(s string) bool {
	digits := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= '0' && c <= '9':
			digits = true
		case c == '+' || c == '-':
			if i > 0 && s[i-1] != 'e' && s[i-1] != 'E' {
				return false
			}
		case c == '.':
		case c == 'e' || c == 'E':
			if !digits || i+1 == len(s) {
				return false
			}
		default:
			return false
		}
	}
	return digits
}

// canonical spells a typed value so that equal values are spelled alike.
func canonical(v any) string {
	switch v := v.(type) {
	case bool:
		return strconv.FormatBool(v)
	case int64:
		return strconv.FormatInt(v, 10)
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	case string:
		return "s" + v
	case []byte:
		return "b" + base64.StdEncoding.EncodeToString(v)
	case json.RawMessage:
		var buf bytes.Buffer
		if err := json.Compact(&buf, v); err == nil {
			return "j" + buf.String()
		}
		return "j" + string(v)
	}
	return fmt.Sprintf("?%v", v)
}

// word is a value as a device wants it: text, and whether the text is JSON
// already.
type word struct {
	text   string
	json   bool // it may stand in a JSON payload as it is
	binary []byte
}

// encode is decode backwards.
func (c *codec) encode(v any, s *scaling) (word, error) {
	if said, ok := c.out[canonical(v)]; ok {
		return word{text: said, json: isLiteral(said)}, nil
	}
	switch v := v.(type) {
	case bool:
		return word{text: strconv.FormatBool(v), json: true}, nil
	case int64:
		if s == nil {
			return word{text: strconv.FormatInt(v, 10), json: true}, nil
		}
		return c.unscale(new(big.Rat).SetInt64(v), s)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return word{}, fmt.Errorf("%v is no number", v)
		}
		if s == nil {
			return word{text: strconv.FormatFloat(v, 'f', -1, 64), json: true}, nil
		}
		r, err := exactly(strconv.FormatFloat(v, 'g', -1, 64))
		if err != nil {
			return word{}, err
		}
		return c.unscale(r, s)
	case string:
		return word{text: v}, nil
	case []byte:
		return word{text: base64.StdEncoding.EncodeToString(v), binary: v}, nil
	case json.RawMessage:
		return word{text: string(v), json: true}, nil
	}
	return word{}, fmt.Errorf("a %T is no value of a property", v)
}

func (c *codec) unscale(r *big.Rat, s *scaling) (word, error) {
	r = s.undo(r)
	if r.IsInt() {
		return word{text: r.Num().String(), json: true}, nil
	}
	if c.typ == v1alpha1.TypeInt64 {
		return word{text: nearest(r).Num().String(), json: true}, nil
	}
	f, _ := r.Float64()
	return word{text: strconv.FormatFloat(f, 'f', -1, 64), json: true}, nil
}

// isLiteral tells whether a word of map or a param may stand in JSON as it is:
// a number, true, false or null.
func isLiteral(s string) bool {
	switch s {
	case "true", "false", "null":
		return true
	}
	return isNumber(s) && json.Valid([]byte(s))
}

// shown is a value in an error: short.
func shown(raw any) string {
	switch v := raw.(type) {
	case string:
		return fmt.Sprintf("%.40q", v)
	case []byte:
		return fmt.Sprintf("%.40q", v)
	case map[string]any:
		return "an object"
	case []any:
		return "an array"
	case nil:
		return "null"
	}
	return fmt.Sprintf("%.40v", raw)
}
