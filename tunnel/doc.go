// Package tunnel carries sessions between two agents: who the peer is, and
// named channels of frames to it. Beside these it carries packets, such as those
// of a tunnel for IP.
//
// An agent has one Endpoint, a UDP socket that both dials and listens. A
// Session is up to Carriers QUIC connections (RFC 9000), its carriers, between
// two agents that trust each other's ID. A Control channel is a bidirectional
// stream of the first carrier, a Memory or Disk channel one on each carrier.
//
// # Identity
//
// An agent is its Ed25519 key. Its ID is the SHA-256 of the 32-byte public key
// and a check sum, in base32, so that a mistyped ID is recognised before it is
// used:
//
//	bytes   content
//	0..31   SHA-256 of the raw public key
//	32..34  first 3 bytes of SHA-256("wanmig id" and bytes 0..31)
//
// These 35 bytes are 56 letters, written as eight groups of seven.
//
// The TLS 1.3 certificates are self-signed and only carry the key: chains,
// names and dates decide nothing. A dialer accepts exactly the ID that it
// expects, a listener the IDs that it trusts. A peer that is refused gets a
// bare TLS alert; what it can learn is the listener's public key. There is no
// 0-RTT, and there are no session tickets: every session proves both keys.
//
// # A session
//
//	dialer                                   listener
//	ClientHello, ALPN "wanmig/1"       >
//	                                   <     ServerHello, certificate, Finished
//	checks the listener's ID
//	certificate, Finished              >
//	                                         checks the dialer's ID
//	                                   <     greeting, on a unidirectional stream
//	open                                     open
//
// TLS 1.3 lets a dialer finish before the listener has judged it, so a session
// exists for the dialer only when it has the greeting:
//
//	offset  size  content
//	0       1     version of the protocol within "wanmig/1": 1
//	1       16    token of the session, random
//	17            bytes of later versions, up to 1024; ignored
//
// The dialer then adds carriers, from the same socket to the same address, while
// the first one is used already:
//
//	ClientHello, ALPN "wanmig/1/join"  >
//	                                   <     ServerHello, certificate, Finished
//	checks the listener's ID
//	certificate, Finished              >
//	request, on a unidirectional stream >    checks the dialer's ID
//	                                         finds the session by token and ID
//	                                   <     greeting, as above
//	end of the request's stream        >     uses the carrier
//
// The request has the format of the greeting and the token of the session. A
// request with another token, from another ID or beyond Carriers is refused by
// closing the connection, and costs the session nothing; nor does a dialer that
// gives up before the end of its request. The session has fewer carriers then.
//
// # States of a session
//
//	handshake > greeted > open > closed here      Close, with a reason
//	    \                  \---> closed by peer   its reason
//	     refused            \--> lost             silence, or the peer restarted
//
// A session dies with its first carrier, and with any other that was added: what
// was on its way there is lost, and nothing resumes it yet. The reason names the
// carrier. The keep-alive of KeepAlive and the limit of IdleTimeout bound how long
// a dead link goes unnoticed.
//
// # A channel
//
// The opener's stream on the first carrier starts with a header; the acceptor's
// direction has none.
//
//	offset  size  content
//	0       1     version: 1
//	1       1     length of the rest: 2 + n or more
//	2       1     priority: 0 control, 1 memory, 2 disk
//	3       1     n, length of the name: 1 to 64
//	4       n     name: a-z, 0-9, '.', '_', '-', '/'
//	4+n           bytes of later versions; ignored
//
// Frames follow in both directions, each a big-endian u32 length of at most
// MaxFrame and that many bytes. The end of a channel is clean between two frames
// only.
//
// The frames of a Control channel stand on the stream as they are. Those of a
// Memory or Disk channel are one sequence of bytes in each direction, cut at will
// into chunks, on streams of all carriers. The opener opens these streams, now or
// when a carrier joins; they may arrive before the channel's first stream, and
// start with:
//
//	offset  size  content
//	0       1     version: 1
//	1       1     length of the rest: 8 or more
//	2       8     QUIC stream ID of the channel's stream on the first carrier
//	10            bytes of later versions; ignored
//
// Chunks follow in both directions, on the first carrier behind the channel's
// header:
//
//	offset  size  content
//	0       8     offset of the chunk in its direction
//	8       2     n, length: 1 to 16384; 0 at the end of the direction
//	10      n     bytes
//
// Offsets ascend on each carrier and never overlap; a chunk goes to the first
// carrier that can take it, but not to the session's first one when there is
// another. A direction that is ended states its end, a chunk of length 0, on each
// stream, which ends there. A breach of this resets the channel, a bad header ends
// the session.
//
// A stream that is reset carries one of these codes:
//
//	1  the channel was closed before its end
//	2  the peer broke the format
//	3  a frame was interrupted in its middle
//	4  the channel was over when this stream of it came; nothing is missing
//
// Connections are closed with a reason and application code 0, with code 1 when
// the peer broke the format of a header, or with code 2 when another connection
// of the session or the packets was lost.
//
// # Packets
//
// Packets travel in the DATAGRAM frames (RFC 9221) of up to 8 connections of their
// own. The first of these is asked for and given like this:
//
//	dialer                                   listener
//	ClientHello, ALPN                  >
//	  "wanmig/1/packets"               <     ServerHello, certificate, Finished
//	checks the listener's ID
//	certificate, Finished              >
//	request, on a bidirectional stream >     checks the dialer's ID
//	                                         AcceptPackets takes it up
//	                                   <     greeting, on the same stream
//
// Its greeting is that of a session, and the others join it as a session's
// carriers do. The packets end with any of their connections. The request:
//
//	offset  size  content
//	0       1     version: 1
//	1       1     n, length of the tag: 0 to 64
//	2       n     tag: what the packets are for, as the dialer's program knows it
//	2+n           bytes of later versions, up to 1024 to the end of the stream; ignored
//
// A dialer has 10 s to send it and to be accepted.
//
// A datagram holds one packet, or nothing when it is only sent so that QUIC finds
// the MTU of the path:
//
//	offset  size  content
//	0       4     number of the packet in its direction, from 0, wraps
//	4             packet, not empty
//
// It goes to whichever connection is ready for it. The receiver restores the
// order: it waits for a missing packet until all connections have brought a later
// one, 30 ms at most. Without this, TCP inside took the other order for losses.
// While congestion control holds all connections back, 32 datagrams wait in each,
// and Send waits too: the queue in front of it, that of a TUN device, should be short,
// since it drops what does not fit. At the receiver 128 wait for each connection.
//
// A single connection gives up most of a link for minutes after a few losses, and
// its one queue overflows when a busy host stops the receiver for 10 ms. TCP inside
// a TUN device got, of an emulated link of 100 Mbit/s and 50 ms, in 10 s, Mbit/s:
//
//	                            no tunnel   1 connection   8 connections
//	no loss,    CUBIC / BBR      94 / 94       87 / 90         88 / 89
//	0.1 % loss, CUBIC / BBR      22 / 93       16 / 10         18 / 65
//
// # Versions
//
// Only append: new bytes go where the tables say "later versions", and a reader
// ignores what it does not know there. Anything else is a new ALPN name.
//
// # Carriers
//
// QUIC's NewReno leaves slow start early where delays vary, and then grows by a
// packet per round trip; after a loss it needs long to recover. Several
// connections do both as many times faster. Used of an emulated link in 15 s
// by the frames of one Memory channel, with 1, 4, 8 and 16 connections, on a busy
// host with two cores:
//
//	100 Mbit/s,  50 ms, no loss    80   95   96   90 %
//	200 Mbit/s, 100 ms, no loss    93   89   95   94 %
//	200 Mbit/s, 100 ms, 0.01 %     29    -   85   95 %
//	200 Mbit/s, 100 ms, 0.1 %       6   14   29   58 %
//
// Like other TCP-friendly senders they fill the queue of the narrowest link, so
// control frames take the path's time and that queue's.
//
// # Memory and buffering
//
// Send on a Control channel returns when all but the last 1452 bytes of the frame
// are in packets that congestion control and flow control let go. On another
// channel each carrier holds one chunk besides, so that up to 15 x 16 KiB of the
// channel have not left when Send returns. Beyond them only the host's own queues
// (quic-go's of a few packets, the socket, the interface) hold data, and these
// count as in flight.
//
// A receiver puts chunks into order without storing them: a chunk that is ahead
// stays in the flow-control window of its carrier, and of the others the missing
// one is at the head of its carrier's stream. So a reader that stops holds up to
// 2 MiB on each carrier, 32 MiB in all, and its session 12 MiB on each carrier,
// 192 MiB in all, whatever the peer sends; five channels that stopped at their
// limit leave the others room, and leave the first carrier to control frames.
package tunnel
