package tunnel

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// Transport is what a carrier runs over.
type Transport uint8

const (
	Auto Transport = iota // both, whichever serves better
	QUIC                  // QUIC over UDP
	TCP                   // TLS 1.3 over TCP
)

var transportNames = []string{Auto: "auto", QUIC: "quic", TCP: "tcp"}

// String returns "auto", "quic" or "tcp".
func (t Transport) String() string {
	if int(t) < len(transportNames) {
		return transportNames[t]
	}
	return fmt.Sprintf("transport %d", uint8(t))
}

// ParseTransport is the reverse of String.
func ParseTransport(s string) (Transport, error) {
	for t, name := range transportNames {
		if s == name {
			return Transport(t), nil
		}
	}
	return Auto, fmt.Errorf("unknown transport %q: expected auto, quic or tcp", s)
}

// network is what carries the transport, as firewalls know it.
func (t Transport) network() string {
	if t == TCP {
		return "TCP"
	}
	return "UDP"
}

// conn is a connection to a peer whose identity was verified, behind the
// greetings: ordered, reliable bytes both ways. One goroutine may read while
// another one writes.
type conn interface {
	io.Reader
	// Write returns when the bytes are on their way, or in a queue of 64 KiB.
	io.Writer
	// close ends the connection at once, also for a Read or Write that waits. Of
	// what was written before, TCP still delivers what it can within a second,
	// and QUIC nothing.
	close(code closeCode, reason string)
	// explain turns what Read or Write returned into this package's errors.
	explain(err error) error
	stats() connStats
	transport() Transport
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
}

// connStats counts what a connection has carried, also when it is over.
type connStats struct {
	sent, received uint64 // bytes on the wire, with headers of IP, UDP or TCP, and what was sent again
	packetsLost    uint64
	rtt            time.Duration // smoothed
	latestRTT      time.Duration // TCP does not tell it apart from the smoothed
	minRTT         time.Duration
}

const (
	// KeepAlive is how often an idle connection shows that it lives.
	KeepAlive = 5 * time.Second
	// IdleTimeout is how long a connection outlives the last packet of its peer.
	IdleTimeout = 30 * time.Second

	// handshakeSilence ends a handshake that gets no answer, and
	// handshakeTimeout one that is not completed.
	handshakeSilence = 5 * time.Second
	handshakeTimeout = 2 * handshakeSilence
	headerTimeout    = 10 * time.Second
)

const (
	headerIPv4 = 20
	headerIPv6 = 40
	headerUDP  = 8
	headerTCP  = 20
	// Timestamps take 12 bytes of each TCP segment, where both hosts use them.
	headerTimestamps = 12
)

// headerIP returns the size of the IP header on the way to addr.
func headerIP(addr net.Addr) uint64 {
	if a, err := netip.ParseAddrPort(addr.String()); err == nil && a.Addr().Unmap().Is4() {
		return headerIPv4
	}
	return headerIPv6
}
