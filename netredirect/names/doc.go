// Package names moves the DNS records of a VM to its new addresses, with
// dynamic updates (RFC 2136) signed by TSIG (RFC 8945), and looks at every
// authoritative server whether they have arrived there.
//
// # Sequence
//
// The servers are those of the configuration: they are authoritative, and one
// of them takes updates. No caching resolver is asked for a record of the VM; the
// host's resolver is asked for addresses of name servers at most.
//
//	Find        SOA name          the zone: owner of the SOA in the answer, or in the
//	                              authority section of a negative one (RFC 2308)
//	            A, AAAA name      kept when they are addresses of the VM
//	            PTR reverse name  RFC 1035 section 3.5, RFC 3596 section 2.5; one alias to a
//	                              classless zone is followed (RFC 2317 section 4)
//	LowerTTL    UPDATE            then A, AAAA of every server until all have the low TTL
//	Move        UPDATE            one for each zone, names before reverse names
//	Status      NS zone           then SOA, A, AAAA, PTR of every server
//	RestoreTTL  UPDATE
//
// Each UPDATE goes to the configured servers in turn until one takes it. First
// the server's own answers are read, in signed queries, then the whole of each
// RRset read is made a prerequisite:
//
//	section       record                                class  RFC 2136
//	zone          zone SOA                              IN
//	prerequisite  each record of the RRset as read      IN     2.4.2
//	              or, where there was none, type ANY    ANY    2.4.3 (class NONE)
//	update        record that goes                      NONE   2.5.4
//	              record that comes, or has a new TTL   IN     2.5.1
//	additional    TSIG, fudge 300 s
//
// So what changed in between is never overwritten, and records of the RRset that
// are not the VM's stay. An update without anything to change is sent all the
// same: only the server that takes updates knows that there is nothing, a
// secondary may be behind.
//
// # Answers
//
// A query that has no answer by UDP within the time limit, or a truncated or
// malformed one, is asked again by TCP. An answer counts when it has the ID, the
// opcode and the question of the query and is authoritative, and that of a
// signed message only with a valid signature; a refusal is believed without.
// Names are compared without regard to case. RRsets above 256 records and zones
// with more than 32 name servers are refused.
package names
