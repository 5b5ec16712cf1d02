package migrate

import (
	"testing"
	"time"
)

func TestWhatTheLinkTakes(t *testing.T) {
	const mib = 1 << 20
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	was := passed{at: began, round: 2, held: 5 * time.Second, memory: 1000 * mib, content: 400 * mib, frames: 150 * mib, wire: 300 * mib}
	then := func(after, held time.Duration, memory, content, frames, wire int64) passed {
		return passed{at: began.Add(after), round: 3, held: was.held + held, memory: was.memory + memory*mib, content: was.content + content*mib,
			frames: was.frames + frames*mib, wire: was.wire + uint64(wire*mib)}
	}
	for name, c := range map[string]struct {
		is          passed
		first       bool // the round before was the first pass
		paced       bool
		link, takes int64 // MiB/s
		ratio       float64
	}{
		"a long round":                     {is: then(4*time.Second, 0, 80, 40, 20, 60), link: 15, takes: 20, ratio: 0.5},
		"the time it was not read":         {is: then(8*time.Second, 4*time.Second, 80, 40, 20, 60), link: 15, takes: 20, ratio: 0.5},
		"a short round":                    {is: then(400*time.Millisecond, 0, 8, 4, 1, 2), link: 12, takes: 48, ratio: 0.25},
		"short but for the wait":           {is: then(4*time.Second, 3700*time.Millisecond, 8, 4, 1, 2), link: 12, takes: 48, ratio: 0.25},
		"paced":                            {is: then(4*time.Second, 0, 80, 40, 20, 60), paced: true, link: 12, takes: 24, ratio: 0.5},
		"the first pass has other memory":  {is: then(4*time.Second, 0, 80, 40, 20, 60), first: true, link: 12, takes: 24, ratio: 0.5},
		"little content tells no ratio":    {is: then(400*time.Millisecond, 0, 8, 0, 1, 2), link: 12, takes: 48, ratio: 0.25},
		"content that takes next to none":  {is: then(400*time.Millisecond, 0, 8, 100, 0, 2), link: 12, takes: 2400, ratio: leastRatio},
		"a session whose count went back":  {is: then(time.Second, 0, 10, 0, 0, -1), link: 0, takes: 10, ratio: 0.25},
		"a round that has brought nothing": {is: then(time.Second, 0, 0, 0, 0, 0), link: 0, takes: 0, ratio: 0.25},
	} {
		before := was
		if c.first {
			before.round = 1
		}
		link, takes, ratio := c.is.since(before, 12*mib, 0.25, c.paced)
		if link != c.link*mib || takes == 0 || takes/mib != c.takes || ratio != c.ratio {
			t.Errorf("%s: %d and %d MiB/s, %g, want %d, %d, %g", name, link/mib, takes/mib, ratio, c.link, c.takes, c.ratio)
		}
	}
}

// A session that had nothing to send for a minute has shown what it can before.
func TestRecentRate(t *testing.T) {
	var r recentRate
	for range 3 {
		r.add(1000)
	}
	for range 60 {
		r.add(0)
		r.add(99)
	}
	if r.most() != 1000 {
		t.Errorf("after a minute in which next to nothing was sent the rate is %d", r.most())
	}
	for range 10 {
		r.add(400) // the link has become slower
	}
	if r.most() != 400 {
		t.Errorf("on a link that has become slower the rate is %d", r.most())
	}
}

// What handoffs to a site took is believed step by step, and within bounds.
func TestOverheads(t *testing.T) {
	var o overheads
	if o.of("south") != usualOverhead {
		t.Errorf("of a site that was never moved to: %v", o.of("south"))
	}
	o.learn("south", 100*time.Millisecond)
	if got := o.of("south"); got != usualOverhead+50*time.Millisecond {
		t.Errorf("after a handoff that took 100 ms longer: %v", got)
	}
	o.learn("south", time.Hour)
	o.learn("north", -time.Hour)
	if o.of("south") != mostOverhead || o.of("north") != 0 || o.of("west") != usualOverhead {
		t.Errorf("out of bounds: %v, %v, %v", o.of("south"), o.of("north"), o.of("west"))
	}
}
