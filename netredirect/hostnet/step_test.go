package hostnet

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix
)

// typed lists a step of each kind with the commands for it.
var typed = []struct {
	step Step
	do   string
	undo string
}{
	{
		Step{Device: &Device{Name: "wm0", Kind: KindIPIP, Local: addr("192.0.2.1"), Remote: addr("198.51.100.1"), MTU: 1480, TTL: 64}},
		"ip link add name wm0 mtu 1480 type ipip mode ipip local 192.0.2.1 remote 198.51.100.1 ttl 64 pmtudisc\nip link set dev wm0 alias wanmig addrgenmode none\nip link set dev wm0 up",
		"ip link del dev wm0",
	},
	{
		Step{Device: &Device{Name: "wm0", Kind: KindSit, Local: addr("192.0.2.1"), Remote: addr("198.51.100.1")}},
		"ip link add name wm0 type sit mode any local 192.0.2.1 remote 198.51.100.1 ttl inherit pmtudisc\nip link set dev wm0 alias wanmig addrgenmode none\nip link set dev wm0 up",
		"ip link del dev wm0",
	},
	{
		Step{Device: &Device{Name: "wm0", Kind: KindIP6Tnl, Local: addr("2001:db8::1"), Remote: addr("2001:db8::2"), MTU: 1460, TTL: 64}},
		"ip link add name wm0 mtu 1460 type ip6tnl mode any local 2001:db8::1 remote 2001:db8::2 hoplimit 64 encaplimit none\nip link set dev wm0 alias wanmig addrgenmode none\nip link set dev wm0 up",
		"ip link del dev wm0",
	},
	{
		Step{Device: &Device{Name: "br0.100", Kind: KindVLAN, Parent: "br0", VLAN: 100}},
		"ip link add link br0 name br0.100 type vlan id 100\nip link set dev br0.100 alias wanmig up",
		"ip link del dev br0.100",
	},
	{
		Step{Device: &Device{Name: "wm0", Kind: KindTUN, MTU: 1400}},
		"ip tuntap add dev wm0 mode tun  # carried by the agent",
		"ip tuntap del dev wm0 mode tun  # goes with the agent that carries it",
	},
	{
		Step{Sysctl: &Sysctl{Key: "net/ipv4/conf/eth0.100/rp_filter", Value: "2", Was: "1"}},
		"sysctl -w net/ipv4/conf/eth0.100/rp_filter=2",
		"sysctl -w net/ipv4/conf/eth0.100/rp_filter=1",
	},
	{
		Step{Address: &Address{Dev: "br0", Prefix: prefix("203.0.113.7/32")}},
		"ip addr add 203.0.113.7/32 dev br0 metric 119 noprefixroute",
		"ip addr del 203.0.113.7/32 dev br0",
	},
	{
		Step{Address: &Address{Dev: "br0", Prefix: prefix("2001:db8::7/128")}},
		"ip -6 addr add 2001:db8::7/128 dev br0 metric 119 noprefixroute nodad preferred_lft 0",
		"ip -6 addr del 2001:db8::7/128 dev br0",
	},
	{
		Step{Rule: &Rule{Priority: 1190, To: prefix("192.0.2.5/32"), Table: 11901}},
		"ip rule add pref 1190 from all to 192.0.2.5/32 lookup 11901 protocol 119",
		"ip rule del pref 1190 from all to 192.0.2.5/32 lookup 11901 protocol 119",
	},
	{
		Step{Rule: &Rule{Priority: 1190, From: prefix("2001:db8::5/128"), To: prefix("::/0"), IIf: "br0", Mark: 0x100, Mask: 0xff00, Table: 100}},
		"ip -6 rule add pref 1190 from 2001:db8::5/128 iif br0 fwmark 0x100/0xff00 lookup 100 protocol 119",
		"ip -6 rule del pref 1190 from 2001:db8::5/128 iif br0 fwmark 0x100/0xff00 lookup 100 protocol 119",
	},
	{
		Step{Route: &Route{Table: 11901, Dst: prefix("192.0.2.5/32"), Dev: "wm0", Source: addr("192.0.2.1"), MTU: 1480}},
		"ip route add 192.0.2.5/32 dev wm0 scope link src 192.0.2.1 mtu 1480 table 11901 proto 119",
		"ip route del 192.0.2.5/32 dev wm0 scope link src 192.0.2.1 mtu 1480 table 11901 proto 119",
	},
	{
		Step{Route: &Route{Table: 11901, Dst: prefix("::/0"), Dev: "wm0", Via: addr("fe80::1")}},
		"ip -6 route add default via fe80::1 dev wm0 table 11901 proto 119",
		"ip -6 route del default via fe80::1 dev wm0 table 11901 proto 119",
	},
	{
		Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("192.0.2.5"), MAC: "52:54:00:AA:00:01"}},
		"ip neigh replace 192.0.2.5 lladdr 52:54:00:aa:00:01 dev br0 nud permanent proto 119",
		"ip neigh del 192.0.2.5 dev br0",
	},
	{
		Step{Neighbour: &Neighbour{Dev: "br0", IP: addr("2001:db8::5"), Proxy: true}},
		"ip -6 neigh add proxy 2001:db8::5 dev br0 proto 119",
		"ip -6 neigh del proxy 2001:db8::5 dev br0",
	},
	{
		Step{FDB: &FDB{Dev: "vnet0", MAC: "52:54:00:00:00:01"}},
		"bridge fdb replace 52:54:00:00:00:01 dev vnet0 master static sticky",
		"bridge fdb del 52:54:00:00:00:01 dev vnet0 master",
	},
	{
		Step{FDB: &FDB{Dev: "vnet0", MAC: "52:54:00:00:00:01", VLAN: 7}},
		"bridge fdb replace 52:54:00:00:00:01 dev vnet0 vlan 7 master static sticky",
		"bridge fdb del 52:54:00:00:00:01 dev vnet0 vlan 7 master",
	},
	{
		Step{Table: &Table{Family: "inet", Name: "wanmig_0", Body: "\tchain c {\n\t\tcounter\n\t}\n"}},
		"nft -f - <<'EOF'\ntable inet wanmig_0 {\n\tchain c {\n\t\tcounter\n\t}\n}\nEOF",
		"nft delete table inet wanmig_0",
	},
}

func TestStepIsShownAsTyped(t *testing.T) {
	for _, c := range typed {
		if err := c.step.Validate(); err != nil {
			t.Errorf("%s: %v", c.do, err)
		}
		if got := c.step.String(); got != c.do {
			t.Errorf("String:\n%s\nwant:\n%s", got, c.do)
		}
		if got := c.step.UndoString(); got != c.undo {
			t.Errorf("UndoString:\n%s\nwant:\n%s", got, c.undo)
		}
	}
}

func TestStepSurvivesTheJournal(t *testing.T) {
	for _, c := range typed {
		data, err := json.Marshal(c.step)
		if err != nil {
			t.Fatal(err)
		}
		var back Step
		if err := json.Unmarshal(data, &back); err != nil {
			t.Errorf("%s: %v", data, err)
		}
		if !reflect.DeepEqual(back, c.step) {
			t.Errorf("%s came back as %v", data, back)
		}
	}
}

// TestHostileStepIsRefused reads what a journal should never say.
func TestHostileStepIsRefused(t *testing.T) {
	long := strings.Repeat("counter\n", maxBody/8) + "x"
	for _, data := range []string{
		`{}`,
		`{"fdb":{"dev":"a","mac":"52:54:00:00:00:01"},"address":{"dev":"a","prefix":"192.0.2.1/32"}}`,

		`{"device":{"name":"wm0"}}`,
		`{"device":{"name":"","kind":"tun"}}`,
		`{"device":{"name":"..","kind":"tun"}}`,
		`{"device":{"name":"all","kind":"tun"}}`,
		`{"device":{"name":"-6","kind":"tun"}}`,
		`{"device":{"name":"sixteen-bytes-xx","kind":"tun"}}`,
		`{"device":{"name":"a/b","kind":"tun"}}`,
		`{"device":{"name":"a b","kind":"tun"}}`,
		`{"device":{"name":"a\nb","kind":"tun"}}`,
		`{"device":{"name":"a;reboot","kind":"tun"}}`,
		`{"device":{"name":"wm0","kind":"tun","ttl":1}}`,
		`{"device":{"name":"wm0","kind":"tun","parent":"br0"}}`,
		`{"device":{"name":"wm0","kind":"tun","local":"192.0.2.1"}}`,
		`{"device":{"name":"wm0","kind":"tun","mtu":100}}`,
		`{"device":{"name":"wm0","kind":"tun","mtu":65536}}`,
		`{"device":{"name":"wm0","kind":"bridge"}}`,
		`{"device":{"name":"wm0","kind":"ipip"}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1"}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1","remote":"192.0.2.1"}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1","remote":"0.0.0.0"}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1","remote":"224.0.0.1"}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1","remote":"127.0.0.1"}}`,
		`{"device":{"name":"wm0","kind":"sit","local":"192.0.2.1","remote":"2001:db8::1"}}`,
		`{"device":{"name":"wm0","kind":"ip6tnl","local":"192.0.2.1","remote":"192.0.2.2"}}`,
		`{"device":{"name":"wm0","kind":"ip6tnl","local":"::ffff:192.0.2.1","remote":"2001:db8::1"}}`,
		`{"device":{"name":"wm0","kind":"ip6tnl","local":"fe80::1%eth0","remote":"2001:db8::1"}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1","remote":"192.0.2.2","ttl":256}}`,
		`{"device":{"name":"wm0","kind":"ipip","local":"192.0.2.1","remote":"192.0.2.2","vlan":1}}`,
		`{"device":{"name":"wm0","kind":"vlan","parent":"br0"}}`,
		`{"device":{"name":"wm0","kind":"vlan","parent":"br0","vlan":4095}}`,
		`{"device":{"name":"wm0","kind":"vlan","vlan":1}}`,

		`{"sysctl":{"key":"kernel/core_pattern","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/core/rmem_max","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/ip_forward","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/route/br0/flush","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"/net/ipv4/conf/br0/forwarding","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/../forwarding","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/../../../../kernel/x","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/..","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/forwarding/","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf//forwarding","value":"1","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/forwarding","value":"","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/forwarding","value":"1"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/forwarding","value":"1\n2","was":"0"}}`,
		`{"sysctl":{"key":"net/ipv4/conf/br0/forwarding","value":"1; x","was":"0"}}`,

		`{"address":{"dev":"br0","prefix":""}}`,
		`{"address":{"dev":"br0","prefix":"203.0.113.7/24"}}`,
		`{"address":{"dev":"br0","prefix":"224.0.0.1/32"}}`,
		`{"address":{"dev":"br0","prefix":"127.0.0.1/32"}}`,
		`{"address":{"dev":"br0","prefix":"::/128"}}`,
		`{"address":{"dev":"br0","prefix":"::ffff:192.0.2.1/128"}}`,
		`{"address":{"dev":"","prefix":"203.0.113.7/32"}}`,

		`{"rule":{"priority":0,"to":"192.0.2.5/32","table":100}}`,
		`{"rule":{"priority":32766,"to":"192.0.2.5/32","table":100}}`,
		`{"rule":{"priority":-1,"to":"192.0.2.5/32","table":100}}`,
		`{"rule":{"priority":100,"to":"192.0.2.5/32"}}`,
		`{"rule":{"priority":100,"to":"192.0.2.5/32","table":2147483648}}`,
		`{"rule":{"priority":100,"table":100}}`,
		`{"rule":{"priority":100,"to":"192.0.2.5/24","table":100}}`,
		`{"rule":{"priority":100,"from":"192.0.2.5/32","to":"2001:db8::/64","table":100}}`,
		`{"rule":{"priority":100,"to":"::ffff:0:0/96","table":100}}`,
		`{"rule":{"priority":100,"to":"192.0.2.5/32","mark":1,"table":100}}`,
		`{"rule":{"priority":100,"to":"192.0.2.5/32","mark":256,"mask":255,"table":100}}`,
		`{"rule":{"priority":100,"to":"192.0.2.5/32","iif":"a b","table":100}}`,

		`{"route":{"table":0,"dst":"192.0.2.5/32","dev":"wm0"}}`,
		`{"route":{"table":255,"dst":"192.0.2.5/32","dev":"wm0"}}`,
		`{"route":{"table":100,"dst":"","dev":"wm0"}}`,
		`{"route":{"table":100,"dst":"192.0.2.5/24","dev":"wm0"}}`,
		`{"route":{"table":100,"dst":"192.0.2.5/32","dev":""}}`,
		`{"route":{"table":100,"dst":"192.0.2.5/32","dev":"wm0","via":"2001:db8::1"}}`,
		`{"route":{"table":100,"dst":"192.0.2.5/32","dev":"wm0","via":"0.0.0.0"}}`,
		`{"route":{"table":100,"dst":"2001:db8::/64","dev":"wm0","source":"192.0.2.1"}}`,
		`{"route":{"table":100,"dst":"2001:db8::/64","dev":"wm0","source":"fe80::1%wm0"}}`,
		`{"route":{"table":100,"dst":"192.0.2.5/32","dev":"wm0","mtu":-1}}`,

		`{"neighbour":{"dev":"br0","ip":"192.0.2.5"}}`,
		`{"neighbour":{"dev":"br0","ip":"192.0.2.5","mac":"01:00:5e:00:00:01"}}`,
		`{"neighbour":{"dev":"br0","ip":"192.0.2.5","mac":"00:00:00:00:00:00"}}`,
		`{"neighbour":{"dev":"br0","ip":"192.0.2.5","mac":"5254.0000.0001"}}`,
		`{"neighbour":{"dev":"br0","ip":"192.0.2.5","mac":"52:54:00:00:00:01:02:03"}}`,
		`{"neighbour":{"dev":"br0","ip":"192.0.2.5","mac":"52:54:00:00:00:01","proxy":true}}`,
		`{"neighbour":{"dev":"br0","ip":"255.255.255.255%x","proxy":true}}`,
		`{"neighbour":{"dev":"br0","ip":"ff02::1","proxy":true}}`,
		`{"neighbour":{"dev":"default","ip":"192.0.2.5","proxy":true}}`,

		`{"fdb":{"dev":"vnet0","mac":""}}`,
		`{"fdb":{"dev":"vnet0","mac":"ff:ff:ff:ff:ff:ff"}}`,
		`{"fdb":{"dev":"vnet0","mac":"52:54:00:00:00:01","vlan":4095}}`,
		`{"fdb":{"dev":"vnet0","mac":"52:54:00:00:00:01","vlan":-1}}`,

		`{"table":{"family":"inet","name":"filter","body":""}}`,
		`{"table":{"family":"inet","name":"wanmig_","body":""}}`,
		`{"table":{"family":"inet","name":"wanmig_0 {","body":""}}`,
		`{"table":{"family":"inet","name":"wanmig_0\n","body":""}}`,
		`{"table":{"family":"arp; x","name":"wanmig_0","body":""}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"}\nflush ruleset\ntable inet filter {"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"chain c {"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"EOF\nreboot"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"include \"/etc/shadow\""}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"include\"/etc/shadow\""}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"chain c {;include\t\"/etc/shadow\" }"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"inc\\\nlude"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"define x = 1"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"# {"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"comment \"{\" }"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"comment \"a"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"comment \"a\nb\""}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"$x"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"é"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":"a\u0000b"}}`,
		`{"table":{"family":"inet","name":"wanmig_0","body":` + quote(long) + `}}`,
	} {
		var s Step
		if err := json.Unmarshal([]byte(data), &s); err != nil {
			continue // as good
		}
		if err := s.Validate(); err == nil {
			t.Errorf("accepted: %.200s", data)
		}
		if text := s.String() + s.UndoString(); !strings.HasPrefix(text, "# invalid step") {
			t.Errorf("%.200s is shown as %q", data, text)
		}
	}
}

func TestWordsOfRulesAreNoCommands(t *testing.T) {
	for _, body := range []string{
		"chain c {\n\ttype filter hook forward priority mangle; policy accept;\n\toifname \"wm0\" tcp flags syn tcp option maxseg size set rt mtu\n}",
		"set includes { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 } }",
		`chain c { iifname "include" drop comment "a comment: 1.2/3" }`,
		"",
	} {
		if err := checkBody(body); err != nil {
			t.Errorf("%q: %v", body, err)
		}
	}
}

func quote(s string) string {
	data, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(data)
}

func FuzzStep(f *testing.F) {
	for _, c := range typed {
		data, err := json.Marshal(c.step)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var s Step
		if json.Unmarshal(data, &s) != nil {
			return
		}
		valid := s.Validate() == nil
		for _, text := range []string{s.String(), s.UndoString()} {
			if valid == strings.HasPrefix(text, "# ") {
				t.Fatalf("valid %v, but shown as %q", valid, text)
			}
			if valid && s.Table == nil && strings.ContainsAny(text, ";&|$`'\"\\<>(){}!\x00\r") {
				t.Fatalf("%q does more than one thing", text)
			}
		}
		if !valid {
			return
		}
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back Step
		if err := json.Unmarshal(again, &back); err != nil || back.Validate() != nil || back.String() != s.String() {
			t.Fatalf("%s came back as %v: %v", again, back, err)
		}
	})
}
