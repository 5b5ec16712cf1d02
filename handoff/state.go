package handoff

import "fmt"

// State is where one side of a move stands. Its text is what the journal holds.
type State string

const (
	// Source.
	Owner     State = "owner"     // the guest is ours, running or stopped
	Offered   State = "offered"   // the decision lies with the destination
	Claimed   State = "claimed"   // the guest is ours by an operator's word, and the destination has not been told
	Released  State = "released"  // final: the destination runs the guest
	Returned  State = "returned"  // final: the guest runs here
	Abandoned State = "abandoned" // final: given up here by an operator's word; its disks stay
	Split     State = "split"     // final: it was claimed here, and the destination has run it as well

	// Destination.
	Receiver State = "receiver" // what arrives is not a guest yet
	Accepted State = "accepted" // the guest is ours; it is being resumed
	Running  State = "running"  // final: it was resumed here
	Aborted  State = "aborted"  // final: it does not run here and never will
)

// Final reports whether a state is left no more.
func (s State) Final() bool {
	switch s {
	case Released, Returned, Abandoned, Split, Running, Aborted:
		return true
	}
	return false
}

// Recurs reports whether an agent that starts with before in its journal comes
// to after once more, whatever was done meanwhile. Then the caller may go on when
// after can't be recorded; the guest is not moved again until it is. Any other
// Record has to be durable before the next action is begun.
func Recurs(before, after State) bool { return after.Final() && before != Accepted }

// Event is something that happened to one side.
type Event uint8

const (
	// Source.
	Ready         Event = iota + 1 // stopped, and all of its memory and device state is sent
	Failed                         // anything went wrong, the operator cancelled, or the agent was restarted
	AnswerRunning                  // the destination says that it runs the guest
	AnswerAborted                  // the destination says that it never will

	// Destination. While a Finish or a Start is under way the other events wait.
	Loaded      // the offer is here, the state is loaded and the disks are durable
	Broken      // anything went wrong, the source cancelled or is gone, or the agent was restarted
	Resumed     // libvirt's Finish was good, or the guest was found running
	FinishWrong // Finish failed and the guest has certainly not run
	Asked       // the source asks for the decision
	Overruled   // the source tells that it runs the guest by its operator's word

	// Either side, of one that is in doubt: an operator's word.
	RunHere     // the other side does not run the guest, and will not
	AbandonHere // the guest is not to run here
)

// Action is what the caller does, in the order given.
type Action uint8

const (
	Record         Action = iota + 1 // make the new state durable before going on
	SendOffer                        // source: give the decision away
	Resume                           // source: the guest runs here again: Confirm(cancelled), or libvirt did it
	Release                          // source: Confirm, the domain goes
	Ask                              // source: ask the destination until it answers
	Tell                             // source: tell the destination of the claim until it answers
	GiveUp                           // source: the stopped guest goes; nothing of its disks or definition is removed
	Finish                           // destination: resume the guest
	Start                            // either: resume the guest if it stands here, or else start it from its disks
	Halt                             // destination: end the domain, so that nothing begun before can run it
	Discard                          // destination: remove the incoming domain and the disks made for it
	ReplyRunning                     // destination: tell the source
	ReplyAborted                     // destination: tell the source
	ReplyUndecided                   // destination: tell the source to ask again
)

var actionNames = [...]string{"?", "record", "send-offer", "resume", "release", "ask", "tell", "give-up", "finish", "start",
	"halt", "discard", "reply-running", "reply-aborted", "reply-undecided"}

func (a Action) String() string { return actionNames[a] }

var eventNames = [...]string{"?", "ready", "failed", "answer-running", "answer-aborted", "loaded", "broken", "resumed",
	"finish-wrong", "asked", "overruled", "run-here", "abandon-here"}

func (e Event) String() string { return eventNames[e] }

// Step gives the state after an event and what is to be done. An event that
// does not belong to the state is an error and changes nothing: it is a
// duplicate, a late message, an operator's word where nothing is in doubt, or a
// peer that does not keep to the protocol.
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
		case RunHere:
			return Claimed, []Action{Record, Start, Tell}, nil
		case AbandonHere:
			return Abandoned, []Action{GiveUp, Record}, nil
		}
	case Claimed:
		// The guest is free to be moved on meanwhile, so that no answer may
		// resume it: only the operator, again.
		switch e {
		case AnswerRunning:
			return Split, []Action{Record}, nil
		case AnswerAborted:
			return Returned, []Action{Record}, nil
		case Failed:
			return Claimed, []Action{Tell}, nil
		case RunHere:
			return Claimed, []Action{Start, Tell}, nil
		}
	case Returned:
		if e == RunHere { // the agent or the host ended before the guest ran here
			return Returned, []Action{Start}, nil
		}
	case Receiver:
		switch e {
		case Loaded:
			return Accepted, []Action{Record, Finish}, nil
		case Broken, Asked, Overruled, AbandonHere:
			// A source that asks has lost the session, and the offer with it. What was
			// made is removed first: a crash between leads here once more.
			return Aborted, []Action{Discard, Record, ReplyAborted}, nil
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
		case RunHere:
			return Accepted, []Action{Start}, nil
		case AbandonHere, Overruled:
			return Aborted, []Action{Halt, Record, Discard, ReplyAborted}, nil
		}
	case Running:
		switch e {
		case Asked, Overruled:
			return Running, []Action{ReplyRunning}, nil
		case Broken:
			return Running, nil, nil
		}
	case Aborted:
		switch e {
		case Asked, Overruled:
			return Aborted, []Action{ReplyAborted}, nil
		case Broken:
			return Aborted, nil, nil
		}
	}
	return s, nil, fmt.Errorf("handoff: %v in state %q", e, s)
}
