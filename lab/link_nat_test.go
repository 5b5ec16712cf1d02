package lab

import (
	"bytes"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// datagram is one between a site and its peer, of which NAT reads and writes
// no more than the ports.
func datagram(from, to string) []byte {
	f, t := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	b := make([]byte, 28)
	b[0], b[9] = 0x45, unix.IPPROTO_UDP
	copy(b[12:], f.Addr().AsSlice())
	copy(b[16:], t.Addr().AsSlice())
	b[20], b[21] = byte(f.Port()>>8), byte(f.Port())
	b[22], b[23] = byte(t.Port()>>8), byte(t.Port())
	return b
}

const (
	site, peer = "10.255.0.1", "10.255.0.2"
)

// leaves sends a datagram out and returns the port that its peer sees.
func leaves(n *nat, from, to string) netip.AddrPort {
	b := datagram(from, to)
	n.out(b)
	return readHeaders(b).from
}

// comes sends a datagram in and returns the port that gets it.
func comes(n *nat, from, to string) (netip.AddrPort, bool) {
	b := datagram(from, to)
	pass := n.in(b)
	return readHeaders(b).to, pass
}

func TestNATTranslatesWhatTheSiteBegins(t *testing.T) {
	n := newNAT()
	one := leaves(n, site+":7946", peer+":7946")
	other := leaves(n, site+":7947", peer+":7946")
	elsewhere := leaves(n, site+":7946", "10.255.4.1:7946")
	if one.Port() < natFirst || one.Port() == other.Port() || one.Port() == elsewhere.Port() {
		t.Fatalf("flows leave from %v, %v and %v", one, other, elsewhere)
	}
	if again := leaves(n, site+":7946", peer+":7946"); again != one {
		t.Errorf("a flow leaves from %v and then from %v", one, again)
	}
	if got, pass := comes(n, peer+":7946", other.String()); !pass || got.String() != site+":7947" {
		t.Errorf("an answer comes to %v, %v", got, pass)
	}
	if got, pass := comes(n, peer+":9", other.String()); pass {
		t.Errorf("what another port of the peer sends passes to %v", got)
	}

	n.rebind()
	if got, pass := comes(n, peer+":7946", one.String()); pass {
		t.Errorf("after the rebinding the old port leads to %v", got)
	}
	after := leaves(n, site+":7946", peer+":7946")
	if after == one || after.Port() < natFirst {
		t.Errorf("after the rebinding a flow leaves from %v, before from %v", after, one)
	}
	if got, pass := comes(n, peer+":7946", after.String()); !pass || got.String() != site+":7946" {
		t.Errorf("an answer to the new port comes to %v, %v", got, pass)
	}
}

func TestNATForwardsWhatPeersBegin(t *testing.T) {
	n := newNAT()
	for range 2 {
		if got, pass := comes(n, peer+":5000", site+":7946"); !pass || got.String() != site+":7946" {
			t.Errorf("what a peer begins comes to %v, %v", got, pass)
		}
		if got := leaves(n, site+":7946", peer+":5000"); got.String() != site+":7946" {
			t.Errorf("it is answered from %v", got)
		}
		n.rebind() // is nothing to it
	}
}

func TestNATLeavesTheRestAlone(t *testing.T) {
	n := newNAT()
	for _, s := range samplePackets(t) {
		if s.headers.ports > 0 {
			continue
		}
		b := bytes.Clone(s.bytes)
		n.out(b)
		if pass := n.in(b); !pass || !bytes.Equal(b, s.bytes) {
			t.Errorf("%s: passes %v, changed to %x", s.name, pass, b)
		}
	}
}

// TestNATIsBounded has it see more flows than it knows, each with an answer.
func TestNATIsBounded(t *testing.T) {
	n := newNAT()
	for i := range 3 * natFlows {
		from := netip.AddrPortFrom(netip.MustParseAddr(site), uint16(1024+i)).String()
		seen := leaves(n, from, peer+":7946")
		if got, pass := comes(n, peer+":7946", seen.String()); !pass || got.String() != from {
			t.Fatalf("flow %d from %s is seen as %v and answered to %v, %v", i, from, seen, got, pass)
		}
		comes(n, netip.AddrPortFrom(netip.MustParseAddr(peer), uint16(i)).String(), site+":22")
		if len(n.outside) > natFlows || len(n.inside) > natFlows {
			t.Fatalf("%d flows and %d answers are known", len(n.outside), len(n.inside))
		}
	}
}
