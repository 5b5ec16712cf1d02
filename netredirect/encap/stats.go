package encap

import (
	"sync/atomic"
	"time"
)

// Stats is what a tunnel has carried and dropped since it was opened.
type Stats struct {
	Received Traffic // from the peer, handed to the kernel
	Sent     Traffic // to the peer
	Drops    Drops
}

// Traffic counts inner packets, as the kernel hands them over: it may have merged several segments of TCP into one.
type Traffic struct {
	Packets uint64
	Bytes   uint64    // without outer headers
	Last    time.Time // of the last packet; zero before the first
}

// Drops counts packets dropped, by reason.
type Drops struct {
	Spoofed   uint64 // the outer source is the peer of no tunnel of this process
	Malformed uint64 // lengths, versions or checksums of headers are wrong
	Nested    uint64 // the inner packet is a tunnel itself
	Foreign   uint64 // the gate knows neither address
	TooBig    uint64 // for the path to the peer, or for a datagram
	Unsent    uint64 // no connection, no route, refused by a firewall, or the device was down
	Congested uint64 // marked as congested on the way, and its transport knows no ECN (RFC 6040, 4.2)
}

// verdict is what becomes of a packet: it passes, or the reason of its drop.
type verdict int

const (
	passes verdict = iota
	spoofed
	malformed
	nested
	foreign
	tooBig
	unsent
	congested
	chatter // the kernel's own multicast on a device, such as MLD; no news to anyone
	verdicts
)

type counters struct {
	received, sent traffic
	drops          [verdicts]atomic.Uint64
}

type traffic struct {
	packets, bytes atomic.Uint64
	last           atomic.Int64 // nanoseconds of Unix time
}

func (t *traffic) add(packets, bytes int) {
	t.packets.Add(uint64(packets))
	t.bytes.Add(uint64(bytes))
	t.last.Store(time.Now().UnixNano())
}

func (t *traffic) read() Traffic {
	r := Traffic{Packets: t.packets.Load(), Bytes: t.bytes.Load()}
	if ns := t.last.Load(); ns != 0 {
		r.Last = time.Unix(0, ns)
	}
	return r
}

func (c *counters) drop(v verdict) { c.drops[v].Add(1) }

func (c *counters) read() Stats {
	d := func(v verdict) uint64 { return c.drops[v].Load() }
	return Stats{
		Received: c.received.read(),
		Sent:     c.sent.read(),
		Drops: Drops{
			Spoofed: d(spoofed), Malformed: d(malformed), Nested: d(nested), Foreign: d(foreign),
			TooBig: d(tooBig), Unsent: d(unsent), Congested: d(congested),
		},
	}
}
