package profile

import (
	"encoding/json"
	"fmt"
	"strings"
)

// template is text with ${name} in it. Nothing else is special in it; a ${
// without its } is an error.
type template struct {
	parts []part
	json  bool // the whole is JSON: what is put in is encoded
}

type part struct {
	text   string
	name   string // not empty: stands for what has this name
	quoted bool   // within a JSON string
}

// parseTemplate reads s. known tells which names there are.
func parseTemplate(s string, known func(string) bool) (*template, error) {
	t := &template{}
	if lead := strings.TrimLeft(s, " \t\r\n"); lead != "" {
		t.json = lead[0] == '{' && !strings.HasPrefix(lead, "${") || lead[0] == '[' || lead[0] == '"'
	}
	quoted := false
	for {
		start := strings.Index(s, "${")
		text := s
		if start >= 0 {
			text = s[:start]
		}
		if text != "" {
			t.parts = append(t.parts, part{text: text})
			quoted = endsQuoted(text, quoted)
		}
		if start < 0 {
			return t, nil
		}
		end := strings.IndexByte(s[start:], '}')
		if end < 0 {
			return nil, fmt.Errorf("%.80q: ${ without }", s[start:])
		}
		name := s[start+2 : start+end]
		if !known(name) {
			return nil, fmt.Errorf("${%.40s}: no such param", name)
		}
		t.parts = append(t.parts, part{name: name, quoted: quoted && t.json})
		s = s[start+end+1:]
	}
}

func endsQuoted(text string, quoted bool) bool {
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\\':
			if quoted {
				i++
			}
		case '"':
			quoted = !quoted
		}
	}
	return quoted
}

// expand puts the words in.
func (t *template) expand(get func(name string) (word, bool)) ([]byte, error) {
	if len(t.parts) == 1 && t.parts[0].name != "" {
		w, ok := get(t.parts[0].name)
		if !ok {
			return nil, fmt.Errorf("${%s}: has no value", t.parts[0].name)
		}
		if w.binary != nil {
			return w.binary, nil
		}
		return []byte(w.text), nil
	}
	var b strings.Builder
	for _, p := range t.parts {
		if p.name == "" {
			b.WriteString(p.text)
			continue
		}
		w, ok := get(p.name)
		if !ok {
			return nil, fmt.Errorf("${%s}: has no value", p.name)
		}
		switch {
		case !t.json || w.json && !p.quoted:
			b.WriteString(w.text)
		default:
			encoded, err := encodeString(w.text)
			if err != nil {
				return nil, fmt.Errorf("${%s}: %w", p.name, err)
			}
			if p.quoted {
				encoded = encoded[1 : len(encoded)-1]
			}
			b.WriteString(encoded)
		}
	}
	return []byte(b.String()), nil
}

// encodeString is s in JSON, < > & as they are: devices are no browsers.
func encodeString(s string) (string, error) {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(s)
	return strings.TrimSuffix(b.String(), "\n"), err
}

// plain puts params into a topic or a path.
func plain(s string, params map[string]string) (string, error) {
	if !strings.Contains(s, "${") {
		return s, nil
	}
	t, err := parseTemplate(s, func(name string) bool { _, ok := params[name]; return ok })
	if err != nil {
		return "", err
	}
	t.json = false
	b, err := t.expand(func(name string) (word, bool) { v, ok := params[name]; return word{text: v}, ok })
	return string(b), err
}
