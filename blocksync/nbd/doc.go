// Package nbd speaks the Network Block Device protocol, as a server and as a client.
//
// The server is the target of a QEMU mirror on the source host; the client writes into the
// NBD server that a destination QEMU opens for an incoming migration. Both therefore speak
// to QEMU, over unix sockets, and to nothing else in a move. The source of everything below
// is the protocol document, doc/proto.md of the NBD project (NetworkBlockDevice/nbd).
// All numbers are big-endian. S is sent by the server, C by the client.
//
// # Handshake: fixed newstyle
//
//	S  u64 "NBDMAGIC"   u64 "IHAVEOPT"   u16 flags   1 fixed newstyle, 2 no zeroes
//	C  u32 flags                                     the same bits; others end the session
//
// Then options, each answered before the next, until GO or EXPORT_NAME starts transmission:
//
//	C  u64 "IHAVEOPT"   u32 option   u32 length   data
//	S  u64 0x0003e889045565a9   u32 option   u32 reply type   u32 length   data
//
//	option                  data                                    replies before ACK
//	1  EXPORT_NAME          name                                    none: see below
//	2  ABORT                                                        none; the session ends
//	3  LIST                                                         SERVER for each export
//	6  INFO                 u32 n, name[n], u16 k, k × u16 info     INFO as for GO
//	7  GO                   the same                                INFO; transmission starts
//	8  STRUCTURED_REPLY                                             none
//	9  LIST_META_CONTEXT    u32 n, name[n], u32 k, k × query        META_CONTEXT, id 0
//	10 SET_META_CONTEXT     the same; query: u32 n, text[n]         META_CONTEXT with its id
//
// Every other option, STARTTLS (5) and EXTENDED_HEADERS (11) among them, is declined with
// ERR_UNSUP. The data of an option is at most 64 KiB, a name at most 4096 bytes.
//
//	reply type              data
//	1  ACK
//	2  SERVER               u32 n, name[n]
//	3  INFO                 u16 0 EXPORT       u64 size   u16 transmission flags
//	                        u16 1 NAME         name
//	                        u16 3 BLOCK_SIZE   u32 minimum   u32 preferred   u32 maximum
//	4  META_CONTEXT         u32 id, "base:allocation"
//	2³¹ + e                 text for a human; e: 1 UNSUP, 3 INVALID, 5 TLS_REQD, 6 UNKNOWN
//	                        export, 8 BLOCK_SIZE_REQD
//
// EXPORT_NAME is answered by the start of transmission, or by the end of the session:
//
//	S  u64 size   u16 transmission flags   124 zero bytes unless both sides set no zeroes
//
//	transmission flags      1 has flags, 2 read-only, 4 FLUSH, 8 FUA, 0x20 TRIM,
//	                        0x40 WRITE_ZEROES, 0x80 DF, 0x100 MULTI_CONN, 0x400 CACHE
//
// # Transmission
//
//	C  u32 0x25609513   u16 flags   u16 command   u64 cookie   u64 offset   u32 length
//	   payload of length bytes if the command is WRITE
//
//	command                 flags that it may carry, beside 1 FUA
//	0  READ                 4 DF
//	1  WRITE
//	2  DISC                 no reply: what is in flight is answered, then the session ends
//	3  FLUSH                offset and length are 0
//	4  TRIM
//	5  CACHE                a hint; our server answers it and does nothing
//	6  WRITE_ZEROES         2 NO_HOLE   (0x10 FAST_ZERO is not offered)
//	7  BLOCK_STATUS         8 REQ_ONE   (only with base:allocation)
//
// Replies come in any order and carry the cookie of their request. Simple:
//
//	S  u32 0x67446698   u32 error   u64 cookie   data, if READ and error is 0
//
// After STRUCTURED_REPLY, READ and BLOCK_STATUS are answered only in chunks; other commands
// in either form. The last chunk of a reply has flag 1 (DONE):
//
//	S  u32 0x668e33ef   u16 flags   u16 type   u64 cookie   u32 length   payload
//
//	chunk type              payload
//	0      NONE
//	1      OFFSET_DATA      u64 offset, data
//	2      OFFSET_HOLE      u64 offset, u32 length
//	5      BLOCK_STATUS     u32 context id, then extents: u32 length, u32 state (1 hole, 2 zero)
//	0x8001 ERROR            u32 error, u16 n, text[n]
//	0x8002 ERROR_OFFSET     u32 error, u16 n, text[n], u64 offset
//
//	error                   1 EPERM, 5 EIO, 12 ENOMEM, 22 EINVAL, 28 ENOSPC, 75 EOVERFLOW,
//	                        95 ENOTSUP, 108 ESHUTDOWN
//
// READ and WRITE carry at most 32 MiB. A larger READ is answered EINVAL; after the header of
// a larger WRITE the server ends the session, since it will not swallow the payload.
//
// # Versions
//
// The protocol has no version number. A side uses what the other offered in the handshake, and
// the client falls back, step by step, to EXPORT_NAME and simple replies.
package nbd
