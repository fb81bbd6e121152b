package v1alpha1

import (
	"cmp"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Version orders what one node says of a device: a later one supersedes an
// earlier one of the same incarnation. It costs no write to the disk to make
// one: Epoch is raised and stored once per start of edgecore, Seq counts in
// memory, node-wide.
//
// The zero Version is older than every other.
type Version struct {
	Incarnation string // 16 lower-case hexadecimal digits; new when the node's twin store was made anew
	Epoch       uint64
	Seq         uint64
}

// IsZero tells whether nothing was ever said.
func (v Version) IsZero() bool { return v == Version{} }

// Compare orders versions of one incarnation. Versions of different
// incarnations have no order: which is the newer is known by who holds the
// newest authenticated tunnel; see Supersedes.
func (v Version) Compare(o Version) int {
	if c := cmp.Compare(v.Epoch, o.Epoch); c != 0 {
		return c
	}
	return cmp.Compare(v.Seq, o.Seq)
}

// Supersedes tells whether v, said by the node's present incarnation, replaces
// old. Another incarnation's word is always replaced.
func (v Version) Supersedes(old Version) bool {
	return v.Incarnation != old.Incarnation || v.Compare(old) > 0
}

// String is incarnation/epoch/seq, or "" for the zero Version. It is an ETag
// without its quotes.
func (v Version) String() string {
	if v.IsZero() {
		return ""
	}
	return v.Incarnation + "/" + strconv.FormatUint(v.Epoch, 10) + "/" + strconv.FormatUint(v.Seq, 10)
}

// ParseVersion reads what String wrote.
func ParseVersion(s string) (Version, error) {
	if s == "" {
		return Version{}, nil
	}
	bad := func(why error) (Version, error) {
		return Version{}, fmt.Errorf("version %.80q: want incarnation/epoch/seq: %w", s, why)
	}
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return bad(fmt.Errorf("%d parts", len(parts)))
	}
	if len(parts[0]) != 16 || strings.Trim(parts[0], "0123456789abcdef") != "" {
		return bad(errors.New("the incarnation is not 16 hexadecimal digits"))
	}
	epoch, err := strconv.ParseUint(parts[1], 10, 64)
	if err != nil {
		return bad(err)
	}
	seq, err := strconv.ParseUint(parts[2], 10, 64)
	if err != nil {
		return bad(err)
	}
	return Version{parts[0], epoch, seq}, nil
}

// MarshalText is String.
func (v Version) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText is ParseVersion.
func (v *Version) UnmarshalText(b []byte) error {
	p, err := ParseVersion(string(b))
	if err == nil {
		*v = p
	}
	return err
}
