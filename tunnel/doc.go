// Package tunnel carries sessions between two agents: who the peer is, and
// named channels of frames to it.
//
// An agent has one Endpoint, a UDP socket that both dials and listens. A
// Session is one QUIC connection (RFC 9000) between two agents that trust each
// other's ID; a Channel is one bidirectional QUIC stream of it.
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
//	1             bytes of later versions, up to 1024 in all; ignored
//
// # States of a session
//
//	handshake > greeted > open > closed here      Close, with a reason
//	    \                  \---> closed by peer   its reason
//	     refused            \--> lost             silence, or the peer restarted
//
// A session dies with its connection. The keep-alive of KeepAlive and the limit
// of IdleTimeout bound how long a dead link goes unnoticed.
//
// # A channel
//
// The opener's stream starts with a header; the acceptor's direction has none.
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
// MaxFrame and that many bytes. The end of a stream is clean between two frames
// only. A stream that is reset carries one of these codes:
//
//	1  the channel was closed before its end
//	2  the peer broke the format
//	3  a frame was interrupted in its middle
//
// A connection is closed with application code 0 and a reason, or with code 1
// and a reason when the peer broke the format of a header.
//
// # Versions
//
// Only append: new bytes go where the tables say "later versions", and a reader
// ignores what it does not know there. Anything else is a new ALPN name.
//
// # Memory and buffering
//
// Send returns when all but the last 1452 bytes of the frame are in packets that
// congestion control and flow control let go. Beyond them only the host's own
// queues (quic-go's of a few packets, the socket, the interface) hold data, and
// these count as in flight. A reader that stops holds up to 16 MiB for its
// channel and 128 MiB for its session, never more; seven channels that stopped at
// their limit leave the others room.
package tunnel
