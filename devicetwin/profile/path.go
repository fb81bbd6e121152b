package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

const (
	maxPathBytes    = 512
	maxPathSegments = 32
)

// path is a parsed dot path; empty, it is the whole payload.
type path []string

// parsePath reads a dotted path. A segment that is a number is an index where
// it meets an array and a key where it meets an object; a[0] is a.0. A dot or
// a backslash of a key is escaped by a backslash.
func parsePath(s string) (path, error) {
	if s == "" {
		return nil, nil
	}
	if len(s) > maxPathBytes {
		return nil, fmt.Errorf("path %.40q…: longer than %d bytes", s, maxPathBytes)
	}
	var (
		p       path
		segment strings.Builder
		indexed bool // the last segment was an index in brackets
	)
	end := func() error {
		if segment.Len() == 0 {
			return fmt.Errorf("path %q: an empty segment", s)
		}
		if len(p) == maxPathSegments {
			return fmt.Errorf("path %q: more than %d segments", s, maxPathSegments)
		}
		p = append(p, segment.String())
		segment.Reset()
		return nil
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\':
			if i+1 == len(s) {
				return nil, fmt.Errorf("path %q: ends in a backslash", s)
			}
			i++
			segment.WriteByte(s[i])
			indexed = false
		case c == '.' && indexed && segment.Len() == 0:
			if i+1 == len(s) {
				return nil, fmt.Errorf("path %q: an empty segment", s)
			}
			indexed = false
		case c == '.':
			if err := end(); err != nil {
				return nil, err
			}
			if i+1 == len(s) {
				return nil, fmt.Errorf("path %q: an empty segment", s)
			}
		case c == '[':
			closing := strings.IndexByte(s[i:], ']')
			if closing < 2 || strings.Trim(s[i+1:i+closing], "0123456789") != "" {
				return nil, fmt.Errorf("path %q: want [index]", s)
			}
			if segment.Len() > 0 {
				if err := end(); err != nil {
					return nil, err
				}
			} else if len(p) > 0 && !indexed {
				return nil, fmt.Errorf("path %q: an empty segment", s)
			}
			segment.WriteString(s[i+1 : i+closing])
			if err := end(); err != nil {
				return nil, err
			}
			i += closing
			indexed = true
		default:
			if indexed && segment.Len() == 0 {
				return nil, fmt.Errorf("path %q: want a dot after ]", s)
			}
			segment.WriteByte(c)
		}
	}
	if segment.Len() > 0 {
		if err := end(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// find follows p; false: there is no such thing in doc.
func (p path) find(doc any) (any, bool) {
	for _, segment := range p {
		switch at := doc.(type) {
		case map[string]any:
			next, ok := at[segment]
			if !ok {
				return nil, false
			}
			doc = next
		case []any:
			i, err := strconv.Atoi(segment)
			if err != nil || i < 0 || i >= len(at) {
				return nil, false
			}
			doc = at[i]
		default:
			return nil, false
		}
	}
	return doc, true
}

// Bounds of a payload.
const (
	MaxPayload = 256 << 10
	MaxDepth   = 64
)

var errDepth = fmt.Errorf("nested deeper than %d", MaxDepth)

// decodeJSON reads one JSON value, numbers as they are written.
func decodeJSON(b []byte) (any, error) {
	if err := checkDepth(b); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	if dec.More() || strings.TrimSpace(string(b[dec.InputOffset():])) != "" {
		return nil, errors.New("more follows the JSON value")
	}
	return v, nil
}

// checkDepth looks before the decoder builds anything.
func checkDepth(b []byte) error {
	depth, inString := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inString:
			if c == '\\' {
				i++
			} else if c == '"' {
				inString = false
			}
		case c == '"':
			inString = true
		case c == '{' || c == '[':
			if depth++; depth > MaxDepth {
				return errDepth
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// String is a path that parsePath reads as p.
func (p path) String() string {
	escape := strings.NewReplacer(`\`, `\\`, `.`, `\.`, `[`, `\[`)
	parts := make([]string, len(p))
	for i, segment := range p {
		parts[i] = escape.Replace(segment)
	}
	return strings.Join(parts, ".")
}
