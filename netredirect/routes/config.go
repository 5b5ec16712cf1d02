package routes

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

const (
	defaultPort        = bgp.BGP_PORT
	defaultMaxPrefixes = 10000

	// The kernel's limit of a TCP MD5 key, TCP_MD5SIG_MAXKEYLEN.
	maxPassword = 80

	// Communities and the rest of an UPDATE fit its 4096 bytes (RFC 4271, 4.1).
	maxCommunities = 100
)

// Config says who speaks BGP with whom, and what a route looks like.
type Config struct {
	ASN      uint32
	RouterID netip.Addr // IPv4, unique in the AS
	Peers    []Peer

	// NextHop4 and NextHop6 are where the network sends the VMs' packets. Where
	// one is not set, the session's own address is the next hop, and routes of
	// that family go only to peers with an address of it.
	NextHop4, NextHop6 netip.Addr

	// Communities are sent with each route: "65020:100" (RFC 1997), or large
	// ones "65020:1:2" (RFC 8092).
	Communities []string

	// LocalPref is sent to iBGP peers; 0 is the usual 100.
	LocalPref uint32
}

// Peer is a router, or a route server.
type Peer struct {
	Address netip.Addr
	ASN     uint32
	Local   netip.Addr // the own address of the session; if not set the kernel chooses
	Port    uint16     // 0 is 179

	// Multihop is the TTL of packets to an eBGP peer that is not directly
	// connected; 0: it is.
	Multihop uint8

	// PasswordFile holds the key of TCP's MD5 signatures (RFC 2385), at most 80
	// bytes, in its only line.
	PasswordFile string

	// MaxPrefixes is how many prefixes of each family the peer may send before
	// its session is closed; 0 is 10000.
	MaxPrefixes uint32

	// Watch is set for a peer that is only listened to: nothing is announced
	// to it.
	Watch bool
}

// Validate returns an error for each setting that cannot work.
func (c Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !validASN(c.ASN) {
		wrong("asn %d: want the number of this site's autonomous system", c.ASN)
	}
	if !c.RouterID.Is4() || c.RouterID.IsUnspecified() {
		wrong("router id %s: want an IPv4 address of this host", show(c.RouterID))
	}
	if c.NextHop4.IsValid() && !(c.NextHop4.Is4() && usable(c.NextHop4)) {
		wrong("next hop %s: want an IPv4 address that the peers can reach", c.NextHop4)
	}
	if c.NextHop6.IsValid() && !(c.NextHop6.Is6() && usable(c.NextHop6)) {
		wrong("next hop %s: want an IPv6 address that the peers can reach", c.NextHop6)
	}
	if _, _, err := parseCommunities(c.Communities); err != nil {
		errs = append(errs, err)
	}
	if len(c.Peers) == 0 {
		wrong("no BGP peers: name at least one router")
	}
	seen := map[netip.Addr]bool{}
	for _, p := range c.Peers {
		if err := p.validate(c.ASN); err != nil {
			wrong("peer %s: %w", show(p.Address), err)
		}
		if seen[p.Address] {
			wrong("peer %s: named twice", p.Address)
		}
		seen[p.Address] = true
	}
	return errors.Join(errs...)
}

func (p Peer) validate(own uint32) error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !usable(p.Address) {
		wrong("want the address of a router, not link-local and without a zone")
	}
	if !validASN(p.ASN) {
		wrong("asn %d: want the number of the peer's autonomous system", p.ASN)
	}
	if p.Local.IsValid() && (!usable(p.Local) || p.Local.Is4() != p.Address.Is4()) {
		wrong("local address %s: want an address of this host, of the peer's family", p.Local)
	}
	if p.Multihop != 0 && p.ASN == own {
		wrong("multihop is for eBGP: peers of the own AS need not be directly connected")
	}
	return errors.Join(errs...)
}

// validASN excludes 0 (RFC 7607), AS_TRANS (RFC 6793) and the last ones (RFC 7300).
func validASN(asn uint32) bool {
	return asn != 0 && asn != bgp.AS_TRANS && asn != 1<<16-1 && asn != 1<<32-1
}

// usable says whether an address can be a host's.
func usable(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() &&
		!a.IsLinkLocalUnicast() && !a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func show(a netip.Addr) string {
	if !a.IsValid() {
		return "not set"
	}
	return a.String()
}

// nextHop is the next hop of routes of a family, unspecified if it is the
// session's own address.
func (c Config) nextHop(f bgp.Family) netip.Addr {
	hop, session := c.NextHop4, netip.IPv4Unspecified()
	if f == bgp.RF_IPv6_UC {
		hop, session = c.NextHop6, netip.IPv6Unspecified()
	}
	if hop.IsValid() {
		return hop
	}
	return session
}

// carries says whether routes of a family are announced to the peer.
func (c Config) carries(p Peer, f bgp.Family) bool {
	return !p.Watch && (familyOf(p.Address) == f || !c.nextHop(f).IsUnspecified())
}

func (p Peer) port() uint16 {
	if p.Port == 0 {
		return defaultPort
	}
	return p.Port
}

func (p Peer) maxPrefixes() uint32 {
	if p.MaxPrefixes == 0 {
		return defaultMaxPrefixes
	}
	return p.MaxPrefixes
}

// password reads PasswordFile.
func (p Peer) password() (string, error) {
	if p.PasswordFile == "" {
		return "", nil
	}
	data, err := os.ReadFile(p.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("read password of BGP peer %s: %w", p.Address, err)
	}
	password := strings.TrimRight(string(data), "\r\n")
	if len(password) == 0 || len(password) > maxPassword || strings.ContainsAny(password, "\r\n\x00") {
		return "", fmt.Errorf("password of BGP peer %s in %s: want one line of 1 to %d bytes", p.Address, p.PasswordFile, maxPassword)
	}
	return password, nil
}

// parseCommunities sorts the communities of a configuration by kind, each once.
func parseCommunities(texts []string) (standard []uint32, large []*bgp.LargeCommunity, err error) {
	if len(texts) > maxCommunities {
		return nil, nil, fmt.Errorf("%d communities: want at most %d", len(texts), maxCommunities)
	}
	for i, text := range texts {
		if slices.Contains(texts[:i], text) {
			continue
		}
		parts := strings.Split(text, ":")
		bits := 32
		if len(parts) == 2 {
			bits = 16
		}
		n := make([]uint32, 0, 3)
		for _, part := range parts {
			v, err := strconv.ParseUint(part, 10, bits)
			if err != nil || len(parts) > 3 || len(parts) < 2 {
				return nil, nil, fmt.Errorf("community %q: want two numbers up to 65535 as 65020:100, or three up to 4294967295 as 65020:1:2", text)
			}
			n = append(n, uint32(v))
		}
		if len(n) == 2 {
			standard = append(standard, n[0]<<16|n[1])
		} else {
			large = append(large, bgp.NewLargeCommunity(n[0], n[1], n[2]))
		}
	}
	return standard, large, nil
}

func communityText(c uint32) string { return fmt.Sprintf("%d:%d", c>>16, c&0xffff) }

func largeCommunityText(c *bgp.LargeCommunity) string {
	return fmt.Sprintf("%d:%d:%d", c.ASN, c.LocalData1, c.LocalData2)
}

func familyOf(a netip.Addr) bgp.Family {
	if a.Is4() {
		return bgp.RF_IPv4_UC
	}
	return bgp.RF_IPv6_UC
}

func familyName(f bgp.Family) string {
	if f == bgp.RF_IPv4_UC {
		return "IPv4"
	}
	return "IPv6"
}
