//go:build lab

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// bridgeTellsVLANsApart has ports of all sorts at a bridge that filters by VLAN.
func bridgeTellsVLANsApart(t *testing.T) {
	s := linkSite(t)
	h := s.host()
	s.Sh(`ip link add br0 up type bridge vlan_filtering 1
		ip link add v0 master br0 type veth peer name v1
		ip link add w0 master br0 type veth peer name w1`)
	for _, c := range []struct {
		port  string
		setup string
		vlan  int
		err   string
	}{
		{"v0", "true", 1, ""}, // as each port begins
		{"v0", "bridge vlan add dev v0 vid 100 pvid untagged", 100, ""},
		{"v0", "bridge vlan add dev v0 vid 200-202", 100, ""},
		{"w0", "bridge vlan del dev w0 vid 1", 0, "w0 has none for untagged frames"},
		{"w0", "bridge vlan add dev w0 vid 100", 0, "w0 has none for untagged frames"},
		{"w0", "bridge vlan add dev w0 vid 4094 pvid", 4094, ""},
		{"up0", "true", 0, "up0 is no port"},
	} {
		s.Sh(c.setup)
		s.Must(func() error {
			b, err := h.Bridge("br0")
			if !b.VLANAware {
				t.Errorf("%s: the bridge does not tell VLANs apart: %+v", c.setup, b)
			}
			vlan, portErr := h.PortVLAN(c.port)
			if vlan != c.vlan || c.err == "" && portErr != nil || !strings.Contains(fmt.Sprint(portErr), c.err) {
				t.Errorf("%s: VLAN of %s is %d, %v, want %d, %q", c.setup, c.port, vlan, portErr, c.vlan, c.err)
			}
			return err
		})
	}

	fdb := func() string { return s.Sh("bridge fdb show br br0 | sort") }
	before := fdb()
	entry := func(port, vlan string) string { return vmMAC + " dev " + port + vlan + " sticky master br0 static\n" }
	for vlan, want := range map[int][]string{
		// The kernel adds one for each VLAN of the port, and takes them away.
		0:   {entry("v0", ""), entry("v0", " vlan 1"), entry("v0", " vlan 100"), entry("v0", " vlan 200")},
		100: {entry("v0", " vlan 100")},
	} {
		step := Step{FDB: &FDB{Dev: "v0", MAC: vmMAC, VLAN: vlan}}
		for range 2 {
			s.apply(h, step)
		}
		applied := fdb()
		for _, want := range want {
			if !strings.Contains(applied, want) {
				t.Errorf("%s: no %q in %s", step, want, applied)
			}
		}
		s.revert(h, step)
		testnet.Same(t, step.String(), before, fdb())
	}
	s.Sh("bridge fdb add " + vmMAC + " dev w0 vlan 100 master static")
	before = fdb()
	for _, vlan := range []int{0, 100} {
		step := Step{FDB: &FDB{Dev: "v0", MAC: vmMAC, VLAN: vlan}}
		s.Must(func() error {
			if err := h.Apply(context.Background(), step); !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "w0") {
				t.Errorf("%s: %v", step, err)
			}
			return h.Revert(context.Background(), step)
		})
		testnet.Same(t, step.String(), before, fdb())
	}

	s.Sh("ip link set br0 type bridge vlan_filtering 0")
	s.Must(func() error {
		b, err := h.Bridge("br0")
		if vlan, portErr := h.PortVLAN("v0"); b.VLANAware || vlan != 0 || portErr != nil {
			t.Errorf("without filtering: %+v, VLAN %d of v0, %v", b, vlan, portErr)
		}
		return err
	})
}

// bridgeOnVLANIsPlain has a bridge whose network is a VLAN of a trunk.
//
//	host                                  switch
//	v0 -- br100 -- eth0.100 = eth0 ------ eth0 = eth0.100
//	      192.0.2.1                              192.0.2.9
//	      2001:db8:1::1                          2001:db8:1::9
func bridgeOnVLANIsPlain(t *testing.T) {
	host, other := joined(t)
	h, o := host.host(), other.host()
	before := testnet.Settled(t, host.links)
	vlan := Step{Device: &Device{Name: "eth0.100", Kind: KindVLAN, Parent: "eth0", VLAN: 100}}
	host.apply(h, vlan)
	other.apply(o, vlan)
	host.Sh(`ip link add br100 address 02:00:00:00:00:01 type bridge; ip link set br100 up
		ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
		ip link set v0 master br100; ip link set eth0.100 master br100
		ip addr add 192.0.2.1/24 dev br100; ip addr add 2001:db8:1::1/64 dev br100`)
	other.Sh("ip addr add 192.0.2.9/24 dev eth0.100; ip addr add 2001:db8:1::9/64 dev eth0.100")
	host.Must(func() error {
		b, err := h.Bridge("br100")
		if b.VLANAware || b.MTU != 1500 || b.MAC.String() != "02:00:00:00:00:01" || fmt.Sprint(b.Prefixes) != "[192.0.2.1/24 2001:db8:1::1/64]" {
			t.Errorf("bridge: %+v", b)
		}
		for _, port := range []string{"v0", "eth0.100"} {
			if vlan, err := h.PortVLAN(port); vlan != 0 || err != nil {
				t.Errorf("VLAN of %s: %d, %v", port, vlan, err)
			}
		}
		return err
	})
	for _, a := range []string{"192.0.2.9", "2001:db8:1::9"} {
		host.Sh("ping -c 1 -W 10 " + a)
	}
	host.Sh("ip link del br100; ip link del v0")
	host.revert(h, vlan)
	testnet.Same(t, "reverted", before, testnet.Settled(t, host.links))
}
