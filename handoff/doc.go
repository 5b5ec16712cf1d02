// Package handoff decides who owns a guest while it changes hosts.
//
// It is the last-agent form of two-phase commit. The source makes an offer:
// with it the destination has everything it needs, and with it the source
// gives the decision away. The destination decides by a durable record,
// Accepted or Aborted. A source that has made its offer never resumes the
// guest on its own: it asks until it has the answer.
//
//	source                                  destination
//
//	Owner ────── failure ──► Returned       Receiver ─── failure, peer lost ──► Aborted
//	  │ ready                   ▲              │ loaded
//	  ▼ (journal, send offer)   │ aborted      ▼ (journal, Finish)
//	Offered ────────────────────┤           Accepted ─── never ran ──► Aborted
//	  │ running                 │              │ resumed
//	  ▼                         │              ▼
//	Released                    │           Running
//
// The invariants, which the tests check over every order of events, losses
// and crashes:
//
//   - The source runs the guest only in Owner and Returned.
//   - The destination runs it only after Accepted was durable.
//   - Returned after Offered needs the destination's Aborted to be durable, and
//     Aborted is final: a destination that aborted never accepts.
//
// Source and Destination are values: Step takes an event and gives the next
// state and the actions to carry out, in order. There is no clock, goroutine
// or I/O in them. An action Record must be durable before the next action is
// begun; the journal of this package does that.
package handoff
