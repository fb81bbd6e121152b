package edgeapi

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

var sampleToken = Token{ID: "abcdefg2", Secret: strings.Repeat("k7", 16), Pin: CAPin{1, 2, 3}}

func TestTokenText(t *testing.T) {
	got, err := ParseToken(" " + sampleToken.Text() + "\n")
	if err != nil || got != sampleToken {
		t.Errorf("%#v is read back as %#v, error %v", sampleToken, got, err)
	}
}

func TestTokenKeepsItsSecret(t *testing.T) {
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "token", sampleToken)
	for _, s := range []string{fmt.Sprint(sampleToken), fmt.Sprintf("%+v %#v %s %q", sampleToken, sampleToken, sampleToken, sampleToken), log.String()} {
		if strings.Contains(s, sampleToken.Secret) {
			t.Errorf("the secret shows in %s", s)
		}
	}
}

func TestParseTokenErrors(t *testing.T) {
	text := sampleToken.Text()
	for _, c := range []struct{ text, want string }{
		{"", "token is empty"},
		{"hello", `token does not begin with "skerry1.": it is no Skerry join token`},
		{strings.Repeat("skerry", 50), "token has 300 characters, more than any token has"},
		{strings.Replace(text, "skerry1", "skerry2", 1), `token is of a form this version does not know (it begins with something other than "skerry1.")`},
		{text[:strings.LastIndex(text, ".")], "token has 3 parts between dots, not 4: it was cut or joined when it was copied"},
		{text[:len(text)-1], "token's last part is not a CA hash: it was cut or changed when it was copied"},
		{strings.Replace(text, "k7", "k8", 1), "token's secret has a character other than a-z and 2-7: it was changed when it was copied"},
		{strings.Replace(text, "abc", "ab", 1), "token's id has 7 characters, not 8: it was cut or changed when it was copied"},
	} {
		if _, err := ParseToken(c.text); err == nil || err.Error() != c.want {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(sampleToken.Text())
	f.Add("skerry1...")
	f.Add("skerry1.abcdefg2.x.y")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			if len(err.Error()) > 300 {
				t.Errorf("error of %d characters", len(err.Error()))
			}
			return
		}
		if token.Text() != strings.TrimSpace(text) {
			t.Errorf("%q is read as %q", text, token.Text())
		}
	})
}
