//go:build bench

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/netredirect/encap"
	"github.com/wanmig/wanmig/tunnel"
)

// Addresses inside the tunnel.
const (
	tunnelLocal  = "10.99.0.1"
	tunnelRemote = "10.99.0.2"
	tunnelPort   = "7700"
)

// TestTunnelKinds measures a TCP flow between the data centres, plainly and
// through a tunnel of each kind, over the same link in the same run.
func TestTunnelKinds(t *testing.T) {
	w := newWorld(t, "100mbit", "50ms")
	local, remote := w.Sites[lab.LocalDC].AgentAddr.Addr().String(), w.Sites[lab.RemoteDC].AgentAddr.Addr().String()
	w.background(lab.RemoteDC, "iperf3", "-s")
	kinds := []netredirect.Kind{netredirect.IPIPUser, netredirect.QUIC}
	if w.kernelTunnels() {
		kinds = append(kinds, netredirect.IPIP)
	} else {
		fmt.Println("\nthis kernel makes no IP-in-IP: its own tunnel is not measured")
	}
	for _, kind := range kinds {
		t.Run(string(kind), func(t *testing.T) {
			w := &world{w.Lab, t}
			shared := t.TempDir()
			ends := []*tunnelEnd{
				w.tunnelEnd(kind, lab.RemoteDC, shared, remote, local),
				w.tunnelEnd(kind, lab.LocalDC, shared, local, remote),
			}
			for _, e := range ends {
				e.await(t)
			}
			fmt.Printf("\n%s: one TCP flow for 10 s at 100 Mbit/s, 50 ms, Mbit/s:\n  %-8s %8s %8s %8s\n", kind, "", "plain", "tunnel", "ratio")
			for _, control := range []string{"cubic", "bbr"} {
				var ratios []float64
				for range 3 { // a busy machine makes it less, never more
					plain := w.iperf(control, remote)
					inside := w.iperf(control, tunnelRemote)
					ratios = append(ratios, inside/plain)
					fmt.Printf("  %-8s %8.1f %8.1f %8.2f\n", control, plain, inside, inside/plain)
					if inside >= 0.9*plain {
						break
					}
				}
				if slices.Max(ratios) < 0.9 {
					t.Errorf("%s: the tunnel carries %.2f of the link", control, ratios)
				}
			}
		})
	}
}

// kernelTunnels tells whether the kernel makes devices of IP-in-IP.
func (w *world) kernelTunnels() bool {
	w.t.Helper()
	const device = "wm-probe"
	if _, _, status := w.run(lab.LocalDC, "ip", "link", "add", device, "type", "ipip", "local", tunnelLocal, "remote", tunnelRemote); status != 0 {
		return false
	}
	if _, complaint, status := w.run(lab.LocalDC, "ip", "link", "del", device); status != 0 {
		w.t.Fatalf("remove %s: %s", device, complaint)
	}
	return true
}

// iperf returns the Mbit/s of one TCP flow from local-dc.
func (w *world) iperf(control, to string) float64 {
	w.t.Helper()
	out, complaint, status := w.run(lab.LocalDC, "iperf3", "-c", to, "-C", control, "-t", "10", "-J")
	var result struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	err := json.Unmarshal([]byte(out), &result)
	if status != 0 || err != nil || result.End.Received.Rate == 0 {
		w.t.Fatalf("iperf3 to %s: status %d, %v: %s%s", to, status, err, out, complaint)
	}
	return result.End.Received.Rate / 1e6
}

// background runs a command in a site until the test ends.
func (w *world) background(site, name string, args ...string) *exec.Cmd {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd, err := w.Command(ctx, site, name, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	cmd.Stderr = w.t.Output()
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	return cmd
}

// tunnelEnd is a process of this program, which runTunnelEnd is in.
type tunnelEnd struct{ ready string }

// tunnelEnd starts one end, between outer addresses. Both share a folder.
func (w *world) tunnelEnd(kind netredirect.Kind, site, shared, here, peer string) *tunnelEnd {
	w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	w.background(site, self, tunnelEndName, string(kind), site, shared, here, peer)
	return &tunnelEnd{filepath.Join(shared, site+".ready")}
}

func (e *tunnelEnd) await(t *testing.T) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(e.ready); err == nil {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("%s did not come", e.ready)
		}
	}
}

const tunnelEndName = "tunnel-end"

func init() { child[tunnelEndName] = runTunnelEnd }

// runTunnelEnd is one end of the tunnel, until it is killed.
func runTunnelEnd(args []string) error {
	kind, site, shared := netredirect.Kind(args[0]), args[1], args[2]
	here, peer := netip.MustParseAddr(args[3]), netip.MustParseAddr(args[4])
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	device := "wm-" + string(kind)
	inner, innerPeer := netip.MustParseAddr(tunnelLocal), netip.MustParseAddr(tunnelRemote)
	if site == lab.RemoteDC {
		inner, innerPeer = innerPeer, inner
	}
	gate := encap.NewGate()
	gate.Set([]netip.Addr{inner}, []netip.Addr{innerPeer})
	c := encap.Config{Name: device, MTU: 1480, Local: here, Remote: peer, Gate: gate, Log: log}

	over := make(<-chan struct{}) // never
	switch kind {
	case netredirect.QUIC:
		p, err := packets(site, shared, here, peer, log)
		if err != nil {
			return err
		}
		c.MTU = p.MaxSize()
		t, err := encap.OpenDatagrams(c)
		if err != nil {
			return err
		}
		defer t.Close()
		t.Attach(p)
		over = p.Done()
	case netredirect.IPIPUser:
		t, err := encap.OpenIPIP(c)
		if err != nil {
			return err
		}
		defer t.Close()
	case netredirect.IPIP:
		if err := ip(fmt.Sprintf("link add %s type ipip local %s remote %s", device, here, peer)); err != nil {
			return err
		}
		if err := ip(fmt.Sprintf("link set %s mtu %d up", device, c.MTU)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("no tunnel of kind %q", kind)
	}
	if err := ip(fmt.Sprintf("addr add %s peer %s dev %s", inner, innerPeer, device)); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(shared, site+".ready"), nil, 0o600); err != nil {
		return err
	}
	<-over
	return fmt.Errorf("the tunnel's connection ended")
}

// packets is an end of a QUIC connection for packets, once it knows what the
// link takes. remote-dc listens.
func packets(site, shared string, here, peer netip.Addr, log *slog.Logger) (*tunnel.Packets, error) {
	id, err := tunnel.LoadOrCreateIdentity(filepath.Join(shared, site))
	if err != nil {
		return nil, err
	}
	e, err := tunnel.Listen(net.JoinHostPort(here.String(), tunnelPort), id, func(tunnel.ID) bool { return true }, log)
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	var p *tunnel.Packets
	if site == lab.RemoteDC {
		if err := os.WriteFile(filepath.Join(shared, "id"), []byte(id.ID()), 0o600); err != nil {
			return nil, err
		}
		p, err = e.AcceptPackets(ctx)
	} else {
		var listener []byte
		for len(listener) == 0 {
			time.Sleep(50 * time.Millisecond)
			listener, _ = os.ReadFile(filepath.Join(shared, "id"))
		}
		p, err = e.DialPackets(ctx, net.JoinHostPort(peer.String(), tunnelPort), tunnel.ID(listener), nil)
	}
	if err != nil {
		return nil, err
	}
	for p.MaxSize() < 1380 { // the link's MTU is 1500
		time.Sleep(50 * time.Millisecond)
	}
	return p, nil
}

// ip runs ip(8) where this process is.
func ip(args string) error {
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}
