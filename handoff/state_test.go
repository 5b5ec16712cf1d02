package handoff

import (
	"fmt"
	"testing"
)

// world is everything that an order of events can differ in: both sides'
// volatile and durable states, what is on the wire, and who runs the guest.
type world struct {
	src, srcDisk State
	dst, dstDisk State
	srcUp, dstUp bool
	srcRuns      bool // the guest runs at the source
	dstRuns      bool // at the destination
	offer        bool // on the wire
	ask          bool
	running      bool
	aborted      bool
	faults       int // crashes and losses still to come
}

// seam lets a test plant a bug: it sees each action before it is carried out.
type seam func(side string, w world, a Action) bool

// sim explores every order of events from a world, each world once.
type sim struct {
	seen  map[world]bool
	drop  seam
	fault error
}

func (s *sim) explore(w world) {
	if s.fault != nil || s.seen[w] {
		return
	}
	s.seen[w] = true
	if err := w.check(); err != nil {
		s.fault = fmt.Errorf("%w: %+v", err, w)
		return
	}
	for _, next := range s.successors(w) {
		s.explore(next)
	}
}

func (w world) check() error {
	switch {
	case w.srcRuns && w.dstRuns:
		return fmt.Errorf("the guest runs twice")
	case w.dstRuns && w.dstDisk != Accepted && w.dstDisk != Running:
		return fmt.Errorf("the destination runs a guest it has not accepted durably")
	case w.src == Released && !w.dstRuns:
		return fmt.Errorf("the source released a guest that nobody runs")
	}
	return nil
}

// successors are the worlds that one event leads to: an event of a component, a
// message that arrives, a loss, or a crash before any of an event's actions.
func (s *sim) successors(w world) []world {
	var all []world
	add := func(v world) { all = append(all, v) }
	step := func(w world, side string, e Event) {
		all = append(all, s.step(w, side, e)...)
	}
	if w.srcUp {
		if w.src == Owner {
			stopped := w
			stopped.srcRuns = false // QEMU stops the guest before Ready
			step(stopped, "src", Ready)
			step(w, "src", Failed)
			step(stopped, "src", Failed)
		}
		if w.src == Offered && !w.ask {
			v := w
			v.ask = true
			add(v)
		}
	}
	if w.dstUp && w.dst == Receiver {
		step(w, "dst", Broken)
	}
	if w.dstUp && w.dst == Accepted {
		v := w
		v.dstRuns = true
		step(v, "dst", Resumed)
		if !w.dstRuns { // Finish failed, and it has not run
			step(w, "dst", FinishWrong)
		}
	}
	// Messages arrive; a duplicate is one that stays on the wire.
	deliver := func(on bool, take func(*world), up bool, side string, e Event) {
		if on && up {
			v := w
			take(&v)
			step(v, side, e)
			step(w, side, e)
		}
		if on && w.faults > 0 {
			v := w
			take(&v)
			v.faults--
			add(v) // lost
		}
	}
	deliver(w.offer, func(v *world) { v.offer = false }, w.dstUp && w.dst == Receiver, "dst", Loaded)
	deliver(w.ask, func(v *world) { v.ask = false }, w.dstUp, "dst", Asked)
	deliver(w.running, func(v *world) { v.running = false }, w.srcUp, "src", AnswerRunning)
	deliver(w.aborted, func(v *world) { v.aborted = false }, w.srcUp, "src", AnswerAborted)
	if w.faults > 0 {
		v := w
		v.srcUp, v.faults = false, w.faults-1
		add(v)
		v = w
		v.dstUp, v.faults = false, w.faults-1
		add(v)
	}
	if !w.srcUp {
		v := w
		v.srcUp, v.src = true, w.srcDisk
		if v.src == Owner { // it was never offered: ours
			step(v, "src", Failed)
		} else {
			add(v)
		}
	}
	if !w.dstUp {
		v := w
		v.dstUp, v.dst, v.offer = true, w.dstDisk, false // an offer dies with its session
		switch {
		case v.dst == Receiver:
			step(v, "dst", Broken)
		case v.dst == Accepted && v.dstRuns:
			step(v, "dst", Resumed)
		default:
			add(v) // accepted and not running: a person is asked
		}
	}
	return all
}

// step applies an event and yields the world after each prefix of its actions:
// the last one, and where a fault is left a crash in between.
func (s *sim) step(w world, side string, e Event) []world {
	state := w.src
	if side == "dst" {
		state = w.dst
	}
	next, actions, err := Step(state, e)
	if err != nil {
		return []world{w}
	}
	if side == "src" {
		w.src = next
	} else {
		w.dst = next
	}
	var all []world
	for _, a := range actions {
		if w.faults > 0 {
			crash := w
			crash.faults--
			if side == "src" {
				crash.srcUp = false
			} else {
				crash.dstUp = false
			}
			all = append(all, crash)
		}
		if s.drop != nil && s.drop(side, w, a) {
			continue
		}
		switch a {
		case Record:
			if side == "src" {
				w.srcDisk = next
			} else {
				w.dstDisk = next
			}
		case SendOffer:
			w.offer = true
		case Resume:
			w.srcRuns = true
		case Release:
			w.srcRuns = false
		case Ask:
			w.ask = true
		case Discard:
			w.dstRuns = false
		case ReplyRunning:
			w.running = true
		case ReplyAborted:
			w.aborted = true
		}
	}
	return append(all, w)
}

func explore(faults int, drop seam) *sim {
	s := &sim{seen: map[world]bool{}, drop: drop}
	s.explore(world{src: Owner, srcDisk: Owner, dst: Receiver, dstDisk: Receiver, srcUp: true, dstUp: true, srcRuns: true, faults: faults})
	return s
}

func TestNeverTwoOwners(t *testing.T) {
	const faults = 4
	s := explore(faults, nil)
	if s.fault != nil {
		t.Fatal(s.fault)
	}
	ends := map[string]int{}
	for w := range s.seen {
		if w.faults == 0 && w.src.Final() && w.dst.Final() {
			ends[fmt.Sprintf("%s/%s source runs %v", w.src, w.dst, w.srcRuns)]++
		}
	}
	t.Logf("%d worlds; ends: %v", len(s.seen), ends)
	if len(s.seen) < 1000 || ends["released/running source runs false"] == 0 || ends["returned/aborted source runs true"] == 0 {
		t.Fatalf("the simulation does not reach both ends of a move: %d worlds, %v", len(s.seen), ends)
	}
}

// Each rule is there for a reason: without it the simulator finds the harm.
func TestSimulatorCatchesABrokenRule(t *testing.T) {
	rules := map[string]seam{
		"the source records its offer before sending it": func(side string, w world, a Action) bool {
			return side == "src" && a == Record && w.src == Offered
		},
		"the destination records its acceptance before the guest runs": func(side string, w world, a Action) bool {
			return side == "dst" && a == Record && w.dst == Accepted
		},
		"the destination records that it aborts before it says so": func(side string, w world, a Action) bool {
			return side == "dst" && a == Record && w.dst == Aborted
		},
	}
	for name, broken := range rules {
		if s := explore(3, broken); s.fault == nil {
			t.Errorf("without %q nothing goes wrong in %d worlds", name, len(s.seen))
		}
	}
}

func TestForeignEventsChangeNothing(t *testing.T) {
	states := []State{Owner, Offered, Claimed, Released, Returned, Abandoned, Split, Receiver, Accepted, Running, Aborted, "nonsense"}
	for _, s := range states {
		for e := Ready; e <= AbandonHere; e++ {
			next, actions, err := Step(s, e)
			if err != nil && (next != s || actions != nil) {
				t.Errorf("%v in %q: an error, and yet state %q and actions %v", e, s, next, actions)
			}
			if s.Final() && next != s {
				t.Errorf("%v leaves the final state %q for %q", e, s, next)
			}
		}
	}
}
