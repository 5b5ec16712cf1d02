// Package blocksync moves the content of a disk to another host while its guest
// runs.
//
// On the source, QEMU's mirror job writes into an Outbox, an NBD export that
// answers at once and keeps what is not sent yet: in memory, then in a spool
// file, and beyond both by letting QEMU wait. On the destination a Target writes
// into QEMU's NBD export of the new disk.
//
//	guest > QEMU mirror > Outbox ──── one channel per disk ────> Target > QEMU > new disk
//	                       ^                                        │
//	                       └── held, durable, progress, failure ────┘
//
// Content that the destination holds is not sent. The source offers what it is
// about to send for the first time by the fingerprints of its pages, up to 32 MiB
// ahead, so that no answer is waited for. The destination looks them up in the
// move's Content, reads what is there, compares, and keeps the bytes of those
// that are the same until it is told to apply them: content that was overwritten
// meanwhile, or never was what the index says, is not held, and is sent.
// When little is left nothing is offered: a guest that is stopped would wait for
// the answer.
//
// Where the destination has an older copy of the disk, of a move that was
// interrupted or from before the guest left, or images that its operator has
// listed, blocks of 64 KiB are offered first, and pages where the blocks differ:
// an exchange of 0.05 % of what is the same. A block is looked for at its own
// place, and where its first page is. What is found at its own place is not
// written again. The rest of the older copy
// reads as zeros in the end, as a new disk does; it stays until the first
// barrier, so that zeros which only prepare a disk do not destroy it.
//
// # Protocol, version 3
//
// A frame is one type byte and a body, at most 4 MiB together. Numbers are
// big-endian. Offsets and lengths are bytes of the guest's disk and lie within
// its size.
//
// Source to destination:
//
//	type  name     body
//	1     open     version u8, size u64, verify u8
//	2     data     extents, method u8, payload
//	3     zero     extents, each: offset u64, length u64
//	4     barrier  id u64, final u8
//	5     offer    id u32, unit u8, extents, fingerprints
//	6     apply    id u32
//	7     check    last u8, {segment u32, fingerprint of 16 bytes}...
//
// extents: count u16, then each: offset u64, size u32
//
// Destination to source:
//
//	type  name      body
//	1     durable   id u64, applied u64
//	2     progress  applied u64
//	3     failure   text, UTF-8, at most 1024 bytes
//	4     held      id u32, two bits a unit
//	5     ready     flags u8
//	6     checked   {segment u32, same u8}...
//
// open is the first frame; a version or size that differs from the
// destination's is refused. data carries 1 or more extents of 1,048,576 bytes
// together; method and payload are those of package compress, of the extents'
// content one after the other. zero carries 1 or more extents that read as
// zeros. Frames are applied in order where they overlap, in any order where they
// do not.
//
// offer carries a fingerprint of package compress for each whole unit, counted
// from the disk's start, that lies in its extents, in their order. Unit 0 is a
// page of 4 KiB; unit 1 a block of 64 KiB, which has the fingerprint of those of
// its pages, and after it that of the first page. held answers with two bits for each, the
// first the lowest of the first byte: 0 where the destination does not have the
// content, else 1 for a disk of the move, 2 for an image that its operator has
// listed, 3 for the same place or other content that the guest left. apply writes that; its place among the frames is
// what counts, not the offer's. At most 64 offers may wait for their apply, after
// which the id is free: the destination keeps up to 64 MiB for them.
//
// What the destination has at a page since the source sent it, the source knows
// by itself: of a block that the mirror copies again only the pages that have
// changed cross.
//
// ready answers open; its lowest bit tells that blocks are worth offering.
//
// With verify 1 the disk is complete only when all of its segments of 1 MiB were
// compared and not written to since. check carries digests of up to 256, and its
// place among the frames counts: the destination reads each when what was sent
// before is written, and answers with checked. One that differs fails the
// transfer only in a frame with last 1, which is sent when the guest is stopped.
//
// barrier asks for durable, with the same id, once everything sent before it is
// on stable storage. Ids count from 1. The barrier with final 1 is the last
// frame. applied counts the bytes of all data and zero extents that are done;
// progress repeats it now and then. failure ends the transfer: its text is for
// the operator.
//
// Types, methods and trailing fields are only appended, each with a new version
// in open; a receiver refuses a type it does not know and a body of another
// length.
package blocksync
