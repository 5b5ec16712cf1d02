package handoff

import "fmt"

// words is what the operators are like.
type words uint8

const (
	silent words = iota
	right        // a word is true when it is said; the other side may come back later nevertheless
	wrong        // anything may be said at any time
)

// model is the protocol, its environment, and what a test has broken of it.
type model struct {
	step      func(State, Event) (State, []Action, error)
	operators words
	answers   bool // the operators also when faults have stopped
	moves     int
	// hasty lets the guest be moved on before the end of its last move is durable.
	hasty bool
	// trusting lets a destination believe that what it failed to record is not in
	// its journal.
	trusting bool
	// blind lets an agent look only when it starts whether what it accepted runs.
	blind bool
}

// ops appends what can happen in a world.
func (m *model) ops(w *world, all []op) []op {
	add := func(k kind, mv, side, arg uint8) { all = append(all, op{k, mv, side, arg}) }
	for h := range uint8(2) {
		at := &w.hosts[h]
		if at.up {
			add(opKill, h, 0, 0)
		} else {
			add(opRestart, h, 0, 0)
		}
		if at.up || at.guest != off || at.finish != idle {
			add(opPower, h, 0, 0)
		}
	}
	for i := range uint8(m.moves) {
		mv := &w.moves[i]
		if !mv.begun {
			if from, ok := m.movable(w, i); ok {
				add(opMove, i, from, 0)
			}
			continue
		}
		for side := range uint8(2) {
			p := &mv.side[side]
			if p.busy() {
				add(opAct, i, side, 0)
				if p.todo[0] == Record {
					add(opUnsaved, i, side, 0)
					if !places[p.state].Final() {
						add(opUnsure, i, side, 0)
					}
				}
			}
		}
		for n, msg := range messages {
			if mv.wire&msg.bit == 0 {
				continue
			}
			add(opLose, i, 0, uint8(n))
			if m.listens(w, i, msg.to) && !(msg.ev == Loaded && mv.side[dst].state != pReceiver) {
				add(opArrive, i, 0, uint8(n))
			}
		}
		if j := mv.side[dst].journal; w.host(i, dst).finish != idle && (j == pAccepted || j == pReceiver) {
			add(opRuns, i, dst, 0)
			add(opNot, i, dst, 0)
		}
		all = m.sourceOps(w, i, all)
		all = m.destinationOps(w, i, all)
	}
	return all
}

// listens tells whether a side takes an event now: one after the other.
func (m *model) listens(w *world, i, side uint8) bool {
	p, at := &w.moves[i].side[side], w.host(i, side)
	if p.state == down || p.busy() {
		return false
	}
	return side == src || p.state != pAccepted || at.finish != called && at.guest != running
}

func (m *model) sourceOps(w *world, i uint8, all []op) []op {
	mv, at := &w.moves[i], w.host(i, src)
	if !m.listens(w, i, src) {
		return all
	}
	add := func(k kind, ev Event) { all = append(all, op{k, i, src, uint8(ev)}) }
	switch mv.side[src].state {
	case pOwner:
		add(opEvent, Failed)
		if at.guest == running {
			add(opStop, 0)
		}
		if at.guest == paused {
			add(opEvent, Ready)
		}
	case pOffered, pClaimed:
		add(opEvent, Failed)
	}
	if m.operators == silent || !m.last(w, i) {
		return all
	}
	s := mv.side[src].state
	to, other := w.host(i, dst), mv.side[dst]
	gone := !to.up && to.guest == off && to.finish == idle
	lost := to.guest != running && to.finish == idle && other.todo[0] != Start
	here := at.guest == paused || at.disks // or it was released already, and migrate says so
	if s == pOffered && here && (m.operators == wrong || gone) {
		add(opSay, RunHere)
	}
	if (s == pClaimed || s == pReturned) && at.guest != running && here && (m.operators == wrong || lost) {
		add(opSay, RunHere)
	}
	// A guest that runs here is not given up, whoever asks: migrate looks.
	if s == pOffered && at.guest != running && (m.operators == wrong || to.guest == running && other.state != pAborted) {
		add(opSay, AbandonHere)
	}
	return all
}

func (m *model) destinationOps(w *world, i uint8, all []op) []op {
	mv, at := &w.moves[i], w.host(i, dst)
	p := &mv.side[dst]
	add := func(k kind, ev Event) { all = append(all, op{k, i, dst, uint8(ev)}) }
	if p.state == pAccepted && !p.busy() && at.guest == running && !(m.blind && p.before == pAccepted) {
		add(opEvent, Resumed)
	}
	if !m.listens(w, i, dst) {
		return all
	}
	if p.state == pReceiver {
		add(opEvent, Broken)
	}
	if m.operators == silent || !m.last(w, i) {
		return all
	}
	from, other := w.host(i, src), mv.side[src]
	if p.state == pReceiver {
		add(opSay, AbandonHere)
	}
	if p.state == pAccepted {
		claimed := other.state == pClaimed || other.state == pReturned
		if m.operators == wrong || from.guest == off && !claimed {
			add(opSay, RunHere)
		}
		if m.operators == wrong || other.state != pAbandoned && from.guest == paused {
			add(opSay, AbandonHere)
		}
	}
	return all
}

// last tells whether no later move of the guest has begun. An operator's word
// about an older one is refused.
func (m *model) last(w *world, i uint8) bool {
	return int(i) == len(w.moves)-1 || !w.moves[i+1].begun
}

// movable tells whether another move of the guest can begin, and from where. A
// host refuses it that has the guest already, or a move of it which is not over;
// not so one that has claimed it.
func (m *model) movable(w *world, i uint8) (from uint8, ok bool) {
	if i == 0 || !w.moves[i-1].begun {
		return 0, false
	}
	last := &w.moves[i-1]
	for side := range uint8(2) {
		p, at := last.side[side], w.host(i-1, side)
		over := places[p.state].Final() && (m.hasty || p.journal == p.state) || p.state == pClaimed
		if !at.up || p.busy() || !over || at.finish != idle {
			return 0, false
		}
		if at.guest == running {
			from = last.from ^ side
		}
	}
	return from, w.hosts[from].guest == running && w.hosts[1^from].guest == off
}

// apply gives the world after an op.
func (m *model) apply(w world, o op) (world, error) {
	switch o.kind {
	case opKill, opPower:
		m.crash(&w, o.m, o.kind == opPower)
	case opRestart:
		m.restart(&w, o.m)
	case opMove:
		w.moves[o.m] = newMove(o.side)
	case opStop:
		w.host(o.m, src).guest = paused
	case opAct:
		return w, m.act(&w, o.m, o.side)
	case opUnsaved:
		m.unsaved(&w, o.m, o.side)
	case opUnsure:
		m.unsure(&w, o.m, o.side)
	case opEvent, opSay:
		m.feed(&w, o.m, o.side, Event(o.arg))
	case opArrive:
		m.feed(&w, o.m, messages[o.arg].to, messages[o.arg].ev)
	case opLose:
		w.moves[o.m].wire &^= messages[o.arg].bit
	case opRuns:
		w.moves[o.m].ran = true
		w.host(o.m, dst).guest, w.host(o.m, dst).finish = running, idle
	case opNot:
		at := w.host(o.m, dst)
		told := at.finish == called
		at.guest, at.finish = off, idle
		if told {
			m.feed(&w, o.m, dst, FinishWrong)
		}
	}
	return w, nil
}

// crash kills an agent, or takes the power from it and from the guest.
func (m *model) crash(w *world, h uint8, power bool) {
	at := &w.hosts[h]
	at.up = false
	if at.finish == called {
		at.finish = orphan
	}
	if power {
		at.fell, at.guest, at.finish = true, off, idle
	}
	for i := range w.moves {
		if mv := &w.moves[i]; mv.begun {
			p := &mv.side[mv.from^h]
			p.state, p.before, p.todo = down, down, [4]Action{}
		}
	}
}

// restart is what an agent does with its journal.
func (m *model) restart(w *world, h uint8) {
	w.hosts[h].up = true
	for i := range w.moves {
		mv := &w.moves[i]
		if !mv.begun {
			continue
		}
		side := mv.from ^ h
		p := &mv.side[side]
		p.state = p.journal
		switch {
		case places[p.state].Final():
		case side == src:
			m.feed(w, uint8(i), src, Failed)
		case p.state == pAccepted && w.hosts[h].guest == running:
			m.feed(w, uint8(i), dst, Resumed)
		default:
			m.feed(w, uint8(i), dst, Broken)
		}
	}
}

// feed gives a side an event.
func (m *model) feed(w *world, i, side uint8, ev Event) {
	p := &w.moves[i].side[side]
	next, actions, err := m.step(places[p.state], ev)
	if err != nil {
		return
	}
	p.before, p.state = p.state, placeOf[next]
	p.todo = [4]Action{}
	copy(p.todo[:], actions)
	if !p.busy() && p.state != pAccepted {
		p.before = down
	}
	if side == src && p.before == pOwner && ev == Failed {
		w.moves[i].wire |= mCancel
	}
}

// done takes an action off the list. What was before is of no more use then, but
// for a blind agent: worlds that are alike are to be equal.
func (p *party) done() {
	copy(p.todo[:], p.todo[1:])
	p.todo[len(p.todo)-1] = 0
	if !p.busy() && p.state != pAccepted {
		p.before = down
	}
}

// act carries out a side's next action.
func (m *model) act(w *world, i, side uint8) error {
	mv, at := &w.moves[i], w.host(i, side)
	p := &mv.side[side]
	a, before := p.todo[0], p.before
	p.done()
	switch a {
	case Record:
		p.journal = p.state
		if p.state == pAccepted {
			at.disks = true
		}
	case SendOffer:
		mv.wire |= mOffer
	case Ask:
		mv.wire |= mQuery
	case Tell:
		mv.wire |= mClaim
	case ReplyRunning:
		mv.wire |= mRunning
	case ReplyAborted:
		mv.wire |= mAborted
	case Resume:
		if at.guest == paused {
			at.guest = running
			mv.back = mv.back || before != pOwner
		}
	case Release:
		at.guest, at.disks = off, false
	case GiveUp:
		at.guest = off
	case Finish:
		at.finish, at.guest = called, paused
	case Start:
		switch {
		case at.finish != idle: // it may begin to run any moment: the operator says it again
		case at.guest == off && !at.disks:
			return fmt.Errorf("a guest is started where its disks are not")
		default:
			at.guest = running
		}
		mv.ran = mv.ran || side == dst
	case Halt:
		at.guest, at.finish = off, idle
	case Discard:
		// What runs is not removed: discardLeft looks.
		if before == pAccepted {
			if at.guest != running {
				at.guest, at.disks = off, false
			}
		} else if at.guest == paused && at.finish == idle {
			at.guest = off
		}
	}
	return nil
}

// unsaved is a Record that can't be written, and what the callers do then.
func (m *model) unsaved(w *world, i, side uint8) {
	p := &w.moves[i].side[side]
	switch {
	case p.state == pOffered: // not durable, so not offered
		p.state, p.todo = pOwner, [4]Action{}
		m.feed(w, i, src, Failed)
	case p.state == pClaimed: // the operator is told
		p.state, p.todo = p.before, [4]Action{}
	case p.state == pAccepted:
		p.state, p.todo = pReceiver, [4]Action{}
		m.feed(w, i, dst, Broken)
	case Recurs(places[p.before], places[p.state]):
		p.done()
	default: // tried again until it can be
	}
}

// unsure is a Record that failed, as far as can be known, and is durable.
func (m *model) unsure(w *world, i, side uint8) {
	p := &w.moves[i].side[side]
	p.journal = p.state
	if p.state != pAccepted {
		m.unsaved(w, i, side)
		return
	}
	w.host(i, dst).disks = true
	p.todo = [4]Action{}
	ev := FinishWrong // it has not been called
	if m.trusting {
		p.state, ev = pReceiver, Broken
	}
	m.feed(w, i, dst, ev)
}
