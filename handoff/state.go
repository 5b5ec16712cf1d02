package handoff

import "fmt"

// State is where one side of a move stands. Its text is what the journal holds.
type State string

const (
	// Source.
	Owner    State = "owner"    // the guest is ours, running or stopped
	Offered  State = "offered"  // the decision lies with the destination
	Released State = "released" // final: the destination runs the guest
	Returned State = "returned" // final: the guest runs here

	// Destination.
	Receiver State = "receiver" // what arrives is not a guest yet
	Accepted State = "accepted" // the guest is ours; it is being resumed
	Running  State = "running"  // final: it was resumed here
	Aborted  State = "aborted"  // final: it never ran here and never will
)

// Final reports whether a state is left no more.
func (s State) Final() bool {
	return s == Released || s == Returned || s == Running || s == Aborted
}

// Event is something that happened to one side.
type Event uint8

const (
	// Source.
	Ready         Event = iota + 1 // stopped, and all of its memory and device state is sent
	Failed                         // anything went wrong, or the operator cancelled
	AnswerRunning                  // the destination says that it runs the guest
	AnswerAborted                  // the destination says that it never will

	// Destination.
	Loaded      // the offer is here, the state is loaded and the disks are durable
	Broken      // anything went wrong, the source cancelled or is gone
	Resumed     // libvirt's Finish was good: the guest runs
	FinishWrong // Finish failed and the guest has certainly not run
	Asked       // the source asks for the decision
)

// Action is what the caller does, in the order given.
type Action uint8

const (
	Record         Action = iota + 1 // make the new state durable before going on
	SendOffer                        // source: give the decision away
	Resume                           // source: the guest runs here again: Confirm(cancelled), or libvirt did it
	Release                          // source: Confirm, the domain goes
	Ask                              // source: ask the destination until it answers
	Finish                           // destination: resume the guest
	Discard                          // destination: remove the incoming domain and the disks made for it
	ReplyRunning                     // destination: tell the source
	ReplyAborted                     // destination: tell the source
	ReplyUndecided                   // destination: tell the source to ask again
)

var actionNames = [...]string{"?", "record", "send-offer", "resume", "release", "ask", "finish", "discard",
	"reply-running", "reply-aborted", "reply-undecided"}

func (a Action) String() string { return actionNames[a] }

var eventNames = [...]string{"?", "ready", "failed", "answer-running", "answer-aborted", "loaded", "broken", "resumed",
	"finish-wrong", "asked"}

func (e Event) String() string { return eventNames[e] }

// Step gives the state after an event and what is to be done. An event that
// does not belong to the state is an error and changes nothing: it is a
// duplicate, a late message, or a peer that does not keep to the protocol.
func Step(s State, e Event) (State, []Action, error) {
	switch s {
	case Owner:
		switch e {
		case Ready:
			return Offered, []Action{Record, SendOffer}, nil
		case Failed, AnswerAborted:
			return Returned, []Action{Resume, Record}, nil
		}
	case Offered:
		switch e {
		case AnswerRunning:
			return Released, []Action{Release, Record}, nil
		case AnswerAborted:
			return Returned, []Action{Resume, Record}, nil
		case Failed:
			return Offered, []Action{Ask}, nil
		}
	case Receiver:
		switch e {
		case Loaded:
			return Accepted, []Action{Record, Finish}, nil
		case Broken, Asked:
			// A source that asks has lost the session, and the offer with it.
			return Aborted, []Action{Record, Discard, ReplyAborted}, nil
		}
	case Accepted:
		switch e {
		case Resumed:
			return Running, []Action{Record, ReplyRunning}, nil
		case FinishWrong:
			return Aborted, []Action{Record, Discard, ReplyAborted}, nil
		case Broken:
			return Accepted, nil, nil // the decision is made; a lost peer asks
		case Asked:
			return Accepted, []Action{ReplyUndecided}, nil
		}
	case Running:
		switch e {
		case Asked:
			return Running, []Action{ReplyRunning}, nil
		case Broken:
			return Running, nil, nil
		}
	case Aborted:
		switch e {
		case Asked:
			return Aborted, []Action{ReplyAborted}, nil
		case Broken:
			return Aborted, nil, nil
		}
	}
	return s, nil, fmt.Errorf("handoff: %v in state %q", e, s)
}
