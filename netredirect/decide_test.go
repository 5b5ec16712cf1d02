package netredirect

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// script reads the lines of a file in testdata that are no comments: fields, and
// what is behind the arrow.
func script(t *testing.T, path string, each func(line string, fields []string, want string)) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i, line := range strings.Split(string(text), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		n++
		left, want, ok := strings.Cut(line, "→")
		if !ok {
			t.Fatalf("%s, line %d: no arrow", path, i+1)
		}
		each(fmt.Sprintf("%s, line %d", path, i+1), strings.Fields(left), strings.TrimSpace(want))
	}
	if n < 10 {
		t.Errorf("only %d lines in %s", n, path)
	}
}

func seconds(t *testing.T, s string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDecide(t *testing.T) {
	script(t, "testdata/decide.txt", func(line string, fields []string, want string) {
		s := situation{Mode: Mode(fields[0]), Idle: seconds(t, fields[1]), Quiet: seconds(t, fields[2]), Left: seconds(t, fields[3])}
		for _, word := range fields[4:] {
			what, value, _ := strings.Cut(word, "=")
			switch what {
			case "home":
				s.Home = true
			case "drained":
				s.Drained = true
			case "dns":
				s.DNS = true
			case "known":
				s.NamesKnown = true
			case "served":
				s.NameServed = true
			case "bgp":
				s.BGP = true
			case "seen":
				s.RouteSeen = true
			case "cached":
				s.CachedFor = seconds(t, value)
			case "names", "flows":
				n := 0
				if _, err := fmt.Sscan(value, &n); err != nil {
					t.Fatal(err)
				}
				if what == "names" {
					s.Names = n
				} else {
					s.Flows = n
				}
			default:
				t.Fatalf("%s: %q is not known", line, word)
			}
		}
		remove, waits := decide(s)
		if remove != (len(waits) == 0) {
			t.Errorf("%s: removed: %v, and waits for %q", line, remove, waits)
		}
		if remove {
			waits = []string{"remove"}
		}
		wanted := strings.Split(want, " + ")
		if !slices.EqualFunc(waits, wanted, strings.Contains) {
			t.Errorf("%s: %q, not %q", line, waits, wanted)
		}
	})
}

func TestCachedFor(t *testing.T) {
	now := time.Unix(1e9, 0)
	script(t, "testdata/cached.txt", func(line string, fields []string, want string) {
		var lowered time.Time
		if fields[0] != "never" {
			lowered = now.Add(-seconds(t, fields[0]))
		}
		got := cachedFor(now, lowered, now.Add(-seconds(t, fields[1])), seconds(t, fields[2]), seconds(t, fields[3]))
		want, _, _ = strings.Cut(want, " ")
		if got != seconds(t, want) {
			t.Errorf("%s: %v, not %s", line, got, want)
		}
	})
}
