package migrate

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
)

const mbit = 1e6 / 8

// divideCase is one of testdata/divide.txt.
type divideCase struct {
	bounds  []bound
	reached map[string]int64
	claims  []claim
	wants   []string
}

func TestDivide(t *testing.T) {
	script, err := os.ReadFile("testdata/divide.txt")
	if err != nil {
		t.Fatal(err)
	}
	cases := 0
	x := divideCase{reached: map[string]int64{}}
	for i, line := range append(strings.Split(string(script), "\n"), "") {
		words := strings.Fields(line)
		if len(words) == 0 && len(x.claims) > 0 {
			cases++
			for c, g := range divide(x.claims, x.bounds, x.reached) {
				got := "-"
				if g.rate > 0 {
					got = strconv.FormatFloat(float64(g.rate)/mbit, 'f', 1, 64)
				}
				got = strings.TrimSpace(strings.TrimSuffix(got, ".0") + " " + map[string]string{otherMoves: "other"}[g.by])
				if g.by != otherMoves {
					got = strings.TrimSpace(got + " " + g.by)
				}
				if got != x.wants[c] {
					t.Errorf("case that ends before line %d: claim %d gets %q, want %q", i+1, c+1, got, x.wants[c])
				}
			}
			x = divideCase{reached: map[string]int64{}}
		}
		if len(words) > 0 && words[0] != "#" {
			if err := x.add(words); err != nil {
				t.Fatalf("line %d: %v", i+1, err)
			}
		}
	}
	if cases < 20 {
		t.Errorf("only %d cases in the script", cases)
	}
}

func (x *divideCase) add(words []string) error {
	number := func(s string) int64 {
		n, err := strconv.ParseFloat(s, 64)
		if err != nil && s != "-" {
			panic(err)
		}
		return int64(n * mbit)
	}
	switch {
	case words[0] == "bound" && len(words) == 3:
		x.bounds = append(x.bounds, bound{strings.TrimPrefix(words[1], "all"), number(words[2]), words[1]})
	case words[0] == "reached" && len(words) == 3:
		x.reached[words[1]] = number(words[2])
	case len(words) >= 8 && words[6] == "=":
		x.claims = append(x.claims, claim{site: words[1], weight: Priority(words[2]).weight(), own: number(words[3]),
			used: number(words[4]), given: number(words[5]), stopped: words[2] == "stopped"})
		x.wants = append(x.wants, strings.Join(words[7:], " "))
	default:
		return fmt.Errorf("not understood: %q", words)
	}
	return nil
}

// Whatever is claimed, no bound is exceeded, nothing under a bound is given to
// nobody, and every move gets something.
func TestDivideKeepsBounds(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		x := divideCase{reached: map[string]int64{"a": r.Int64N(2e8), "b": r.Int64N(2e8)}}
		for _, site := range []string{"a", "b", ""} {
			if r.IntN(2) == 0 {
				x.bounds = append(x.bounds, bound{site, 1e6 + r.Int64N(1e8), "bound " + site})
			}
		}
		for range 1 + r.IntN(5) {
			c := claim{site: string(rune('a' + r.IntN(2))), weight: Priorities[r.IntN(3)].weight(), used: r.Int64N(1e8), stopped: r.IntN(5) == 0}
			if r.IntN(2) == 0 {
				c.own = 1 + r.Int64N(1e8)
			}
			if r.IntN(2) == 0 {
				c.given = 1 + r.Int64N(1e8)
			}
			x.claims = append(x.claims, c)
		}
		grants := divide(x.claims, x.bounds, x.reached)
		for i, g := range grants {
			if own := x.claims[i].own; g.rate < 0 || own > 0 && (g.rate == 0 || g.rate > own) {
				t.Fatalf("%+v: claim %d gets %+v", x, i, g)
			}
		}
		for _, b := range x.bounds {
			var sum int64
			for i, g := range grants {
				if b.site == "" || b.site == x.claims[i].site {
					sum += g.rate
					if g.rate == 0 {
						t.Fatalf("%+v: claim %d is not bound: %+v", x, i, grants)
					}
				}
			}
			if sum > b.most+int64(len(grants)) {
				t.Fatalf("%+v: %+v exceeds %+v by %d", x, grants, b, sum-b.most)
			}
		}
	}
}

// Moves whose link gives each what it asks for in equal parts come to the shares
// of their priorities within ten seconds, and one that begins to send has its
// share again within five.
func TestDivideSettles(t *testing.T) {
	claims := []claim{{site: "a", weight: High.weight()}, {site: "a", weight: Low.weight()}}
	second := func(wants ...float64) (used []float64) {
		const link = 200 * mbit
		grants := divide(claims, nil, map[string]int64{"a": int64(link)})
		left := float64(link)
		for range 400 { // the network shares equally
			for i := range claims {
				if len(used) <= i {
					used = append(used, 0)
				}
				most := wants[i]
				if g := grants[i].rate; g > 0 {
					most = min(most, float64(g))
				}
				more := min(left, link/400, most-used[i])
				used[i], left = used[i]+more, left-more
			}
		}
		for i := range claims {
			claims[i].used, claims[i].given = int64(used[i]), grants[i].rate
		}
		return used
	}
	var used []float64
	for range 10 {
		used = second(1e12, 1e12)
	}
	if got := used[0] / used[1]; got < 3.9 || got > 4.1 {
		t.Errorf("shares of high and low are %v", used)
	}
	for range 10 {
		used = second(10*mbit, 1e12)
	}
	if used[1] < 180*mbit {
		t.Errorf("the first idles, the other has %g Mbit/s", used[1]/mbit)
	}
	for range 6 {
		used = second(1e12, 1e12)
	}
	if used[0] < 150*mbit {
		t.Errorf("the first is back and has %g Mbit/s", used[0]/mbit)
	}
}
