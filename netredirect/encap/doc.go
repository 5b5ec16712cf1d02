// Package encap carries IP packets between two hosts in user space: IP in IP for hosts whose kernel has no tunnels, and
// datagrams of a connection for networks that let no IP in IP through.
//
// A tunnel is a TUN device, which the caller routes packets into, a way to the peer, and a Gate between them. The device
// is made, set up and given its MTU here; it has no addresses. It vanishes when the tunnel is closed or the process ends.
//
// # On the wire
//
// OpenIPIP sends the bytes that Linux's ipip, sit and ip6tnl (mode any, encaplimit none) send, and takes what they send:
//
//	outer   inner   protocol   specification     kernel
//	IPv4    IPv4    4          RFC 2003          ipip
//	IPv4    IPv6    41         RFC 4213          sit
//	IPv6    IPv4    4          RFC 2473          ip6tnl
//	IPv6    IPv6    41         RFC 2473          ip6tnl
//
// Outer IPv4 header:
//
//	offset  size  content
//	0       1     0x45: version 4, no options
//	1       1     TOS of the inner packet: its DSCP and ECN
//	2       2     length of the whole
//	4       2     identification
//	6       2     0x4000: don't fragment
//	8       1     TTL, 64
//	9       1     protocol, 4 or 41
//	10      2     checksum
//	12      4     Config.Local
//	16      4     Config.Remote
//	20            inner packet
//
// Outer IPv6 header:
//
//	offset  size  content
//	0       4     version 6, traffic class of the inner packet, flow label
//	4       2     length of the inner packet
//	6       1     next header, 4 or 41
//	7       1     hop limit, 64
//	8       16    Config.Local
//	24      16    Config.Remote
//	40            inner packet
//
// Outer packets that come in may have IPv4 options or IPv6 destination options, such as ip6tnl's encapsulation limit,
// and may come in fragments, which the kernel puts together.
//
// A datagram of OpenDatagrams is an inner packet and nothing else.
//
// # Congestion
//
// The ECN field is copied to the outer header (RFC 6040, normal mode), where routers may change it to CE or ECT(1). At the
// end the inner packet gets:
//
//	inner \ outer  Not-ECT  ECT(0)   ECT(1)   CE
//	Not-ECT        Not-ECT  Not-ECT  Not-ECT  dropped
//	ECT(0)         ECT(0)   ECT(0)   ECT(1)   CE
//	ECT(1)         ECT(1)   ECT(1)   ECT(1)   CE
//	CE             CE       CE       CE       CE
//
// # What passes
//
// A packet from the wire is dropped, and counted, for the first of these reasons:
//
//	spoofed    the outer source is not Config.Remote
//	malformed  not of the version that the protocol says; headers or length beyond the packet; wrong IPv4 checksum;
//	           more than 8 IPv6 extension headers
//	nested     its protocol, behind any IPv6 extension headers, is 4 or 41
//	foreign    neither for an address that lives here nor from one that lives at the peer, nor a probe
//	congested  see above
//
// A packet from the device has to be from an address that lives here or for one that lives at the peer. A probe is UDP
// between Config.Local and Config.Remote from and to Config.ProbePort. What follows the inner packet's stated length is
// cut off. An inner packet is not a tunnel's so that no loop of routes multiplies packets.
//
// # Length
//
// The device's MTU makes the kernel answer long packets with fragmentation needed (RFC 1191) or packet too big (RFC 8201).
// Outer packets are not fragmented. If a router on the way has said that it takes shorter ones only, the next packet that
// is too long for the path is dropped and counted, and the device's MTU lowered to what fits, but not below 1280 bytes,
// where IPv6 ends. Only SetMTU raises it again.
//
// # Merged packets
//
// The TUN device exchanges up to 64 KiB of a TCP flow at once with the kernel; golang.zx2c4.com/wireguard/tun splits and
// merges them. Network cards' drivers merge received segments too (GRO), also of packets inside IP in IP. A raw socket
// then gives one long packet whose TCP checksum has not been computed. It goes to the device as such, with
// struct virtio_net_hdr before it, and the kernel splits it when it has to.
package encap
