// Package tunnel carries sessions between two agents: who the peer is, and
// named channels of frames to it, over as many connections as pay, and through the
// loss of any of them. Beside these it carries packets, such as those of a tunnel
// for IP.
//
// An agent has one Endpoint, a UDP socket and a TCP one at the same port, that
// both dial and listen. A Session is between two agents that trust each other's ID.
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
// A session is what two agents have between them from Dial to Close: channels,
// whose frames arrive exactly once whatever becomes of the connections that carry
// them. Those are its carriers: QUIC connections (RFC 9000), of which each is one
// bidirectional stream, and TLS 1.3 over TCP, at the same port number. Behind TLS
// both are a sequence of bytes in each direction. ALPN is "wanmig/2".
//
//	dialer                                   listener
//	ClientHello                        >
//	                                   <     ServerHello, certificate, Finished
//	checks the listener's ID
//	certificate, Finished, hello       >     checks the dialer's ID
//	                                         finds the session, or has a place for one
//	                                   <     answer
//	1, a byte                          >     makes the session
//	frames                             <>    frames
//
// A dialer may try several addresses and both transports at once, and confirms one.
// Its hello, and the listener's answer:
//
//	offset  size  content
//	0       1     version: 1
//	1       2     length of the rest, at most 1024
//	3       16    token of the session; zeros ask for a new one
//	19      4     number of the carrier
//	23      4     seconds that the session may be without a link
//	27      2     port at which the dialer listens
//	29      1     what all its carriers are restricted to: 0 nothing, 1 QUIC, 2 TCP
//	30            bytes of later versions; ignored
//
//	0       1     version: 1
//	1       2     length of the rest, at most 1024
//	3       1     status: 0 welcome, 1 no such session, 2 busy, 3 too many carriers
//	4       16    token of the session
//	20            bytes of later versions; ignored
//
// Over QUIC a dialer sends from the port where it listens, or for every second carrier from
// another one. No number is used twice in a session. The side that has dialled it uses even
// ones, from 0; the other, which may dial too when the link was lost, odd ones.
//
// # Frames of a carrier
//
// Numbers are big-endian.
//
//	kind        bytes behind the kind                          counts
//	1 data      flags u8, channel u32, offset u64, n u16, n bytes   yes
//	2 reset     channel u32, code u8                                yes
//	3 done      channel u32, code u8                                yes
//	4 credit    channel u32, limit u64                              yes
//	5 gone      carrier u32, count u64                              yes
//	6 ack       count u64                                           no
//	7 ping                                                          no
//	8 close     code u8, n u16, n bytes of reason, at most 256      no
//	9 retire                                                        no
//
// Each side counts the frames of kinds 1 to 5 that a carrier has brought, and
// says so with ack on the same carrier: after 16 frames, 64 KiB or 10 ms, and at
// once when asked with ping. A sender keeps such a frame until a carrier that it
// has given it to is known to have brought it.
//
// When a side closes a carrier, or finds it closed, nothing that still comes on
// it counts. The side says with gone how much had. The other side does the same,
// and gives what did not come to other carriers. So a frame is sent again only if
// it was lost, but for those that a sender has given to two carriers in order to be
// faster; of these the receiver ignores the second. gone for a carrier that a side
// has never had is answered with a count of 0. A gone frame whose own carrier is
// closed is sent again without waiting for the peer's word on that one, which may
// be in the same position.
//
// A side that wants fewer carriers says retire on one, and gives it no more frames
// that count. The other side does so too, and closes it when all of its own were
// acknowledged: so none is sent again.
//
// # Channels
//
// A channel is a sequence of bytes in each direction. The side that has dialled
// the session numbers those that it opens 0, 2, 4, the other 1, 3, 5. A data frame
// says where its at most 16368 bytes belong; its flag 1 says that the direction
// ends behind them, and only then may it have none. Bytes that are sent again are
// cut as they were. What the opener sends begins with a header, whole in the
// channel's first data frame:
//
//	offset  size  content
//	0       1     version: 1
//	1       1     length of the rest: 3 + n or more
//	2       1     priority: 0 control, 1 tail, 2 memory, 3 disk, 4 background
//	3       1     flags: 1 unordered
//	4       1     n, length of the name: 1 to 64
//	5       n     name: a-z, 0-9, '.', '_', '-', '/'
//	5+n           bytes of later versions; ignored
//
// The bytes behind it, and those of the other direction, are the channel's frames,
// each a u32 length of at most MaxFrame and that many bytes. Of an unordered
// channel each data frame is one frame, without a length, and the header has one
// for itself.
//
// A side may send 256 KiB of a direction, and then up to the limit that the peer
// has given it with credit; limits never go down. done says that the receiver wants no
// more: code 0 when it has had everything to the end, or why it will not. reset says
// that the sender has ended its direction early, also when it was told so by done;
// what of it was not received yet is void. A channel is over when both directions
// have their end or reset, and their done. The codes:
//
//	0  all was received
//	1  the channel was closed before its end
//	2  the peer broke the format
//	3  a frame was interrupted in its middle
//
// Each side has at most MaxChannels open that it has opened itself. A breach of any
// of this ends the session with a close frame of code 1. Code 0 is an end with a
// reason, code 2 a carrier or a session that was lost.
//
// # States of a session
//
//	     all carriers silent, or none
//	up <------------------------------> lost ---> ended: for longer than the outage that
//	 |     a carrier brings something     |       it was allowed, or the peer was restarted
//	 \---> ended: close, by either side <-/
//
// Without a sign of life for a second a carrier is asked for one. One that is silent
// for 4 s while another is not, or that acknowledges nothing for 20 s, is
// given up; when all are, the link is lost. Then the side that has dialled looks up
// the peer's address again and dials, and after 3 s the other side does so too, to
// where its peer was: again after a quarter of a second, later 2 s, or at once when an address or
// route of the host changes.
//
// # What goes when
//
// A carrier takes the next frame when it can send, so the fastest carry most. Of
// the channels that have something to send, it takes the highest priority; those of
// memory and disks take turns. Of several carriers one takes control frames only,
// and a small control frame goes over a second carrier too: one lost packet does not delay
// it. A carrier that finds nothing to send takes what has been on its way for long over
// another, which waits for a lost packet. A rate that the user or the governor sets holds back all but
// control frames.
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
// # Memory and buffering
//
// Send returns when all but the last 64 KiB of what a channel was given has been taken by
// carriers. A carrier over TCP lets 64 KiB wait in its socket for what congestion control
// allows, one over QUIC a packet.
//
// Until the peer has acknowledged them, a session keeps at most 64 MiB and 4096
// data frames of what it has sent, and when it knows what the link takes, six round trips of that. A receiver keeps what comes before its turn: on a channel up
// to 32 MiB beyond what its reader has had, on all channels of a session 96 MiB, and
// 256 KiB more on each. A reader that never begins holds 256 KiB. A small frame has
// memory of its own, or joins the one before; the session ends when 262144 wait that could not, or when
// the peer leaves 65536 frames without data unacknowledged. Besides, a
// carrier over QUIC holds up to 6 MiB behind a packet that was lost, and one over TCP
// what the kernel's socket buffer does.
package tunnel
