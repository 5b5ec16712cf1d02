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
// # Frames from Source to Dest, version 1
//
//	01 start   u16 version
//	02 batch   u8 method, u8 page bits, u32 size, u32 crc, operations
//	03 tail    what follows is the tail
//	04 end     u64 bytes of the whole stream
//
// The first frame is start, the last is end; tail comes at most once. The
// operations of a batch are encoded with the method of package compress and
// have size bytes when decoded. crc is CRC-32C of the stream bytes they stand
// for, at most 270,336 of them. A page has 1<<(page bits) bytes. A stream that
// was aborted has no end frame.
//
// Operations, w and [block] as in QEMU's stream:
//
//	01 bytes   u32 n, n bytes
//	02 zero    u64 w, u32 count, [block]    zero pages, w growing by the page size; count is 1 with a block
//	03 page    u64 w, [block], one page
//
// # Frames from Dest to Source
//
//	81 return  bytes of the return path, at most 65,536
//
// Numbers of frames and operations are only appended. A receiver refuses a
// frame, an operation or a version that it does not know.
package memsync
