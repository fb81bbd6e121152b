package migrate

import (
	"fmt"
	"io"
	"strings"
)

// Finding is a field that was not carried as it is.
type Finding struct {
	Object string // such as Device default/press
	Field  string // its path; empty: the whole object
	Lost   bool   // not carried at all, else carried with another meaning
	Why    string
	Do     string // what to do; may be empty
}

func (f Finding) String() string {
	what := "check"
	if f.Lost {
		what = "lost"
	}
	s := f.Object
	if f.Field != "" {
		s += " " + f.Field
	}
	s = what + ": " + s + ": " + f.Why
	if f.Do != "" {
		s += "; " + f.Do
	}
	return s
}

// reporter gathers the findings of one object.
type reporter struct {
	object string
	to     *[]Finding
}

func (r *reporter) lost(field, why, do string)  { r.add(Finding{r.object, field, true, why, do}) }
func (r *reporter) check(field, why, do string) { r.add(Finding{r.object, field, false, why, do}) }

// unreadable is for an object that is not what its kind says; KubeEdge's API
// server would not have taken it either.
func (r *reporter) unreadable(err error) { r.lost("", "cannot be read: "+err.Error(), "") }

func (r *reporter) add(f Finding) {
	// Values come from the manifest: one line each, and not endless.
	clean := func(s string) string {
		s = strings.Map(func(c rune) rune {
			if c < ' ' || c == 0x7f {
				return ' '
			}
			return c
		}, s)
		if len(s) > 400 {
			s = strings.ToValidUTF8(s[:400], "") + "…"
		}
		return s
	}
	f.Object, f.Field, f.Why, f.Do = clean(f.Object), clean(f.Field), clean(f.Why), clean(f.Do)
	*r.to = append(*r.to, f)
}

// WriteReport writes the findings and a summary.
func (r *Result) WriteReport(w io.Writer) error {
	var b strings.Builder
	lost := 0
	for _, f := range r.Findings {
		if f.Lost {
			lost++
		}
		fmt.Fprintln(&b, f)
	}
	fmt.Fprintf(&b, "%d models, %d devices and %d routes from %d objects; %d fields lost, %d to check\n",
		r.Models, r.Devices, r.Routes, r.Read, lost, len(r.Findings)-lost)
	_, err := io.WriteString(w, b.String())
	return err
}
