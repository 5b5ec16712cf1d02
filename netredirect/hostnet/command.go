package hostnet

import (
	"fmt"
	"net/netip"
	"strings"
)

// words joins the ones that are not empty.
func words(list ...string) string {
	return strings.Join(strings.Fields(strings.Join(list, " ")), " ")
}

// when returns the formatted text if the condition holds.
func when(condition bool, format string, args ...any) string {
	if !condition {
		return ""
	}
	return fmt.Sprintf(format, args...)
}

// ip begins a command for the family of an address.
func ip(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip -6"
}

func (d *Device) command() string {
	mtu := when(d.MTU != 0, "mtu %d", d.MTU)
	ends := fmt.Sprintf("local %s remote %s", d.Local, d.Remote)
	ttl := "inherit"
	if d.TTL != 0 {
		ttl = fmt.Sprint(d.TTL)
	}
	var add string
	switch d.Kind {
	case KindTUN:
		return fmt.Sprintf("ip tuntap add dev %s mode tun  # carried by the agent", d.Name)
	case KindIPIP:
		add = words("ip link add name", d.Name, mtu, "type ipip mode ipip", ends, "ttl", ttl, "pmtudisc")
	case KindSit:
		add = words("ip link add name", d.Name, mtu, "type sit mode any", ends, "ttl", ttl, "pmtudisc")
	case KindIP6Tnl:
		add = words("ip link add name", d.Name, mtu, "type ip6tnl mode any", ends, "hoplimit", ttl, "encaplimit none")
	case KindVLAN:
		add = words("ip link add link", d.Parent, "name", d.Name, mtu, "type vlan id", fmt.Sprint(d.VLAN))
	}
	set := fmt.Sprintf("ip link set dev %s alias %s", d.Name, alias)
	if d.tunnel() { // before it is up, which is when a device makes itself an address
		set += " addrgenmode none\nip link set dev " + d.Name
	}
	return add + "\n" + set + " up"
}

func (d *Device) undo() string {
	if d.Kind == KindTUN {
		return fmt.Sprintf("ip tuntap del dev %s mode tun  # goes with the agent that carries it", d.Name)
	}
	return "ip link del dev " + d.Name
}

func (c *Sysctl) command() string { return fmt.Sprintf("sysctl -w %s=%s", c.Key, c.Value) }
func (c *Sysctl) undo() string    { return fmt.Sprintf("sysctl -w %s=%s", c.Key, c.Was) }

func (a *Address) command() string {
	v6 := a.Prefix.Addr().Is6()
	return words(ip(a.Prefix.Addr()), "addr add", a.Prefix.String(), "dev", a.Dev,
		fmt.Sprintf("metric %d noprefixroute", Protocol), when(v6, "nodad preferred_lft 0"))
}

func (a *Address) undo() string {
	return words(ip(a.Prefix.Addr()), "addr del", a.Prefix.String(), "dev", a.Dev)
}

// family returns an address of the family that the rule is for.
func (r *Rule) family() netip.Addr {
	if r.From.IsValid() {
		return r.From.Addr()
	}
	return r.To.Addr()
}

func (r *Rule) typed(verb string) string {
	from := "from all"
	if r.From.Bits() > 0 {
		from = "from " + r.From.String()
	}
	return words(ip(r.family()), "rule", verb, "pref", fmt.Sprint(r.Priority), from,
		when(r.To.Bits() > 0, "to %s", r.To),
		when(r.IIf != "", "iif %s", r.IIf),
		when(r.Mask != 0, "fwmark %#x/%#x", r.Mark, r.Mask),
		fmt.Sprintf("lookup %d protocol %d", r.Table, Protocol))
}

func (r *Rule) command() string { return r.typed("add") }
func (r *Rule) undo() string    { return r.typed("del") }

func (r *Route) typed(verb string) string {
	dst := r.Dst.String()
	if r.Dst.Bits() == 0 {
		dst = "default"
	}
	return words(ip(r.Dst.Addr()), "route", verb, dst,
		when(r.Via.IsValid(), "via %s", r.Via),
		"dev", r.Dev,
		when(!r.Via.IsValid() && r.Dst.Addr().Is4(), "scope link"),
		when(r.Source.IsValid(), "src %s", r.Source),
		when(r.MTU != 0, "mtu %d", r.MTU),
		fmt.Sprintf("table %d proto %d", r.Table, Protocol))
}

func (r *Route) command() string { return r.typed("add") }
func (r *Route) undo() string    { return r.typed("del") }

func (n *Neighbour) command() string {
	if n.Proxy {
		return fmt.Sprintf("%s neigh add proxy %s dev %s proto %d", ip(n.IP), n.IP, n.Dev, Protocol)
	}
	return fmt.Sprintf("%s neigh replace %s lladdr %s dev %s nud permanent proto %d",
		ip(n.IP), n.IP, parseMAC(n.MAC), n.Dev, Protocol)
}

func (n *Neighbour) undo() string {
	return words(ip(n.IP), "neigh del", when(n.Proxy, "proxy"), n.IP.String(), "dev", n.Dev)
}

func (f *FDB) command() string {
	return words("bridge fdb replace", parseMAC(f.MAC).String(), "dev", f.Dev,
		when(f.VLAN != 0, "vlan %d", f.VLAN), "master static sticky")
}

func (f *FDB) undo() string {
	return words("bridge fdb del", parseMAC(f.MAC).String(), "dev", f.Dev,
		when(f.VLAN != 0, "vlan %d", f.VLAN), "master")
}

// heredoc ends a table in the shell.
const heredoc = "EOF"

func (t *Table) command() string {
	return fmt.Sprintf("nft -f - <<'%s'\n%s%[1]s", heredoc, t.text())
}

func (t *Table) undo() string { return fmt.Sprintf("nft delete table %s %s", t.Family, t.Name) }

// text is the table in the language of nft(8).
func (t *Table) text() string {
	return fmt.Sprintf("table %s %s {\n%s\n}\n", t.Family, t.Name, strings.Trim(t.Body, "\n"))
}
