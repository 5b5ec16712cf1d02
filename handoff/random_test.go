package handoff

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// run draws one order of events: with faults for a while, then without, until
// everything has ended. It gives the end and how many steps it took.
func (m *model) run(seed uint64, trace bool) (end string, steps int, f *fault) {
	r := rand.New(rand.NewPCG(seed, 0x68616e646f6666))
	// Some runs have hardly a fault, some little else.
	faulty := []int{1, 5, 20, 50}[r.IntN(4)]
	troubled := r.IntN(80)
	const patience = 20_000
	w := begin()
	var all, pick []op
	var way []op
	for steps = 0; steps < patience; steps++ {
		all = m.ops(&w, all[:0])
		pick = pick[:0]
		calm := steps >= troubled
		want := r.IntN(100) < faulty
		for _, o := range all {
			trouble := o.fault() || o.kind == opEvent && (Event(o.arg) == Failed || Event(o.arg) == Broken)
			if calm && m.quiet(&w, o) || !calm && trouble == want {
				pick = append(pick, o)
			}
		}
		if calm {
			if end := m.end(&w); end != endNone && (!m.answers || end == atSource || end == atDestination || end == endSplit) {
				return end, steps, nil
			}
		}
		if len(pick) == 0 {
			continue
		}
		o := pick[r.IntN(len(pick))]
		if trace {
			way = append(way, o)
		}
		var err error
		if w, err = m.apply(w, o); err == nil {
			err = m.check(&w)
		}
		if err != nil {
			return endNone, steps, &fault{err, way}
		}
	}
	return endNone, steps, &fault{fmt.Errorf("no end: %v", w), way}
}

// TestMillionRuns draws what TestEveryOrder can't visit in full: two moves with
// operators.
func TestMillionRuns(t *testing.T) {
	for _, c := range []struct {
		name  string
		model model
		runs  uint64
	}{
		{"operators who are right", model{step: Step, moves: 2, operators: right, answers: true}, randomRuns / 2},
		{"operators who are wrong", model{step: Step, moves: 2, operators: wrong}, randomRuns / 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			var next, steps atomic.Uint64
			var mu sync.Mutex
			ends := map[string]int{}
			var workers sync.WaitGroup
			for range runtime.GOMAXPROCS(0) {
				workers.Go(func() {
					mine := map[string]int{}
					for seed := next.Add(1); seed <= c.runs; seed = next.Add(1) {
						end, n, f := c.model.run(seed, false)
						if f != nil {
							_, _, f = c.model.run(seed, true)
							t.Errorf("run %d: %v", seed, f)
							next.Store(c.runs)
						}
						mine[end]++
						steps.Add(uint64(n))
					}
					mu.Lock()
					defer mu.Unlock()
					for end, n := range mine {
						ends[end] += n
					}
				})
			}
			workers.Wait()
			t.Logf("%d runs, %d steps; %v", c.runs, steps.Load(), ends)
			for _, end := range []string{atSource, atDestination, endSplit} {
				if ends[end] == 0 {
					t.Errorf("no run ends with %q", end)
				}
			}
		})
	}
}
