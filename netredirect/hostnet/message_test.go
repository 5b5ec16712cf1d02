package hostnet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// serialize is what the kernel would get of a message.
func serialize(parts ...nl.NetlinkRequestData) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p.Serialize()...)
	}
	return all
}

// failsAtEveryPrefix cuts a message at each byte. A cut between attributes
// leaves a shorter message that is as good.
func failsAtEveryPrefix[T any](t *testing.T, head int, message []byte, parse func([]byte) (T, error)) {
	t.Helper()
	boundaries := map[int]bool{}
	for at := head; at < len(message); {
		boundaries[at] = true
		at += (int(binary.NativeEndian.Uint16(message[at:])) + 3) &^ 3
	}
	for n := range message {
		_, err := parse(message[:n:n])
		// The padding of the last attribute does not matter.
		if err == nil && !boundaries[n] && !boundaries[(n+3)&^3] && (n+3)&^3 != len(message) {
			t.Errorf("%d bytes of %d are accepted", n, len(message))
		}
	}
}

func TestAddressMessage(t *testing.T) {
	for _, p := range []string{"203.0.113.7/32", "2001:db8::7/128"} {
		a := &Address{Dev: "br0", Prefix: netip.MustParsePrefix(p)}
		m := serialize(a.message(7)...)
		e, err := parseAddress(m)
		if err != nil || e.index != 7 || e.prefix != a.Prefix || !e.ours() {
			t.Errorf("%s came back as %+v: %v", p, e, err)
		}
		failsAtEveryPrefix(t, unix.SizeofIfAddrmsg, m, parseAddress)
	}
}

func TestNeighbourMessage(t *testing.T) {
	mac := net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	for _, c := range []struct {
		parts []nl.NetlinkRequestData
		want  neighbourEntry
	}{
		{
			(&Neighbour{Dev: "br0", IP: addr("192.0.2.5"), MAC: mac.String()}).message(7),
			neighbourEntry{family: unix.AF_INET, index: 7, state: unix.NUD_PERMANENT, ip: addr("192.0.2.5"), mac: mac, protocol: Protocol},
		},
		{
			(&Neighbour{Dev: "br0", IP: addr("2001:db8::5"), Proxy: true}).message(7),
			neighbourEntry{family: unix.AF_INET6, index: 7, state: unix.NUD_PERMANENT, flags: unix.NTF_PROXY, ip: addr("2001:db8::5"), protocol: Protocol},
		},
		{
			(&FDB{Dev: "vnet0", MAC: mac.String(), VLAN: 9}).message(7),
			neighbourEntry{family: unix.AF_BRIDGE, index: 7, state: unix.NUD_NOARP, flags: unix.NTF_MASTER | 0x40, mac: mac, vlan: 9},
		},
	} {
		m := serialize(c.parts...)
		e, err := parseNeighbour(m)
		if err != nil || !reflect.DeepEqual(e, c.want) {
			t.Errorf("got %+v, %v, want %+v", e, err, c.want)
		}
		failsAtEveryPrefix(t, 12, m, parseNeighbour)
	}
}

func nested(kind int, children ...*nl.RtAttr) *nl.RtAttr {
	parent := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	for _, c := range children {
		parent.AddChild(c)
	}
	return parent
}

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// connectionMessage is a TCP connection to a mapped address.
func connectionMessage() []byte {
	side := func(kind int, src, dst string, sport, dport uint16) *nl.RtAttr {
		return nested(kind,
			nested(nl.CTA_TUPLE_IP,
				nl.NewRtAttr(nl.CTA_IP_V4_SRC, addr(src).AsSlice()), nl.NewRtAttr(nl.CTA_IP_V4_DST, addr(dst).AsSlice())),
			nested(nl.CTA_TUPLE_PROTO,
				nl.NewRtAttr(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_TCP}),
				nl.NewRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(sport)), nl.NewRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(dport))))
	}
	counters := func(kind int, packets, bytes uint64) *nl.RtAttr {
		return nested(kind, nl.NewRtAttr(nl.CTA_COUNTERS_PACKETS, be64(packets)), nl.NewRtAttr(nl.CTA_COUNTERS_BYTES, be64(bytes)))
	}
	return serialize(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET},
		side(nl.CTA_TUPLE_ORIG, "198.51.100.9", "203.0.113.7", 40000, 22),
		side(nl.CTA_TUPLE_REPLY, "192.0.2.5", "198.51.100.9", 22, 40000),
		nested(nl.CTA_PROTOINFO, nested(nl.CTA_PROTOINFO_TCP, nl.NewRtAttr(nl.CTA_PROTOINFO_TCP_STATE, []byte{3}))),
		nl.NewRtAttr(nl.CTA_MARK, nl.BEUint32Attr(0x100)),
		counters(nl.CTA_COUNTERS_ORIG, 3, 1<<40), counters(nl.CTA_COUNTERS_REPLY, 4, 5))
}

func TestConnectionMessage(t *testing.T) {
	m := connectionMessage()
	c, err := parseConnection(m)
	if err != nil {
		t.Fatal(err)
	}
	want := Flow{Proto: "tcp", State: "ESTABLISHED", Src: netip.MustParseAddrPort("198.51.100.9:40000"),
		Dst: netip.MustParseAddrPort("203.0.113.7:22"), Packets: 7, Bytes: 1<<40 + 5}
	if f := c.flow(); f != want || c.mark != 0x100 {
		t.Errorf("got %+v with mark %#x, want %+v", f, c.mark, want)
	}
	for a, touched := range map[string]bool{"192.0.2.5": true, "203.0.113.7": true, "198.51.100.9": true, "192.0.2.6": false} {
		if c.touches(addr(a)) != touched {
			t.Errorf("touches %s: %v", a, !touched)
		}
	}
	failsAtEveryPrefix(t, ctMessage, m, parseConnection)
}

func FuzzMessages(f *testing.F) {
	f.Add(connectionMessage())
	f.Add(serialize((&Address{Dev: "br0", Prefix: prefix("203.0.113.7/32")}).message(7)...))
	f.Add(serialize((&FDB{Dev: "vnet0", MAC: "52:54:00:00:00:01", VLAN: 9}).message(7)...))
	f.Fuzz(func(t *testing.T, m []byte) {
		if c, err := parseConnection(m); err == nil && !(c.flow().Src.IsValid() && c.flow().Dst.IsValid()) {
			t.Fatalf("connection %+v", c)
		}
		if e, err := parseAddress(m); err == nil && !e.prefix.Addr().IsValid() {
			t.Fatalf("address %+v", e)
		}
		if e, err := parseNeighbour(m); err == nil && int(m[0]) != e.family {
			t.Fatalf("neighbour %+v", e)
		}
	})
}

func TestListing(t *testing.T) {
	const listing = `{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
		{"table": {"family": "ip", "name": "filter", "handle": 1}},
		{"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
		{"counter": {"family": "inet", "name": "in", "table": "wanmig_0", "handle": 2, "packets": 3, "bytes": 18446744073709551615}}]}`
	objects, err := parseListing([]byte(listing))
	if err != nil || len(objects) != 4 {
		t.Fatalf("%d objects, %v", len(objects), err)
	}
	if objects[1].Table.Name != "filter" || objects[2].Chain.Policy != "drop" || objects[3].Counter.Bytes != 1<<64-1 {
		t.Errorf("got %+v", objects)
	}
	for n := range len(listing) - 1 {
		if _, err := parseListing([]byte(listing[:n])); err == nil {
			t.Errorf("%d bytes of %d are accepted", n, len(listing))
		}
	}
}

func TestWiderRuleCoversNarrower(t *testing.T) {
	wide := (&Rule{Priority: 1, To: prefix("192.0.2.5/32"), Table: 100}).message()
	narrow := (&Rule{Priority: 1, To: prefix("192.0.2.5/32"), IIf: "wm0", Table: 100}).message()
	other := (&Rule{Priority: 1, From: prefix("192.0.2.5/32"), Mark: 1, Mask: 1, Table: 100}).message()
	for _, c := range []struct {
		a, b string
		got  bool
		want bool
	}{
		{"wide", "narrow", covers(wide, narrow), true},
		{"narrow", "wide", covers(narrow, wide), false},
		{"wide", "other", covers(wide, other), false},
		{"other", "narrow", covers(other, narrow), false},
	} {
		if c.got != c.want {
			t.Errorf("%s covers %s: %v", c.a, c.b, c.got)
		}
	}
}
