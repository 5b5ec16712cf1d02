package handoff

import (
	"fmt"
	"strings"
)

// The simulator: two hosts, one or two moves of one guest between them, and
// whatever can happen, each as an op. explore_test.go tries all of them from
// every world, random_test.go draws some.
//
// A message that was sent stays on the wire: it can arrive at any time, as often
// as it likes, after any other, and be lost at any time. So loss, duplication,
// reordering and delay are all there, without a bound. So are crashes: before
// and after each action an agent can be killed, which a guest outlives, or a host
// lose power, which it does not. The journal is cut off at what was durable then,
// so that a record under way is lost; and one can fail to be written, or seem to.

// place is a State as a small number, for worlds that are cheap to compare.
type place uint8

var places = [...]State{"", Owner, Offered, Claimed, Released, Returned, Abandoned, Split, Receiver, Accepted, Running, Aborted}

var placeOf = func() map[State]place {
	m := map[State]place{}
	for i, s := range places {
		m[s] = place(i)
	}
	return m
}()

const (
	down place = iota // the agent is
	pOwner
	pOffered
	pClaimed
	pReleased
	pReturned
	pAbandoned
	pSplit
	pReceiver
	pAccepted
	pRunning
	pAborted
)

// guest is what a host's libvirt has.
type guest uint8

const (
	off guest = iota
	paused
	running
)

// finishing is how a libvirt stands with a Finish.
type finishing uint8

const (
	idle   finishing = iota
	called           // its agent waits for the outcome
	orphan           // its agent was killed: it ends as it likes, and when
)

type host struct {
	up     bool // its agent is
	fell   bool // it lost power at least once: a guest that was here may be gone
	disks  bool // whole ones, of which the guest can live
	guest  guest
	finish finishing
}

// party is one side of a move.
type party struct {
	state, journal, before place // before: of the step whose actions are still to do
	todo                   [4]Action
}

func (p party) busy() bool { return p.todo[0] != 0 }

// Messages, as bits of the wire.
const (
	mOffer uint8 = 1 << iota
	mCancel
	mQuery
	mClaim
	mRunning
	mAborted
)

var messages = [...]struct {
	bit  uint8
	to   uint8 // side
	ev   Event
	name string
}{{mOffer, dst, Loaded, "offer"}, {mCancel, dst, Broken, "cancel"}, {mQuery, dst, Asked, "query"},
	{mClaim, dst, Overruled, "claim"}, {mRunning, src, AnswerRunning, "running"}, {mAborted, src, AnswerAborted, "aborted"}}

const src, dst uint8 = 0, 1

var sideNames = [...]string{"source", "destination"}

type move struct {
	from  uint8 // the host that is the source
	begun bool
	side  [2]party
	wire  uint8
	ran   bool // the guest has run at the destination
	back  bool // the source has resumed it after its offer
}

// world is everything that an order of events can differ in.
type world struct {
	hosts [2]host
	moves [2]move
}

func (w world) String() string {
	var b strings.Builder
	for i, mv := range w.moves {
		for side := range uint8(2) {
			if p, at := mv.side[side], w.host(uint8(i), side); mv.begun {
				fmt.Fprintf(&b, "move %d %s %q, journal %q, to do %v, host %+v; ", i, sideNames[side], places[p.state], places[p.journal], p.todo, *at)
			}
		}
	}
	return b.String()
}

// begin is the world before the first move's end is near: the guest runs at host 0.
func begin() world {
	w := world{}
	w.hosts[0] = host{up: true, disks: true, guest: running}
	w.hosts[1] = host{up: true}
	w.moves[0] = newMove(0)
	return w
}

func newMove(from uint8) move {
	return move{from: from, begun: true, side: [2]party{{state: pOwner, journal: pOwner}, {state: pReceiver, journal: pReceiver}}}
}

// host gives where a side of a move is.
func (w *world) host(m, side uint8) *host { return &w.hosts[w.moves[m].from^side] }

type kind uint8

const (
	opAct     kind = iota // a side does its next action
	opUnsaved             // the journal can't be written
	opUnsure              // it was written, and that is not known
	opStop                // QEMU stops the guest to move it
	opEvent               // a side learns of something
	opArrive              // a message does
	opLose
	opRuns    // libvirt's Finish lets the guest run
	opNot     // it does not
	opKill    // an agent
	opPower   // a host loses power
	opRestart // an agent starts
	opSay     // an operator
	opMove    // the guest is moved on
)

type op struct {
	kind    kind
	m, side uint8 // opKill, opPower, opRestart: m is the host
	arg     uint8 // Event, or index of messages
}

func (o op) String() string {
	side := sideNames[o.side]
	switch o.kind {
	case opAct, opUnsaved, opUnsure, opStop, opRuns, opNot, opMove:
		return fmt.Sprintf("move %d %s %s", o.m, side, [...]string{opAct: "does its next action", opUnsaved: "cannot write its journal",
			opUnsure: "writes its journal, and it seems that it can't",
			opStop:   "stops the guest", opRuns: "libvirt runs the guest", opNot: "libvirt does not run the guest", opMove: "begins"}[o.kind])
	case opEvent, opSay:
		return fmt.Sprintf("move %d %s: %v", o.m, side, Event(o.arg))
	case opArrive, opLose:
		return fmt.Sprintf("move %d: %s %s", o.m, messages[o.arg].name, map[kind]string{opArrive: "arrives", opLose: "is lost"}[o.kind])
	}
	return fmt.Sprintf("host %d %s", o.m, map[kind]string{opKill: "agent killed", opPower: "loses power", opRestart: "agent starts"}[o.kind])
}

// fault tells whether an op is one that stops when the faults do.
func (o op) fault() bool {
	return o.kind == opUnsaved || o.kind == opUnsure || o.kind == opLose || o.kind == opKill || o.kind == opPower || o.kind == opSay
}
