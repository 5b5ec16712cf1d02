// Package neighbour speaks ARP (RFC 826, RFC 5227) and IPv6 neighbour discovery
// (RFC 4861) for a VM that has moved, on one interface at a time, from user
// space. It changes nothing of the host: its traces end with its sockets.
//
// On the source host, AnnounceOnce and Announce tell the VM's old network that
// its addresses are now at the bridge. On the destination host, a Responder tells
// the VM that everything it looks for is at the bridge there. An Observer finds
// out which addresses a VM uses.
//
// # What is said
//
//	who            occasion             frames
//	Announce       0, 0.1, 0.3, 1 s     IPv4: an ARP request and an ARP reply, broadcast
//	                                    IPv6: an unsolicited advertisement to ff02::1
//	Responder      the VM's question    IPv4: an ARP reply; IPv6: a solicited advertisement
//	Responder.Tell call                 IPv4: an ARP reply; IPv6: an unsolicited advertisement
//	Observer       never
//
// A Responder's frames go straight to the VM's tap: what a host sends on a
// bridge's port is not bridged, so only the VM hears them.
//
// Announcements are gratuitous (sender and target are the same address), because
// Linux otherwise ignores a change of an entry that is younger than a second
// (locktime, net/ipv4/arp.c). It takes a reply for gratuitous only if both
// hardware addresses are equal too (arp_is_garp).
//
// Every advertisement overrides, and has the router flag. A host does nothing
// with that flag set, but one that sees it cleared for its default router gives
// up the routes through it (RFC 4861, 7.2.5): the VM's gateway must stay one.
//
// # ARP, EtherType 0x0806
//
//	offset  size  content
//	0       2     hardware type: 1, Ethernet
//	2       2     protocol type: 0x0800, IPv4
//	4       1     length of a hardware address: 6
//	5       1     length of a protocol address: 4
//	6       2     operation: 1 request, 2 reply
//	8       6     sender's hardware address
//	14      4     sender's address; 0.0.0.0 in a probe (RFC 5227)
//	18      6     target's hardware address; zero in a request
//	24      4     target's address
//	28            padding, ignored
//
// # Neighbour discovery, EtherType 0x86dd
//
//	offset  size  content
//	0       40    IPv6 header: next header 58, hop limit 255; no extension headers
//	40      1     type: 135 solicitation, 136 advertisement
//	41      1     code: 0
//	42      2     check sum, over a pseudo-header too (RFC 4443, 2.3)
//	44      4     flags of an advertisement, from the top: router, solicited, override
//	48      16    target's address
//	64            options
//
// An option is a type, a length in units of 8 bytes and content. Type 1, the
// source's link-layer address, is read in solicitations, type 2, the target's, in
// advertisements; both have length 1. Other options are skipped.
//
// # What is heard
//
// A bridge takes the frames of its ports before sockets of one protocol see
// them, but after those of all protocols: sockets here are of the latter kind, and
// a BPF filter leaves in the kernel what is not asked for. Frames with a VLAN tag
// are left too: an access port has none. A frame from a guest is hostile. One that
// is not exactly what the tables say or does not come from the VM's hardware
// address is ignored; frames are read at a bounded rate, and what comes faster
// is lost in the kernel, where that is cheap.
package neighbour
