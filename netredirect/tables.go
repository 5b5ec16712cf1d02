package netredirect

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"github.com/wanmig/wanmig/netredirect/hostnet"
)

// The counters of a redirect's table, in packets and bytes of the VM, and those
// of what a tunnel's table keeps out.
const (
	counterIn      = "from_tunnel"
	counterOut     = "into_tunnel"
	counterNested  = "nested"
	counterForeign = "foreign"
	counterLocal   = "for_this_host"
)

// tunnelTable drops what comes out of a tunnel and no redirect has marked.
func tunnelTable(device string) *hostnet.Table {
	return &hostnet.Table{Family: "inet", Name: "wanmig_" + device, Body: fmt.Sprintf(`
	counter %[2]s {}
	counter %[3]s {}
	counter %[4]s {}
	chain nested {
		type filter hook prerouting priority raw; policy accept;
		iifname "%[1]s" ip daddr { 192.0.0.1, 192.0.0.2 } drop
		iifname "%[1]s" ip6 daddr { 100::1, 100::2 } drop
		iifname "%[1]s" meta l4proto { 4, 41 } counter name %[2]s drop
	}
	chain foreign {
		type filter hook forward priority filter + 10; policy accept;
		iifname "%[1]s" meta mark & %[5]s == 0 counter name %[3]s drop
	}
	chain local {
		type filter hook input priority filter + 10; policy accept;
		iifname "%[1]s" counter name %[4]s drop
	}
`, device, counterNested, counterForeign, counterLocal, hex32(markOurs))}
}

// sourceTable lets the VM's answers out of the tunnel and counts both ways. A VM
// that came here by another tunnel, and has moved on, answers through that one
// what came by it: its destinationTable decides, whichever table comes first.
func sourceTable(slot int, device string, addrs []netip.Addr) *hostnet.Table {
	var b body
	b.counters(counterIn, counterOut)
	b.chain("marks", "filter hook prerouting priority mangle")
	for _, set := range sets(addrs) {
		b.rule(`iifname "%s" %s saddr %s counter name %s meta mark & %s == 0 meta mark set %s`, device, set.ip, set.list, counterIn, hex32(markOurs), setMark("meta", slot))
	}
	b.end()
	b.clamp(device, "daddr", addrs)
	return b.table("inet", fmt.Sprintf("wanmig_r%d", slot))
}

// destinationTable marks each connection by the way that its packets come, so
// that answers take the same way: the tunnel, or directly. Where several tunnels
// stand for a VM, each takes connections of the VM's own only while no other has.
func destinationTable(d destinationNeeds) *hostnet.Table {
	var b body
	b.counters(counterIn, counterOut)
	b.chain("marks", "filter hook prerouting priority mangle")
	addrs := addressesOf(d.nics)
	ct := setMark("ct", d.slot)
	ours := fmt.Sprintf("& %s == %s", hex32(markMask), hex32(markOf(d.slot)))
	nobodys := fmt.Sprintf("ct mark & %s == 0", hex32(markOurs))
	for _, set := range sets(addrs) {
		b.rule(`iifname "%s" %s daddr %s ct mark set %s meta mark set %s counter name %s`, d.device, set.ip, set.list, ct, setMark("meta", d.slot), counterIn)
		b.rule(`iifname != "%s" %s daddr %s ct mark %s ct mark set ct mark & %s`, d.device, set.ip, set.list, ours, hex32(^uint32(markMask)))
		switch d.egress {
		case EgressDirect: // what begins in the middle is older than the move
			b.rule(`iifname != "%s" %s saddr %s ct state new tcp flags & (fin | syn | rst | ack) != syn %s ct mark set %s`, d.device, set.ip, set.list, nobodys, ct)
		default:
			b.rule(`iifname != "%s" %s saddr %s ct state new %s ct mark set %s`, d.device, set.ip, set.list, nobodys, ct)
		}
		b.rule(`iifname != "%s" %s saddr %s ct mark %s meta mark set %s`, d.device, set.ip, set.list, ours, setMark("meta", d.slot))
	}
	b.end()
	b.clamp(d.device, "saddr", addrs)
	return b.table("inet", fmt.Sprintf("wanmig_r%d", d.slot))
}

// turnTable gives frames for the VM to the source host itself, which routes them.
func turnTable(slot int, nics []hostNIC) *hostnet.Table {
	var b body
	b.chain("turn", "filter hook prerouting priority -300")
	for _, n := range nics {
		b.rule(`ether daddr %s ether daddr set %s meta pkttype set host`, n.MAC, n.bridgeMAC)
	}
	b.end()
	return b.table("bridge", fmt.Sprintf("wanmig_r%d", slot))
}

// guestTable makes the destination host the VM's only neighbour: it takes what
// the VM sends to its gateway and to its old network, and keeps from the VM what
// would renumber it (router advertisements, DHCP).
func guestTable(slot int, nics []hostNIC) *hostnet.Table {
	var b body
	b.chain("turn", "filter hook prerouting priority -300")
	for _, n := range nics {
		b.rule(`iifname "%s" ether type arp drop`, n.Tap)
		b.rule(`iifname "%s" icmpv6 type nd-neighbor-advert accept`, n.Tap)
		b.rule(`iifname "%s" icmpv6 type { nd-router-solicit, nd-neighbor-solicit } drop`, n.Tap)
		b.rule(`iifname "%s" meta pkttype { broadcast, multicast } drop`, n.Tap)
		b.rule(`iifname "%s" ether type { ip, ip6 } ether daddr set %s meta pkttype set host`, n.Tap, n.bridgeMAC)
	}
	b.end()
	b.chain("shield", "filter hook postrouting priority 0")
	for _, n := range nics {
		b.rule(`oifname "%s" ether type arp drop`, n.Tap)
		b.rule(`oifname "%s" icmpv6 type nd-router-advert drop`, n.Tap)
		b.rule(`oifname "%s" udp sport { 67, 547 } drop`, n.Tap)
	}
	b.end()
	return b.table("bridge", fmt.Sprintf("wanmig_g%d", slot))
}

// returnTable takes what a VM that has come home still sends to where it was
// served before, until it has learned its neighbours again.
func returnTable(slot int, nics []hostNIC) *hostnet.Table {
	var b body
	rules := 0
	b.chain("turn", "filter hook prerouting priority -300")
	for _, n := range nics {
		if n.home && n.Served != "" {
			b.rule(`iifname "%s" ether type { ip, ip6 } ether daddr %s ether daddr set %s meta pkttype set host`, n.Tap, n.Served, n.bridgeMAC)
			rules++
		}
	}
	b.end()
	if rules == 0 {
		return nil
	}
	return b.table("bridge", fmt.Sprintf("wanmig_h%d", slot))
}

// mappingTable maps each new address to the VM's own, both ways.
func mappingTable(d destinationNeeds) *hostnet.Table {
	var b body
	each := func(rule func(a, to netip.Addr, ip string)) {
		for _, a := range addressesOf(d.nics) {
			if to, ok := d.mapped[a]; ok {
				rule(a, to, family(a))
			}
		}
	}
	to := func(a, to netip.Addr, ip string) { b.rule(`%s daddr %s dnat %s to %s`, ip, to, ip, a) }
	b.chain("arriving", "nat hook prerouting priority -100")
	each(to)
	b.end()
	b.chain("from_this_host", "nat hook output priority -100")
	each(to)
	b.end()
	b.chain("leaving", "nat hook postrouting priority 100")
	each(func(a, to netip.Addr, ip string) {
		b.rule(`%s saddr %s oifname != "%s" ct mark & %s == 0 snat %s to %s`, ip, a, d.device, hex32(markOurs), ip, to)
	})
	b.end()
	return b.table("inet", fmt.Sprintf("wanmig_n%d", d.slot))
}

// body writes the inside of a table.
type body struct{ strings.Builder }

func (b *body) counters(names ...string) {
	for _, n := range names {
		fmt.Fprintf(b, "\n\tcounter %s {}", n)
	}
}

func (b *body) chain(name, hook string) {
	fmt.Fprintf(b, "\n\tchain %s {\n\t\ttype %s; policy accept;", name, hook)
}

func (b *body) rule(format string, args ...any) { fmt.Fprintf(b, "\n\t\t"+format, args...) }

func (b *body) end() { b.WriteString("\n\t}") }

// clamp lowers the segment size of TCP connections to what fits the tunnel, and
// counts what goes into it.
func (b *body) clamp(device, direction string, addrs []netip.Addr) {
	b.chain("out", "filter hook forward priority mangle")
	for _, set := range sets(addrs) {
		b.rule(`oifname "%s" %s %s %s counter name %s`, device, set.ip, direction, set.list, counterOut)
	}
	b.rule(`oifname "%s" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu`, device)
	b.end()
}

func (b *body) table(family, name string) *hostnet.Table {
	return &hostnet.Table{Family: family, Name: name, Body: b.String() + "\n"}
}

// set are the addresses of one family as nft writes them.
type set struct{ ip, list string }

func sets(addrs []netip.Addr) []set {
	lists := map[string][]string{}
	for _, a := range addrs {
		lists[family(a)] = append(lists[family(a)], a.String())
	}
	var all []set
	for _, ip := range []string{"ip", "ip6"} {
		if l := lists[ip]; len(l) > 0 {
			all = append(all, set{ip, "{ " + strings.Join(l, ", ") + " }"})
		}
	}
	return all
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}

// setMark is the expression that puts a slot's mark into our bits of a mark.
func setMark(what string, slot int) string {
	return fmt.Sprintf("%s mark & %s | %s", what, hex32(^uint32(markMask)), hex32(markOf(slot)))
}

func hex32(v uint32) string { return fmt.Sprintf("0x%08x", v) }

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// letter tells tunnels of different kinds to the same site apart.
func (k Kind) letter() string {
	switch k {
	case IPIP:
		return "k"
	case IPIPUser:
		return "u"
	}
	return "q"
}
