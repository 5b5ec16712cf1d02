// Package handoff decides who owns a guest while it changes hosts.
//
// It is the last-agent form of two-phase commit. The source makes an offer:
// with it the destination has everything it needs, and with it the source
// gives the decision away. The destination decides by a durable record,
// Accepted or Aborted. A source that has made its offer never resumes the
// guest on its own: it asks until it has the answer.
//
//	source                                         destination
//
//	Owner ───── failure ─────────────► Returned    Receiver ── failure, peer lost ──► Aborted
//	  │ ready                            ▲ ▲          │ loaded                         ▲ ▲
//	  ▼ (record, send offer)             │ │          ▼ (record, Finish)               │ │
//	Offered ── aborted ──────────────────┘ │       Accepted ── never ran ──────────────┘ │
//	  │ ├┄ run here ┄► Claimed ── aborted ─┘          │ ├┄ abandon here, overruled ┄┄┄┄┄┄┘
//	  │ │                └─ running ──► Split         │ └┄ run here: started, then as resumed
//	  │ └┄ abandon here ┄► Abandoned                  ▼ resumed
//	  ▼ running                                    Running
//	Released
//
// Dotted are an operator's words. Running, Aborted, Released, Returned, Abandoned
// and Split are final.
//
// The invariants, which the tests check in every order of events, losses,
// duplicates, delays and crashes there is:
//
//   - The source runs the guest only in Owner, Returned, Claimed and Split.
//   - The destination runs it only after Accepted was durable.
//   - Returned after Offered needs the destination's Aborted to be durable, and
//     Aborted is final: a destination that aborted never accepts. Released needs
//     its Running to be, likewise.
//   - When faults stop, a move ends by itself, but where Accepted is found and the
//     guest does not run: nobody can tell whether it has. There a person decides.
//   - An operator whose word is true makes no second owner. One side has the disks
//     whatever operators say.
//
// An agent that starts gives Failed to a source that is not final, and Broken to a
// destination that is not, or Resumed where what it accepted runs.
//
// Step is a function of values: it takes a state and an event and gives the next
// state and the actions to carry out, in order. There is no clock, goroutine or
// I/O in it. An action Record must be durable before the next action is begun,
// unless Recurs says otherwise; the journal of this package does that.
//
// docs/HANDOFF.md has the reasons, and what an operator may do; docs/handoff.pml
// is a model of it for spin.
package handoff
