// Package migrate carries out one move of a guest, from the check to the
// settling, on either of its two hosts.
//
// An [Engine] stands for one host. [Engine.Start] moves one of its guests away;
// [Engine.Serve] answers a peer that moves one here. What one agent says to the
// other on the control channel of a session is in wire.go; docs/WIRE.md draws
// it. Who owns the guest at any moment is decided by package handoff alone:
// this package carries out its actions.
//
//	source.go       the move as its source sees it; result.go is how it ended
//	sync.go         the source's mirror, memory stream and libvirt's Perform, run concurrently
//	destination.go  a session with a peer, as its destination sees it
//	incoming.go     the guest that arrives: disks, memory, acceptance
//	plan.go         which disk goes where, and the checks of both hosts
//	share.go        how memory and disks share the link
//	converge.go     when the guest is stopped; predict.go is from what, stop.go how
//	meter.go        rates and the estimate of the time left
//	decision.go     the handoff at the source, and its end
//	retry.go        another attempt after one that was rolled back
//	rollback.go     a move that is done, taken back
//	undecided.go    either side while it does not know the end, and what operators say of it
//	recover.go      what an agent finds in its journal when it starts
package migrate
