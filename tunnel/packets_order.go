package tunnel

import (
	"encoding/binary"
	"time"
)

const (
	sequenceSize = 4 // bytes in front of a packet

	// A packet that is missing is waited for until each carrier has brought a
	// later one, but no longer than this. A carrier that congestion control holds
	// back for longer brings its packets late.
	maxWait = 30 * time.Millisecond
	// window is how many packets, the missing ones included, wait at most.
	window = 1024
)

// sequencer puts packets of several carriers into the order in which they were
// sent. It has no clock and no goroutine.
type sequencer struct {
	next   uint32         // the number that is awaited
	ring   [window]waiter // by number; next has none
	count  int            // of waiters
	latest []latest       // of each carrier
}

// waiter is a packet that waits for earlier ones.
type waiter struct {
	packet []byte // nil for none
	at     time.Time
}

// latest is the last number that a carrier has brought.
type latest struct {
	number uint32
	any    bool
}

func newSequencer(carriers int) *sequencer { return &sequencer{latest: make([]latest, carriers)} }

// appendSequence writes the number of a packet.
func appendSequence(b []byte, number uint32) []byte { return binary.BigEndian.AppendUint32(b, number) }

// ahead is how far a is ahead of b; numbers wrap (RFC 1982).
func ahead(a, b uint32) int32 { return int32(a - b) }

// take adds what a carrier brought, and appends to out the packets that can go on.
func (s *sequencer) take(out [][]byte, carrier int, datagram []byte, now time.Time) [][]byte {
	if len(datagram) <= sequenceSize {
		return out
	}
	number, packet := binary.BigEndian.Uint32(datagram), datagram[sequenceSize:]
	s.latest[carrier] = latest{number, true}
	for s.count > 0 && ahead(number, s.next) >= window {
		out = s.skip(out)
	}
	switch distance := ahead(number, s.next); {
	case distance < 0: // no longer awaited, and good all the same
		return append(out, packet)
	case distance == 0 || distance >= window:
		out = append(out, packet)
		s.next = number + 1
		out = s.follow(out)
	case s.ring[number%window].packet == nil:
		s.ring[number%window] = waiter{packet, now}
		s.count++
	}
	for s.count > 0 && s.lost() {
		out = s.skip(out)
	}
	return out
}

// lost says whether every carrier has brought a later packet than the awaited one,
// and so none can bring that one any more.
func (s *sequencer) lost() bool {
	for _, l := range s.latest {
		if !l.any || ahead(l.number, s.next) <= 0 {
			return false
		}
	}
	return true
}

// follow appends the packets that no longer wait.
func (s *sequencer) follow(out [][]byte) [][]byte {
	for {
		w := &s.ring[s.next%window]
		if w.packet == nil {
			return out
		}
		out = append(out, w.packet)
		*w = waiter{}
		s.count--
		s.next++
	}
}

// skip gives up what is missing before the first waiter; there must be one.
func (s *sequencer) skip(out [][]byte) [][]byte {
	s.next = s.first()
	return s.follow(out)
}

// first returns the number of the first waiter; there must be one.
func (s *sequencer) first() uint32 {
	number := s.next
	for s.ring[number%window].packet == nil {
		number++
	}
	return number
}

// deadline says until when the awaited packet is waited for; it is zero when no
// other waits.
func (s *sequencer) deadline() time.Time {
	if s.count == 0 {
		return time.Time{}
	}
	return s.ring[s.first()%window].at.Add(maxWait)
}

// expire appends to out what has waited for too long.
func (s *sequencer) expire(out [][]byte, now time.Time) [][]byte {
	for s.count > 0 && !now.Before(s.deadline()) {
		out = s.skip(out)
	}
	return out
}
