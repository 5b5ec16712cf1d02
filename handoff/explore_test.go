package handoff

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// explorer visits every world that a model can come to, nearest first.
type explorer struct {
	*model
	index  map[world]int32
	worlds []world
	cause  []step // how each world was come to first
	depth  []int32
	steps  int
	// calm lists, for each world, those from which it follows without a fault.
	calm [][]int32
}

type step struct {
	from int32
	op   op
}

// fault is what an explorer finds, and the shortest way to it.
type fault struct {
	err error
	way []op
}

func (f *fault) Error() string {
	var b strings.Builder
	fmt.Fprint(&b, f.err)
	for i, o := range f.way {
		fmt.Fprintf(&b, "\n\t%2d  %v", i+1, o)
	}
	return b.String()
}

// explore visits every world, up to a first one that is wrong.
func explore(m *model) (*explorer, *fault) {
	e := &explorer{model: m, index: map[world]int32{}}
	if f := e.visit(begin(), step{from: -1}); f != nil {
		return e, f
	}
	var ops []op
	for at := int32(0); int(at) < len(e.worlds); at++ {
		w := e.worlds[at]
		ops = m.ops(&w, ops[:0])
		e.steps += len(ops)
		for _, o := range ops {
			next, err := m.apply(w, o)
			if err != nil {
				return e, &fault{err, append(e.way(at), o)}
			}
			if f := e.visit(next, step{at, o}); f != nil {
				return e, f
			}
			if m.quiet(&w, o) {
				to := e.index[next]
				e.calm[to] = append(e.calm[to], at)
			}
		}
	}
	return e, nil
}

func (e *explorer) visit(w world, s step) *fault {
	if _, known := e.index[w]; known {
		return nil
	}
	at := int32(len(e.worlds))
	e.index[w] = at
	e.worlds, e.cause, e.calm = append(e.worlds, w), append(e.cause, s), append(e.calm, nil)
	if s.from < 0 {
		e.depth = append(e.depth, 0)
	} else {
		e.depth = append(e.depth, e.depth[s.from]+1)
	}
	if err := e.check(&w); err != nil {
		return &fault{err, e.way(at)}
	}
	return nil
}

func (e *explorer) way(at int32) []op {
	var way []op
	for ; e.cause[at].from >= 0; at = e.cause[at].from {
		way = append(way, e.cause[at].op)
	}
	slices.Reverse(way)
	return way
}

// quiet tells whether an op is one of those that go on when faults stop. The
// sessions hold then, but for that of a source which does not send any more.
func (m *model) quiet(w *world, o op) bool {
	if o.kind == opSay {
		return m.answers
	}
	if o.fault() || o.kind == opMove {
		return false
	}
	if o.kind == opEvent && (Event(o.arg) == Failed || Event(o.arg) == Broken) {
		return w.moves[o.m].side[src].state != pOwner
	}
	return true
}

// progress checks that every world leads to one of the ends when faults stop,
// and gives how many worlds have come to each end. A step that is always
// possible is made at some time, so that an end that stays in reach is reached.
func (e *explorer) progress(ends ...string) (map[string]int, *fault) {
	count := map[string]int{}
	leads := make([]bool, len(e.worlds))
	var queue []int32
	for at := range e.worlds {
		if end := e.end(&e.worlds[at]); slices.Contains(ends, end) {
			count[end]++
			leads[at] = true
			queue = append(queue, int32(at))
		}
	}
	for len(queue) > 0 {
		at := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, before := range e.calm[at] {
			if !leads[before] {
				leads[before] = true
				queue = append(queue, before)
			}
		}
	}
	if at := slices.Index(leads, false); at >= 0 {
		return count, &fault{fmt.Errorf("stuck: %v", e.worlds[at]), e.way(int32(at))}
	}
	return count, nil
}

// TestEveryOrder visits every world that a guest's moves can come to, without a
// bound on messages, crashes or an operator's words.
func TestEveryOrder(t *testing.T) {
	for _, c := range []struct {
		name  string
		model model
		ends  []string
	}{
		{"one move", model{moves: 1}, []string{atSource, atDestination, inDoubt}},
		{"two moves", model{moves: 2}, []string{atSource, atDestination, inDoubt}},
		{"operators who are right", model{moves: 1, operators: right},
			[]string{atSource, atDestination, inDoubt, interrupted, doubtGivenUp, endSplit}},
		{"operators who are right, and answer", model{moves: 1, operators: right, answers: true},
			[]string{atSource, atDestination, endSplit}},
		{"operators who are wrong", model{moves: 1, operators: wrong},
			[]string{atSource, atDestination, inDoubt, interrupted, doubtGivenUp, endSplit, givenUp}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.model.step = Step
			e, f := explore(&c.model)
			if f != nil {
				t.Fatal(f)
			}
			ends, f := e.progress(c.ends...)
			t.Logf("%d worlds, %d steps, at most %d steps deep", len(e.worlds), e.steps, e.depth[len(e.depth)-1])
			if f != nil {
				t.Fatal(f)
			}
			for _, end := range c.ends {
				if ends[end] == 0 {
					t.Errorf("no world ends with %q: the simulator does not try what it should", end)
				}
			}
		})
	}
}

// Each rule is there for a reason: without it the simulator finds the harm.
func TestSimulatorCatchesABrokenRule(t *testing.T) {
	// replaced is the protocol with other actions for an event.
	replaced := func(in State, on Event, next State, actions ...Action) func(State, Event) (State, []Action, error) {
		return func(s State, e Event) (State, []Action, error) {
			if s == in && e == on {
				return next, actions, nil
			}
			return Step(s, e)
		}
	}
	ends := []string{atSource, atDestination, inDoubt}
	answered := []string{atSource, atDestination, endSplit}
	for _, c := range []struct {
		name  string
		model model
		ends  []string
		harm  string
	}{
		{"a source that has made its offer does not resume when it gets no answer",
			model{step: replaced(Offered, Failed, Returned, Resume, Record)}, ends, "runs twice"},
		{"the offer is recorded before it is made",
			model{step: replaced(Owner, Ready, Offered, SendOffer)}, ends, "runs twice"},
		{"the acceptance is recorded before the guest runs",
			model{step: replaced(Receiver, Loaded, Accepted, Finish, Record)}, ends, "not durably accepted"},
		{"the acceptance is recorded at all",
			model{step: replaced(Receiver, Loaded, Accepted, Finish)}, ends, "not durably accepted"},
		{"an abort of what was accepted is recorded before it is told",
			model{step: replaced(Accepted, FinishWrong, Aborted, Discard, ReplyAborted)}, ends, "stuck"},
		{"what was accepted is recorded as running before it is told",
			model{step: replaced(Accepted, Resumed, Running, ReplyRunning)}, ends, "stuck"},
		{"a destination that has accepted does not abort because its peer is gone",
			model{step: replaced(Accepted, Broken, Aborted, Record, Discard, ReplyAborted)}, ends, "not durably accepted"},
		{"a destination that aborted says so",
			model{step: replaced(Aborted, Asked, Aborted)}, ends, "stuck"},
		{"a source asks again",
			model{step: replaced(Offered, Failed, Offered)}, ends, "stuck"},
		{"the guest is not moved on before the end of its move is durable",
			model{step: Step, moves: 2, hasty: true}, ends, "runs twice"},
		{"a record that failed may be in the journal",
			model{step: Step, trusting: true}, ends, "stuck"},
		{"an agent in doubt looks again whether the guest runs",
			model{step: Step, blind: true}, ends, "stuck"},
		{"a claim is recorded before the guest runs",
			model{step: replaced(Offered, RunHere, Claimed, Start, Tell), operators: right, answers: true}, answered, "stuck"},
		{"a claim is told",
			model{step: replaced(Claimed, Failed, Claimed), operators: right, answers: true}, answered, "stuck"},
		{"what may yet run is ended before the source takes it back",
			model{step: replaced(Accepted, AbandonHere, Aborted, Record, Discard, ReplyAborted), operators: right}, ends, "not durably accepted"},
		{"what an operator gives up keeps its disks",
			model{step: replaced(Offered, AbandonHere, Abandoned, Release, Record), operators: wrong}, ends, "disks"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.model.moves = max(1, c.model.moves)
			e, f := explore(&c.model)
			if f == nil {
				_, f = e.progress(c.ends...)
			}
			if f == nil {
				t.Fatalf("nothing goes wrong in %d worlds", len(e.worlds))
			}
			if !strings.Contains(f.Error(), c.harm) {
				t.Fatalf("%q is expected, found is %v", c.harm, f)
			}
			t.Logf("%d worlds until %v", len(e.worlds), f)
		})
	}
}
