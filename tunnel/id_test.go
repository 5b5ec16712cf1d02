package tunnel

import (
	"crypto/ed25519"
	"strings"
	"testing"
)

func testID(t testing.TB) ID {
	t.Helper()
	return testIdentity(t).ID()
}

func TestIDForm(t *testing.T) {
	// Fixed, since IDs stand in operators' configurations.
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	const want = "COPDSQH-GJNKJC4-RARDM2B-V2BMKH4-QJXASR2-5GQNHQC-WN4PCLQ-BYFWYZY"
	if got := idOf(key); got != want {
		t.Errorf("ID of the all-zero seed is %s, want %s", got, want)
	}
}

func TestParseIDAcceptsWhatOperatorsPaste(t *testing.T) {
	id := testID(t)
	s := string(id)
	for _, in := range []string{
		s,
		strings.ToLower(s),
		strings.ReplaceAll(s, "-", ""),
		strings.ReplaceAll(s, "-", " "),
		"  " + s[:8] + "\n\t" + s[8:] + "\r\n",
	} {
		got, err := ParseID(in)
		if err != nil || got != id {
			t.Errorf("ParseID(%q) = %q, %v", in, got, err)
		}
	}
}

func TestParseIDRecognisesTypos(t *testing.T) {
	s := string(testID(t))
	for i := range s {
		if s[i] == '-' {
			continue
		}
		other := byte('A')
		if s[i] == other {
			other = 'B'
		}
		typo := s[:i] + string(other) + s[i+1:]
		if id, err := ParseID(typo); err == nil {
			t.Errorf("typo at %d is taken as the ID %s", i, id)
		}
	}
	if i := strings.IndexFunc(s[1:], func(r rune) bool { return r != '-' && r != rune(s[0]) }); i >= 0 {
		b := []byte(s)
		b[0], b[i+1] = b[i+1], b[0]
		if _, err := ParseID(string(b)); err == nil {
			t.Error("two letters that changed places are not noticed")
		}
	}
}

func TestParseIDRejects(t *testing.T) {
	s := string(testID(t))
	for n := range len(s) {
		if _, err := ParseID(s[:n]); err == nil || !strings.HasPrefix(err.Error(), "not a wanmig ID: ") {
			t.Errorf("prefix of %d characters: error %v", n, err)
		}
	}
	for _, in := range []string{s + "A", s + s, "0" + s[1:], "1" + s[1:], "é" + s[1:], strings.Repeat("-", 300), s[:10] + "\x00" + s[10:]} {
		if _, err := ParseID(in); err == nil || !strings.HasPrefix(err.Error(), "not a wanmig ID: ") {
			t.Errorf("ParseID(%q): error %v", in, err)
		}
	}
}

func FuzzParseID(f *testing.F) {
	s := string(idOf(make([]byte, ed25519.PublicKeySize)))
	f.Add(s)
	f.Add(strings.ToLower(s))
	f.Add(s[:20])
	f.Add(strings.Replace(s, "A", "0", 1))
	f.Add("")
	f.Fuzz(func(t *testing.T, in string) {
		id, err := ParseID(in)
		if err != nil {
			if id != "" {
				t.Fatalf("an ID %q with the error %v", id, err)
			}
			return
		}
		again, err := ParseID(string(id))
		if err != nil || again != id {
			t.Fatalf("%q parses to %q, and that to %q, %v", in, id, again, err)
		}
	})
}
