//go:build bench

package encap

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// TestThroughput measures TCP of a client through a tunnel of ours and, beside it, through the same hosts by plain
// forwarding, which hands whole 64 KiB from host to host since nothing between them is a network card:
//
//	client --- source ===== destination --- vm
func TestThroughput(t *testing.T) {
	client, source, destination, vm := newSpace(t, "client"), newSpace(t, "source"), newSpace(t, "destination"), newSpace(t, "vm")
	testnet.Join(client.Space, "eth0", source.Space, "lan")
	testnet.Join(source.Space, "wan", destination.Space, "wan")
	testnet.Join(destination.Space, "lan", vm.Space, "eth0")
	client.ip(`addr add 10.1.0.2/24 dev eth0
		addr add fd01::2/64 dev eth0 nodad
		route add default via 10.1.0.1
		route add default via fd01::1`)
	source.ip(`addr add 10.1.0.1/24 dev lan
		addr add fd01::1/64 dev lan nodad
		addr add 10.9.0.1/24 dev wan
		addr add fd09::1/64 dev wan nodad
		route add 10.2.0.0/24 via 10.9.0.2
		route add fd02::/64 via fd09::2`)
	destination.ip(`addr add 10.2.0.1/24 dev lan
		addr add fd02::1/64 dev lan nodad
		addr add 10.9.0.2/24 dev wan
		addr add fd09::2/64 dev wan nodad
		route add 10.1.0.0/24 via 10.9.0.1
		route add fd01::/64 via fd09::1`)
	vm.ip(`addr add 10.2.0.2/24 dev eth0
		addr add fd02::2/64 dev eth0 nodad
		route add default via 10.2.0.1
		route add default via fd02::1`)
	vm.background("iperf3", "-s")

	plain4 := measure(t, client, "10.2.0.2")
	plain6 := measure(t, client, "fd02::2")
	for _, outer := range []struct {
		name          string
		local, remote string
		mtu           int
	}{
		{"IPv4", "10.9.0.1", "10.9.0.2", 1480},
		{"IPv6", "fd09::1", "fd09::2", 1460},
	} {
		here, away := NewGate(), NewGate()
		machine := []netip.Addr{addr("10.2.0.2"), addr("fd02::2")}
		away.Set(nil, machine)
		here.Set(machine, nil)
		one := source.open(Config{Name: "wm0", MTU: outer.mtu, Local: addr(outer.local), Remote: addr(outer.remote), Gate: away})
		two := destination.open(Config{Name: "wm0", MTU: outer.mtu, Local: addr(outer.remote), Remote: addr(outer.local), Gate: here})
		source.ip(`route add 10.2.0.2/32 dev wm0
			route add fd02::2/128 dev wm0`)
		destination.ip(`route add 10.1.0.2/32 dev wm0
			route add fd01::2/128 dev wm0`)
		inner4 := measure(t, client, "10.2.0.2")
		inner6 := measure(t, client, "fd02::2")
		t.Logf("outer %s: IPv4 %5.0f Mbit/s (plain forwarding %5.0f), IPv6 %5.0f Mbit/s (plain forwarding %5.0f)",
			outer.name, inner4, plain4, inner6, plain6)
		if inner4 < 500 || inner6 < 500 {
			t.Errorf("outer %s: less than 500 Mbit/s", outer.name)
		}
		for _, tunnel := range []*Tunnel{one, two} {
			if s := tunnel.Stats(); s.Sent.Bytes == 0 || s.Received.Bytes == 0 || s.Drops != (Drops{}) {
				t.Errorf("%+v", s)
			}
		}
		for _, tunnel := range []*Tunnel{one, two} {
			if err := tunnel.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// measure returns the Mbit/s of one TCP connection to the VM, the best of three: others may use the machine.
func measure(t *testing.T, client *space, to string) float64 {
	t.Helper()
	best := 0.0
	for range 3 {
		best = max(best, measureOnce(t, client, to))
	}
	if best == 0 {
		t.Fatalf("nothing reached %s", to)
	}
	return best
}

func measureOnce(t *testing.T, client *space, to string) float64 {
	t.Helper()
	var out string
	var err error
	for range 50 { // until the server listens
		if out, err = client.Try("iperf3 -c " + to + " -t 2 -J"); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	var result struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if e := json.Unmarshal([]byte(out), &result); err != nil || e != nil {
		t.Fatalf("iperf3: %v %v\n%s", err, e, out)
	}
	return result.End.Received.Rate / 1e6
}
