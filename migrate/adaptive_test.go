package migrate

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestAdaptive plays testdata/adaptive.txt.
func TestAdaptive(t *testing.T) {
	script, err := os.ReadFile("testdata/adaptive.txt")
	if err != nil {
		t.Fatal(err)
	}
	var a adaptive
	lines := 0
	for i, line := range strings.Split(string(script), "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		if words[0] == "move" {
			var least, most float64
			if _, err := fmt.Sscan(strings.Join(words[1:], " "), &least, &most); err != nil {
				t.Fatalf("line %d: %v", i+1, err)
			}
			a = adaptive{least: int64(least * mbit), most: int64(most * mbit)}
			continue
		}
		lines++
		held := words[5] == "held"
		words = slices.DeleteFunc(words, func(w string) bool { return w == "held" || w == "=" })
		var times, round int
		var dirty, left, got float64
		var want string
		if _, err := fmt.Sscan(strings.Join(words, " "), &times, &round, &dirty, &left, &got, &want); err != nil {
			t.Fatalf("line %d: %v", i+1, err)
		}
		is := ""
		for range times {
			rate, full := a.follow(roundSample{round: round, dirty: int64(dirty * mbit), left: int64(left * (1 << 20)), got: int64(got * mbit), held: held})
			is = fmt.Sprint(float64(rate) / mbit)
			switch {
			case full:
				is = "full"
			case rate == 0:
				is = "pass"
			}
		}
		if is != want {
			t.Errorf("line %d: %s: it is %s", i+1, line, is)
		}
	}
	if lines < 30 {
		t.Errorf("only %d lines in the script", lines)
	}
}

// Where the link gives more than a guest dirties and the increment, rounds get
// shorter at just that rate until little is left; else the rest soon goes at full
// speed.
func TestAdaptiveEnds(t *testing.T) {
	for _, tt := range []struct {
		dirty, link float64 // Mbit/s
		paced       bool    // to the end
	}{{1, 200, true}, {100, 200, true}, {140, 200, true}, {240, 200, false}, {400, 200, false}} {
		a := adaptive{least: 20 * mbit}
		left, got, seconds := 512.0*(1<<20), 0.0, 0.0
		for round := 2; !a.last && round < 100; round++ {
			dirtied := 0.0
			for left > 0 && !a.last {
				rate, _ := a.follow(roundSample{round: round, dirty: int64(tt.dirty * mbit), left: int64(left), got: int64(got)})
				got = tt.link * mbit
				if rate > 0 {
					got = min(got, float64(rate))
				}
				if rate > int64((tt.dirty+50)*mbit) {
					t.Errorf("%+v: round %d at %g Mbit/s", tt, round, float64(rate)/mbit)
				}
				dt := min(1, left/got)
				left, dirtied, seconds = left-got*dt, dirtied+tt.dirty*mbit*dt, seconds+dt
			}
			left = max(left, 0) + dirtied
		}
		if paced := left < 1<<20; !a.last || paced != tt.paced || seconds > 150 {
			t.Errorf("%+v: ends at full speed: %v, after %g seconds with %g bytes left", tt, a.last, seconds, left)
		}
	}
}
