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
//	                       └── durable, progress, failure ──────────┘
//
// # Protocol, version 1
//
// A frame is one type byte and a body, at most 4 MiB together. Numbers are
// big-endian. Offsets and lengths are bytes of the guest's disk and lie within
// its size.
//
// Source to destination:
//
//	type  name     body
//	1     open     version u8, size u64
//	2     data     extents, each: offset u64, size u32, method u8, length u32, payload
//	3     zero     extents, each: offset u64, length u64
//	4     barrier  id u64, final u8
//
// Destination to source:
//
//	type  name      body
//	1     durable   id u64, applied u64
//	2     progress  applied u64
//	3     failure   text, UTF-8, at most 1024 bytes
//
// open is the first frame; a version or size that differs from the
// destination's is refused. data carries 1 or more extents of 1 to 1,048,576
// bytes each; method and payload are those of package compress, length is the
// payload's. zero carries 1 or more extents that read as zeros. Frames are
// applied in order where they overlap, in any order where they do not.
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
