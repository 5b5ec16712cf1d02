// Package hypervisor drives the local libvirtd: it reads domains, checks
// whether one can move, creates its disks, and plays the client of libvirt's
// migration protocol, version 3, on both hosts of a move.
//
// # A migration
//
// Each agent talks to its own libvirtd only; the two libvirtd never see each
// other. What one side's call returns is carried to the other side by the
// agents, unchanged:
//
//	source                                   destination
//	BeginOut   -> XML, cookie        ---->
//	                                         PrepareIn -> cookie; QEMU listens
//	                                 <----   on the RAM and the NBD socket
//	Perform    mirrors the disks into the source's NBD socket, then sends
//	           memory and devices to its RAM socket; the guest is paused at
//	           the end of it -> cookie
//	                                 ---->
//	                                         Finish: the guest runs here
//	                                 <----
//	Confirm    kills the source's paused guest, or resumes it
//
// Each side holds one connection for the whole sequence, because libvirt ties
// the migration to it: at the destination a connection that closes before
// Finish destroys the incoming domain; at the source one that closes between
// Perform and Confirm leaves the guest paused, for [Host.Resume] or
// [Host.Destroy] to decide.
//
// Failures, as libvirt wants them answered:
//
//	PrepareIn fails   Confirm(cancelled)
//	Perform fails     the source runs again already; Finish(cancelled), no Confirm
//	Finish fails      Confirm(cancelled) resumes the source
//	Finish succeeds   Confirm
//
// An [Outgoing] remembers how far it came, so that Confirm(cancelled) may
// follow any of them.
//
// # Blocked calls
//
// A libvirt call has no timeout of its own. Every call here ends when its
// context does, by closing the connection that carries it; the error is then an
// [ErrNoAnswer], and whether libvirtd did what was asked is unknown.
package hypervisor
