package hostnet

import (
	"io"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestDeviceIsToldFromOthers(t *testing.T) {
	ipip := &Device{Name: "wm0", Kind: KindIPIP, Local: addr("192.0.2.1"), Remote: addr("192.0.2.2")}
	sit := &Device{Name: "wm0", Kind: KindSit, Local: addr("192.0.2.1"), Remote: addr("192.0.2.2")}
	ip6 := &Device{Name: "wm0", Kind: KindIP6Tnl, Local: addr("2001:db8::1"), Remote: addr("2001:db8::2")}
	tun := &Device{Name: "wm0", Kind: KindTUN}
	ours := netlink.LinkAttrs{Name: "wm0", Alias: alias}
	fresh := netlink.LinkAttrs{Name: "wm0"} // made, but cut short
	theirs := netlink.LinkAttrs{Name: "wm0", Alias: "uplink"}
	for name, c := range map[string]struct {
		device *Device
		link   netlink.Link
		same   bool
	}{
		"ipip":               {ipip, &netlink.Iptun{LinkAttrs: ours, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote), Proto: 4}, true},
		"ipip without alias": {ipip, &netlink.Iptun{LinkAttrs: fresh, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote), Proto: 4}, true},
		"ipip of others":     {ipip, &netlink.Iptun{LinkAttrs: theirs, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote), Proto: 4}, false},
		"ipip turned round":  {ipip, &netlink.Iptun{LinkAttrs: ours, Local: toIP(ipip.Remote), Remote: toIP(ipip.Local), Proto: 4}, false},
		"ipip of MPLS":       {ipip, &netlink.Iptun{LinkAttrs: ours, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote), Proto: 137}, false},
		"sit for ipip":       {ipip, &netlink.Sittun{LinkAttrs: ours, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote)}, false},
		"sit":                {sit, &netlink.Sittun{LinkAttrs: ours, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote)}, true},
		"sit of IPv6 alone":  {sit, &netlink.Sittun{LinkAttrs: ours, Local: toIP(ipip.Local), Remote: toIP(ipip.Remote), Proto: 41}, false},
		"ip6tnl":             {ip6, &netlink.Ip6tnl{LinkAttrs: ours, Local: toIP(ip6.Local), Remote: toIP(ip6.Remote)}, true},
		"ip6tnl of IPv6":     {ip6, &netlink.Ip6tnl{LinkAttrs: ours, Local: toIP(ip6.Local), Remote: toIP(ip6.Remote), Proto: 41}, false},
		"TUN":                {tun, &netlink.Tuntap{LinkAttrs: fresh, Mode: netlink.TUNTAP_MODE_TUN}, true},
		"tap":                {tun, &netlink.Tuntap{LinkAttrs: fresh, Mode: netlink.TUNTAP_MODE_TAP}, false},
		"bridge":             {tun, &netlink.Bridge{LinkAttrs: ours}, false},
	} {
		if differs := (&Host{}).differs(c.device, c.link); (differs == "") != c.same {
			t.Errorf("%s: %q", name, differs)
		}
	}
}

func TestOutputIsBounded(t *testing.T) {
	for n, cut := range map[int]bool{0: false, 9: false, 10: false, 11: true, 100000: true} {
		l := limited{limit: 10}
		// As os/exec does.
		if _, err := io.Copy(&l, struct{ io.Reader }{strings.NewReader(strings.Repeat("x", n))}); err != nil {
			t.Fatal(err)
		}
		if l.cut != cut || l.kept.Len() != min(n, 10) {
			t.Errorf("of %d bytes, %d are kept, cut: %v", n, l.kept.Len(), l.cut)
		}
	}
}
