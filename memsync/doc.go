// Package memsync carries a guest's memory: it turns the migration stream of
// the source QEMU into frames and the frames back into the same bytes.
//
// Source reads QEMU's stream, recognises pages and zero pages, and passes what
// it does not recognise as it is. A wrong guess about the format therefore
// costs bytes on the link, never a wrong byte in the destination QEMU; each
// batch carries a checksum of the bytes it stands for, and Dest verifies it
// before QEMU sees them.
//
// # QEMU's stream
//
// Format: QEMU, migration/savevm.c and migration/ram.c, versions 2.4 to 10.
// Integers are big-endian.
//
//	u32 0x5145564d, u32 3                          header
//	07  u32 n, n bytes machine name, subsections   configuration
//	08  u16 command, u16 n, n bytes                command
//	01  u32 id, u8 n, name, u32 instance, u32 version, contents, [7e u32 id]
//	02  u32 id, contents, [7e u32 id]              part of a section; 03: its end
//	04  like 01                                    device state, of no stated length
//	00                                             end
//	06  u32 n, n bytes JSON                        description, may be absent
//
// The contents of section "ram" are records that begin with u64 w: the flags
// are the bits below the page size, the rest is the offset in a block.
//
//	w&02  zero page      [block] u8 0
//	w&04  sizes          u8 n, block id, u64 length, until the lengths reach the total in w
//	w&08  page           [block] one page
//	w&10  end of contents
//	w&20  with 02, 08, 40, 100: the block of the record before; else [block] is u8 n, block id
//	w&40  xbzrle         [block] u8 1, u16 n, n bytes
//	w&100 compressed     [block] u32 n, n bytes
//	w&200 multifd flush
//
// When the RAM section has ended the guest is stopped. The rest is the tail:
// device state, end and description. Device state has no lengths, so the tail
// is not parsed; see Source for how its end is found. A stream whose structure
// is not understood before that point (device state before RAM, iterable
// sections other than RAM, postcopy) passes opaquely from there.
//
// On the return path the destination QEMU answers in messages of u16 type,
// u16 n, n bytes. Type 1 is SHUT with a u32: 0 when the state was loaded.
//
// # Frames from Source to Dest, version 4
//
//	01 start   u16 version, u32 slots
//	02 batch   u8 page bits, u32 crc, operations, deltas, contents
//	03 tail    what follows is the tail
//	04 end     u64 bytes of the whole stream
//	05 offer   u32 number, 1 to 66 fingerprints of 16 bytes
//	06 use     like batch, and ends the oldest offer
//	07 mark    u32 number
//
// The first frame is start, the last is end; tail comes at most once. slots is
// how many pages both sides keep. crc is CRC-32C of the stream bytes that the
// batch stands for, at most 270,336 of them. A page has 1<<(page bits) bytes. A
// stream that was aborted has no end frame.
//
// Operations, deltas and contents of a batch are a section each, encoded on its
// own by package compress:
//
//	u8 method, u32 size when decoded, u32 n, n bytes
//
// Operations, w and [block] as in QEMU's stream:
//
//	01 bytes      u32 n, n bytes
//	02 zero       u64 w, u32 count, [block]           zero pages, w growing by the page size; count is 1 with a block
//	03 page       u64 w, [block]                      a page, the next of the contents
//	04 keep       u64 w, u32 slot, [block]            the same, and it is kept in the slot
//	05 reference  u64 w, u32 slot, [block]            the page that the slot has
//	06 delta      u64 w, u32 slot, u32 base, u16 n, [block]
//	07 held       u64 w, u32 slot, [block]            the next page that was found of the offer, kept in the slot
//
// A delta is the page in the slot base, changed by the next n bytes of the
// deltas as package compress says; it is kept in the slot. The contents are
// pages one after the other, and operations use up both, and the pages that were
// found of the offer.
//
// # The page store
//
// Pages that were sent are kept at both sides, up to a number that the smaller
// of their limits allows. Operations 04, 06 and 07 write a slot, in the order of
// the stream, so that at each operation the source knows what each slot of the
// destination has, without an answer. Which slot that is, and what is replaced
// when all are in use, is the source's choice alone: the destination has an
// array of pages and nothing else. Slots have 4096 bytes; the pages of other
// sizes are all sent as 03. A slot is written if it was written before or all
// before it were, and read if it was written.
//
// An equal page is found by a hash and then compared, byte for byte, so that a
// reference never stands on a hash. What the destination holds does, on one of 128
// bits that is cryptographic, and on the batch's checksum.
//
// # Pages that the destination holds
//
// Half of a guest's memory may be content of its disk, which the destination has
// already. In the first pass Source offers pages that it would send as they are,
// by their fingerprints (package compress). Dest has them looked up, keeps those
// that are found, compared, until they are used, and answers with two bits for
// each: 0 nowhere, 1 on a disk of the move, 2 in an image there, 3 in an older
// copy of a disk.
//
//	Source                                       Dest
//	05 offer 0 {a, b}      ────────────────────►
//	05 offer 1 {c}         ────────────────────► looks a and b up, has b
//	                       ◄──────────────────── 82 held 0 {0, 1}
//	06 use {keep a, held}  ────────────────────►
//	                       ◄──────────────────── 82 held 1 {0}
//	06 use {keep c}        ────────────────────►
//
// An offer is of the pages of one batch, which waits for the answer; so do those
// behind it, and meanwhile the stream is read on. Offers are numbered from 0, and
// used in their order. At most 128 are made and not used yet, so that each side
// keeps at most 33 MiB for them. Nothing is offered in the tail, nor when less
// than 128 MiB are left of the first pass: QEMU may have stopped the guest then,
// which would wait for the answer. After 16 MiB of which nothing was found one
// batch of 16 is offered.
//
// # Frames from Dest to Source
//
//	81 return  bytes of the return path, at most 65,536
//	82 held    u32 number, two bits a page, the first the lowest of the first byte
//	83 passed  u32 number
//
// passed answers a mark of the same number once QEMU has taken all that was sent before
// the mark, or in the tail once it is held. Marks are numbered from 1. A source that is about to have the guest
// stopped so learns that nothing stands before its tail any more.
//
// Numbers of frames and operations are only appended. A receiver refuses a
// frame, an operation or a version that it does not know.
package memsync
