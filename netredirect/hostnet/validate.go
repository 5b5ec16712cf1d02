package hostnet

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
)

// Routing tables that the kernel keeps itself, and the rule that precedes all.
const (
	tableLocal  = 255
	maxTable    = 1<<31 - 1
	maxPriority = 32765 // 32766 and 32767 look up main and default
)

// maxBody bounds the text of an nftables table, in bytes.
const maxBody = 64 << 10

var (
	deviceName  = regexp.MustCompile(`^[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}$`)
	tableName   = regexp.MustCompile(`^` + tablePrefix + `[A-Za-z0-9_]{1,24}$`)
	sysctlName  = regexp.MustCompile(`^[a-z0-9_]{1,40}$`)
	sysctlValue = regexp.MustCompile(`^-?[0-9]{1,10}$`)
	macAddress  = regexp.MustCompile(`^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$`)
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
}

func checkDevice(name string) error {
	switch name {
	case ".", "..", "all", "default":
		return invalid("%q is no name of a device", name)
	}
	if !deviceName.MatchString(name) {
		return invalid("%q is no name of a device", name)
	}
	return nil
}

// checkHost accepts an address that one host can have.
func checkHost(what string, a netip.Addr) error {
	if !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() {
		return invalid("%s %v is no address of a host", what, a)
	}
	return nil
}

func checkPrefix(what string, p netip.Prefix) error {
	if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
		return invalid("%s %v is no prefix", what, p)
	}
	return nil
}

func checkMAC(mac string) error {
	if !macAddress.MatchString(mac) {
		return invalid("%q is no MAC address", mac)
	}
	hw := parseMAC(mac)
	if hw[0]&1 != 0 || hw.String() == "00:00:00:00:00:00" {
		return invalid("%q is no MAC address of a host", mac)
	}
	return nil
}

// parseMAC reads an address that checkMAC has accepted.
func parseMAC(mac string) net.HardwareAddr {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		panic(err) // the pattern is narrower than ParseMAC
	}
	return hw
}

func checkMTU(mtu, least int) error {
	if mtu != 0 && (mtu < least || mtu > 65535) {
		return invalid("MTU %d is not within %d and 65535", mtu, least)
	}
	return nil
}

func (d *Device) validate() error {
	if err := checkDevice(d.Name); err != nil {
		return err
	}
	if err := checkMTU(d.MTU, 576); err != nil {
		return err
	}
	if d.TTL < 0 || d.TTL > 255 {
		return invalid("TTL %d is not within 0 and 255", d.TTL)
	}
	switch d.Kind {
	case KindIPIP, KindSit, KindIP6Tnl:
		return d.validateTunnel()
	case KindVLAN:
		if err := checkDevice(d.Parent); err != nil {
			return err
		}
		if d.VLAN < 1 || d.VLAN > 4094 {
			return invalid("VLAN %d is not within 1 and 4094", d.VLAN)
		}
	case KindTUN:
		if d.Parent != "" || d.VLAN != 0 {
			return invalid("a TUN has neither parent nor VLAN")
		}
	default:
		return invalid("%q is no kind of device", d.Kind)
	}
	if d.Local.IsValid() || d.Remote.IsValid() || d.TTL != 0 {
		return invalid("a device of kind %s has neither ends nor TTL", d.Kind)
	}
	return nil
}

func (d *Device) validateTunnel() error {
	if err := checkHost("local end", d.Local); err != nil {
		return err
	}
	if err := checkHost("remote end", d.Remote); err != nil {
		return err
	}
	v4 := d.Kind != KindIP6Tnl
	if d.Local.Is4() != v4 || d.Remote.Is4() != v4 || d.Local == d.Remote {
		return invalid("%v and %v are no ends of a tunnel of kind %s", d.Local, d.Remote, d.Kind)
	}
	if d.Parent != "" || d.VLAN != 0 {
		return invalid("a tunnel has neither parent nor VLAN")
	}
	return nil
}

// validate keeps to net/FAMILY/conf|neigh/DEVICE/NAME, which has no room for a
// path elsewhere.
func (c *Sysctl) validate() error {
	if err := checkSysctlKey(c.Key); err != nil {
		return err
	}
	if !sysctlValue.MatchString(c.Value) || !sysctlValue.MatchString(c.Was) {
		return invalid("values %q and %q of %s are not both numbers", c.Value, c.Was, c.Key)
	}
	return nil
}

func checkSysctlKey(key string) error {
	parts := strings.Split(key, "/")
	if len(parts) != 5 || parts[0] != "net" || parts[1] != "ipv4" && parts[1] != "ipv6" ||
		parts[2] != "conf" && parts[2] != "neigh" || !sysctlName.MatchString(parts[4]) {
		return invalid("%q is no key below net/ipv4 or net/ipv6, conf or neigh", key)
	}
	if parts[3] == "all" || parts[3] == "default" {
		return nil
	}
	return checkDevice(parts[3])
}

func (a *Address) validate() error {
	if err := checkDevice(a.Dev); err != nil {
		return err
	}
	if !a.Prefix.IsSingleIP() {
		return invalid("address %v is not of full length (/32 or /128)", a.Prefix)
	}
	return checkHost("address", a.Prefix.Addr())
}

func (r *Rule) validate() error {
	if r.Priority < 1 || r.Priority > maxPriority {
		return invalid("priority %d of a rule is not within 1 and %d", r.Priority, maxPriority)
	}
	if r.Table < 1 || r.Table > maxTable {
		return invalid("routing table %d is not within 1 and %d", r.Table, maxTable)
	}
	if !r.From.IsValid() && !r.To.IsValid() {
		return invalid("a rule with neither source nor destination has no family")
	}
	for _, p := range []netip.Prefix{r.From, r.To} {
		if p == (netip.Prefix{}) {
			continue
		}
		if err := checkPrefix("selector", p); err != nil {
			return err
		}
	}
	if r.From.IsValid() && r.To.IsValid() && r.From.Addr().Is4() != r.To.Addr().Is4() {
		return invalid("source %v and destination %v of a rule differ in family", r.From, r.To)
	}
	if r.Mark&^r.Mask != 0 {
		return invalid("mark %#x of a rule has bits outside of its mask %#x", r.Mark, r.Mask)
	}
	if r.IIf != "" {
		return checkDevice(r.IIf)
	}
	return nil
}

func (r *Route) validate() error {
	if r.Table < 1 || r.Table > maxTable || r.Table == tableLocal {
		return invalid("routing table %d is not within 1 and %d or is that of local addresses", r.Table, maxTable)
	}
	if err := checkDevice(r.Dev); err != nil {
		return err
	}
	if err := checkPrefix("destination", r.Dst); err != nil {
		return err
	}
	for _, a := range []struct {
		what string
		addr netip.Addr
	}{{"gateway", r.Via}, {"source", r.Source}} {
		if a.addr == (netip.Addr{}) {
			continue
		}
		if err := checkHost(a.what, a.addr); err != nil {
			return err
		}
		if a.addr.Is4() != r.Dst.Addr().Is4() {
			return invalid("%s %v and destination %v of a route differ in family", a.what, a.addr, r.Dst)
		}
	}
	return checkMTU(r.MTU, 68)
}

func (n *Neighbour) validate() error {
	if err := checkDevice(n.Dev); err != nil {
		return err
	}
	if err := checkHost("neighbour", n.IP); err != nil {
		return err
	}
	if !n.Proxy {
		return checkMAC(n.MAC)
	}
	if n.MAC != "" {
		return invalid("an address that is answered for has no MAC address")
	}
	return nil
}

func (f *FDB) validate() error {
	if err := checkDevice(f.Dev); err != nil {
		return err
	}
	if f.VLAN < 0 || f.VLAN > 4094 {
		return invalid("VLAN %d is not within 0 and 4094", f.VLAN)
	}
	return checkMAC(f.MAC)
}

func (t *Table) validate() error {
	switch t.Family {
	case "ip", "ip6", "inet", "bridge", "netdev":
	default:
		return invalid("%q is no family of nftables", t.Family)
	}
	if !tableName.MatchString(t.Name) {
		return invalid("%q is no name of a table of wanmig", t.Name)
	}
	return checkBody(t.Body)
}

// checkBody makes sure that the text of a table can neither leave the table nor
// read another file, by a narrower grammar than that of nft: printable ASCII,
// braces that balance and never close the table, strings of plain characters on
// one line, no comments, continued lines or variables.
func checkBody(body string) error {
	if len(body) > maxBody {
		return invalid("table of %d bytes, more than %d", len(body), maxBody)
	}
	if strings.Contains("\n"+body+"\n", "\n"+heredoc+"\n") {
		return invalid("a table with the line %s, which ends the command that is shown", heredoc)
	}
	depth, word := 0, 0 // word: where the current one begins
	quoted := false
	for i := 0; i <= len(body); i++ {
		c := byte('\n')
		if i < len(body) {
			c = body[i]
		}
		if !quoted && !isWord(c) {
			switch body[word:i] {
			case "include", "define", "redefine", "undefine":
				return invalid("%q in a table", body[word:i])
			}
			word = i + 1
		}
		switch {
		case c == '"':
			quoted = !quoted
			word = i + 1
		case quoted && !isWord(c) && !strings.ContainsRune(" .:/@+-*", rune(c)):
			return invalid("%q in a string of a table", c)
		case c == '{':
			depth++
		case c == '}':
			depth--
		case c == '#' || c == '\\' || c == '$' || c == '`' || c == '\'' || (c < ' ' && c != '\n' && c != '\t') || c > '~':
			return invalid("%q in a table", c)
		}
		if depth < 0 {
			return invalid("a brace too many closes the table")
		}
	}
	if depth != 0 {
		return invalid("%d braces of a table are not closed", depth)
	}
	return nil
}

func isWord(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_'
}
