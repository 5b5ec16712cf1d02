package hypervisor

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/digitalocean/go-libvirt"
)

func TestReadLiveNICs(t *testing.T) {
	dom, err := readDomain(testdata(t, "nics-live.xml"))
	if err != nil {
		t.Fatal(err)
	}
	want := []NIC{
		{Alias: "net0", MAC: "52:54:00:00:00:0a", Kind: "bridge", Source: "br0", Bridge: "br0", Tap: "vnet0", Model: "virtio"},
		{Alias: "net1", MAC: "52:54:00:00:00:0b", Kind: "bridge", Source: "br1", Bridge: "br1", Tap: "vnet1", Model: "e1000"},
		{Alias: "net2", MAC: "52:54:00:00:00:0c", Kind: "user", Model: "virtio"},
	}
	if !reflect.DeepEqual(dom.Networks, want) {
		t.Errorf("got  %+v\nwant %+v", dom.Networks, want)
	}
}

func TestReadNICsOfOtherKinds(t *testing.T) {
	for xml, want := range map[string]NIC{
		`<interface type="network"><mac address="52:54:00:AB:CD:EF"/><source network="lan" portid="7c5f0d0e-1d2c-4f6e-9a53-0b6a4a8e7a11" bridge="virbr7"/><target dev="vnet3"/><alias name="net0"/></interface>`: {Alias: "net0", MAC: "52:54:00:ab:cd:ef", Kind: "network", Source: "lan", Bridge: "virbr7", Tap: "vnet3"},
		`<interface type="bridge"><source bridge="ovs0"/><virtualport type="openvswitch"><parameters interfaceid="7c5f0d0e-1d2c-4f6e-9a53-0b6a4a8e7a11"/></virtualport><vlan><tag id="42"/></vlan></interface>`:  {Kind: "bridge", Source: "ovs0", Bridge: "ovs0", VLAN: 42, VirtualPort: "openvswitch"},
		`<interface type="bridge"><source bridge="br0"/><vlan trunk="yes"><tag id="7" nativeMode="untagged"/><tag id="8"/></vlan></interface>`:                                                                   {Kind: "bridge", Source: "br0", Bridge: "br0", VLAN: 7},
		`<interface type="direct"><source dev="eno2" mode="vepa"/><target dev="macvtap0"/><virtualport type="802.1Qbg"/></interface>`:                                                                            {Kind: "direct", Source: "eno2", Tap: "macvtap0", VirtualPort: "802.1Qbg"},
		`<interface type="vhostuser"><source type="unix" path="/run/x" mode="client"/></interface>`:                                                                                                              {Kind: "vhostuser"},
		`<interface type="bridge"><source bridge="br0"/><vlan><tag id="x"/></vlan></interface>`:                                                                                                                  {Kind: "bridge", Source: "br0", Bridge: "br0"},
		`<interface/>`: {},
	} {
		dom, err := readDomain(fmt.Sprintf(small, xml))
		if err != nil || len(dom.Networks) != 1 || dom.Networks[0] != want {
			t.Errorf("%s\ngot  %+v, %v\nwant %+v", xml, dom.Networks, err, want)
		}
	}
}

// reply reads what DomainInterfaceAddresses returned.
func reply(t *testing.T, name string) []libvirt.DomainInterface {
	t.Helper()
	var list []libvirt.DomainInterface
	if err := json.Unmarshal([]byte(testdata(t, name)), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// The reply that libvirt 9.0 gave for a Debian guest with qemu-guest-agent.
func TestAddressesFromTheAgent(t *testing.T) {
	want := map[string][]netip.Prefix{"52:54:00:4b:5e:57": prefixes("10.10.0.10/24", "fd00:10::10/64")}
	if got := usableAddresses(reply(t, "addresses-agent.json")); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// libvirt reports no prefix length for what it finds in the neighbour table. A
// bridge inside the guest may have the MAC of its port.
func TestAddressesOfOneMACAreJoined(t *testing.T) {
	reported := append(one("52:54:00:00:00:0a", libvirt.DomainIPAddr{Addr: "192.0.2.10"}),
		one("52:54:00:00:00:0A", libvirt.DomainIPAddr{Addr: "192.0.2.10", Prefix: 24}, libvirt.DomainIPAddr{Addr: "2001:db8::10"})...)
	want := map[string][]netip.Prefix{"52:54:00:00:00:0a": prefixes("192.0.2.10/32", "2001:db8::10/128")}
	if got := usableAddresses(reported); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func one(mac string, addrs ...libvirt.DomainIPAddr) []libvirt.DomainInterface {
	return []libvirt.DomainInterface{{Name: "eth0", Hwaddr: libvirt.OptString{mac}, Addrs: addrs}}
}

func TestHostileAddresses(t *testing.T) {
	for _, bad := range []libvirt.DomainIPAddr{
		{Addr: ""},
		{Addr: "192.0.2.10/24", Prefix: 24},
		{Addr: "192.0.2.010", Prefix: 24},
		{Addr: "192.0.2.10\n", Prefix: 24},
		{Addr: strings.Repeat("1", 4<<20), Prefix: 24},
		{Addr: "0.0.0.0", Prefix: 0},
		{Addr: "0.1.2.3", Prefix: 8},
		{Addr: "127.0.0.53", Prefix: 8},
		{Addr: "169.254.10.1", Prefix: 16},
		{Addr: "224.0.0.251", Prefix: 4},
		{Addr: "255.255.255.255", Prefix: 32},
		{Addr: "192.0.2.10", Prefix: 33},
		{Addr: "192.0.2.10", Prefix: 1 << 31},
		{Addr: "::", Prefix: 64},
		{Addr: "::1", Prefix: 128},
		{Addr: "fe80::1", Prefix: 64},
		{Addr: "fe80::1%eth0", Prefix: 64},
		{Addr: "2001:db8::1%eth0", Prefix: 64},
		{Addr: "ff02::1", Prefix: 8},
		{Addr: "::ffff:127.0.0.1", Prefix: 32},
		{Addr: "::ffff:192.0.2.10", Prefix: 128},
		{Addr: "2001:db8::1", Prefix: 129},
	} {
		if got := usableAddresses(one("52:54:00:00:00:0a", bad)); len(got) != 0 {
			t.Errorf("%.40q with prefix %d gives %v", bad.Addr, bad.Prefix, got)
		}
	}
	good := libvirt.DomainIPAddr{Addr: "::ffff:192.0.2.10", Prefix: 24}
	want := map[string][]netip.Prefix{"52:54:00:00:00:0a": prefixes("192.0.2.10/24")}
	if got := usableAddresses(one("52:54:00:00:00:0A", good, good)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, odd := range []libvirt.OptString{nil, {}, {"52:54:00:00:00:0a", "52:54:00:00:00:0b"}} {
		if got := usableAddresses([]libvirt.DomainInterface{{Hwaddr: odd, Addrs: []libvirt.DomainIPAddr{good}}}); len(got) != 0 {
			t.Errorf("with the MACs %q: %v", odd, got)
		}
	}
	var many []libvirt.DomainIPAddr
	for i := range 2000 {
		many = append(many, libvirt.DomainIPAddr{Addr: fmt.Sprintf("10.0.%d.%d", i/256, i%256), Prefix: 16})
	}
	if got := usableAddresses(one("52:54:00:00:00:0a", many...)); len(got["52:54:00:00:00:0a"]) != maxGuestAddresses {
		t.Errorf("%d addresses of 2000 are believed", len(got["52:54:00:00:00:0a"]))
	}
}

func FuzzUsableAddress(f *testing.F) {
	f.Add("192.0.2.10", uint32(24))
	f.Add("2001:db8::10", uint32(64))
	f.Add("::ffff:192.0.2.10", uint32(24))
	f.Add("fe80::1%eth0", uint32(64))
	f.Fuzz(func(t *testing.T, addr string, prefix uint32) {
		p, ok := usableAddress(libvirt.DomainIPAddr{Addr: addr, Prefix: prefix})
		if !ok {
			return
		}
		a := p.Addr()
		again, same := usableAddress(libvirt.DomainIPAddr{Addr: a.String(), Prefix: uint32(p.Bits())})
		if !p.IsValid() || !a.IsGlobalUnicast() || a.Is4In6() || !same || again != p {
			t.Errorf("%q with prefix %d gives %v, and that %v", addr, prefix, p, again)
		}
	})
}
