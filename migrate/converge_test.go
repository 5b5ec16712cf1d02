package migrate

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

var verdicts = map[verdict]string{goOn: "on", throttle: "throttle", stopNow: "stop", giveUp: "fail"}

// TestConvergence plays testdata/converge.txt.
func TestConvergence(t *testing.T) {
	script, err := os.ReadFile("testdata/converge.txt")
	if err != nil {
		t.Fatal(err)
	}
	const mib = 1 << 20
	var c convergence
	var now float64
	lines := 0
	for i, line := range strings.Split(string(script), "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		if words[0] == "move" {
			var goal int
			c, now = convergence{}, 0
			if _, err := fmt.Sscan(strings.Join(words[1:], " "), &goal, &c.onStall); err != nil {
				t.Fatalf("line %d: %v", i+1, err)
			}
			c.goal = time.Duration(goal) * time.Millisecond
			continue
		}
		lines++
		times := 1
		if words[0] == "x" {
			fmt.Sscan(words[1], &times)
			words = words[2:]
		}
		var after, left, link float64
		var percent int
		if _, err := fmt.Sscan(strings.Join(words[:4], " "), &after, &left, &link, &percent); err != nil || words[4] != "=" {
			t.Fatalf("line %d: %q: %v", i+1, line, err)
		}
		want := strings.Join(words[5:], " ")
		for n := range times {
			now += after
			is := verdicts[c.begin(roundStart{at: time.Duration(now * float64(time.Second)), left: int64(left * mib), link: int64(link * mib), takes: int64(link * mib),
				base: 200 * time.Millisecond, throttle: percent})]
			if c.stalled {
				is += " stalled"
			}
			if is != want {
				t.Errorf("line %d, %d: %s: it is %s", i+1, n+1, line, is)
			}
		}
	}
	if lines < 60 {
		t.Errorf("only %d lines in the script", lines)
	}
}

// busyGuest dirties its working set at random, and QEMU throttles it as it does
// with what hypervisor.OutOptions asks of it.
type busyGuest struct {
	set, dirty float64 // MiB, MiB/s
	link       float64 // MiB/s
	throttled  float64 // of a guest throttled by 1: the part of its dirtying that is left all the same
}

// move plays rounds until the guest is stopped or an hour has passed.
func (g busyGuest) move(o OnStall) (seconds float64, last roundStart, end verdict) {
	const mib = 1 << 20
	c := convergence{goal: DefaultDowntime, onStall: o}
	left, high, percent := g.set, 0, 0
	period, sent, dirtied := 0.0, 0.0, 0.0
	for seconds < 3600 {
		last = roundStart{at: time.Duration(seconds * float64(time.Second)), left: int64(left * mib), link: int64(g.link * mib), takes: int64(g.link * mib),
			base: 150 * time.Millisecond, throttle: percent}
		if end = c.begin(last); end == stopNow || end == giveUp {
			return seconds, last, end
		}
		took := max(left/g.link, 0.02)
		rate := g.dirty * (1 - float64(percent)/100*(1-g.throttled))
		next := min(rate*took, g.set)
		seconds, period, sent, dirtied, left = seconds+took, period+took, sent+left, dirtied+next, next
		if period < 1 {
			continue
		}
		if dirtied > sent/2 {
			high++
		}
		if high == 2 && o == StallThrottle {
			high = 0
			if percent == 0 {
				percent = 1
			} else {
				percent = min(percent+20, fullThrottle)
			}
		}
		period, sent, dirtied = 0, 0, 0
	}
	return seconds, last, end
}

// A guest that dirties at the link's rate, and at twice and ten times that, ends as
// the operator wants.
func TestConvergenceEnds(t *testing.T) {
	for _, rate := range []float64{0.1, 0.5, 0.9, 1, 2, 10} {
		g := busyGuest{set: 200, dirty: 20 * rate, link: 20}
		for _, o := range OnStalls {
			seconds, last, end := g.move(o)
			down := last.downtime()
			t.Logf("%g times the link, %s: %.0f s, %.1f MiB left, throttled by %d, down %v: %s", rate, o, seconds, float64(last.left)/(1<<20), last.throttle, down, verdicts[end])
			fits := down <= DefaultDowntime
			switch {
			case rate < 1 && (end != stopNow || !fits || seconds > 200):
				t.Errorf("%g times the link, %s: a guest that converges ends with %s after %.0f s, %v down", rate, o, verdicts[end], seconds, down)
			case rate < 1:
			case o == StallThrottle && (end != stopNow || !fits):
				t.Errorf("%g times the link: with throttling it ends with %s, %v down", rate, verdicts[end], down)
			case o == StallStop && (end != stopNow || fits):
				t.Errorf("%g times the link: it is stopped at once, but ends with %s, %v down", rate, verdicts[end], down)
			case o == StallFail && end != giveUp, o == StallWait && end != goOn:
				t.Errorf("%g times the link, %s: it ends with %s", rate, o, verdicts[end])
			}
		}
	}
	// One on which throttling has no effect goes on until it does less, if it would be down for long.
	hog := busyGuest{set: 200, dirty: 40, link: 20, throttled: 1}
	if _, last, end := hog.move(StallThrottle); end == stopNow || last.throttle != fullThrottle {
		t.Errorf("a guest that throttling does not help: %s at %v, throttled by %d", verdicts[end], last.downtime(), last.throttle)
	}
	hog.set = 20 // 1.15 s
	if _, last, end := hog.move(StallThrottle); end != stopNow || last.downtime() > StallPatience*DefaultDowntime {
		t.Errorf("a small guest that throttling does not help: %s at %v", verdicts[end], last.downtime())
	}
}

func TestDowntimeIsBounded(t *testing.T) {
	for _, r := range []Request{{Downtime: -1}, {Downtime: LeastDowntime - 1}, {Downtime: MostDowntime + 1}, {OnStall: "panic"}} {
		if r.Validate() == nil {
			t.Errorf("%+v passes", r)
		}
	}
	for _, r := range []Request{{}, {Downtime: LeastDowntime}, {Downtime: MostDowntime, OnStall: StallFail}} {
		if err := r.Validate(); err != nil {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if r := (Request{}); r.downtime() != 300*time.Millisecond || r.onStall() != StallThrottle {
		t.Errorf("a move that says nothing aims at %v, %s", r.downtime(), r.onStall())
	}
}
