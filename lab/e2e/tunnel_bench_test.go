//go:build bench

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/netredirect/encap"
	"github.com/wanmig/wanmig/tunnel"
)

// Addresses inside the tunnel, and its device.
const (
	tunnelLocal  = "10.99.0.1"
	tunnelRemote = "10.99.0.2"
	tunnelDevice = "wmbench"
	tunnelPort   = "7700"
)

// TestQUICTunnel measures a TCP flow between the data centres, plainly and through
// a tunnel of QUIC datagrams, over the same link in the same run.
func TestQUICTunnel(t *testing.T) {
	w := newWorld(t, "100mbit", "50ms")
	keys := t.TempDir()
	remote := w.Sites[lab.RemoteDC].AgentAddr.Addr().String()
	w.background(lab.RemoteDC, "iperf3", "-s")
	ends := []*tunnelEnd{
		w.tunnelEnd(lab.RemoteDC, keys, remote),
		w.tunnelEnd(lab.LocalDC, keys, remote),
	}
	for _, e := range ends {
		e.await(t)
	}
	fmt.Printf("\none TCP flow for 10 s at 100 Mbit/s, 50 ms, Mbit/s:\n  %-8s %8s %8s %8s\n", "", "plain", "tunnel", "ratio")
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

func (w *world) tunnelEnd(site, keys, listener string) *tunnelEnd {
	w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	w.background(site, self, tunnelEndName, site, keys, listener)
	return &tunnelEnd{filepath.Join(keys, site+".ready")}
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
	site, keys, listener := args[0], args[1], args[2]
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx := context.Background()
	id, err := tunnel.LoadOrCreateIdentity(filepath.Join(keys, site))
	if err != nil {
		return err
	}
	listens := site == lab.RemoteDC
	listen := ":" + tunnelPort
	if listens {
		listen = listener + listen
	}
	e, err := tunnel.Listen(listen, id, func(tunnel.ID) bool { return true }, log)
	if err != nil {
		return err
	}
	defer e.Close()
	local, remote := netip.MustParseAddr(tunnelLocal), netip.MustParseAddr(tunnelRemote)
	var p *tunnel.Packets
	if listens {
		local, remote = remote, local
		if err := os.WriteFile(filepath.Join(keys, "id"), []byte(id.ID()), 0o600); err != nil {
			return err
		}
		p, err = e.AcceptPackets(ctx)
	} else {
		var peer []byte
		for len(peer) == 0 {
			time.Sleep(50 * time.Millisecond)
			peer, _ = os.ReadFile(filepath.Join(keys, "id"))
		}
		p, err = e.DialPackets(ctx, listener+":"+tunnelPort, tunnel.ID(peer), nil)
	}
	if err != nil {
		return err
	}
	for p.MaxSize() < 1380 { // the link's MTU is 1500
		time.Sleep(50 * time.Millisecond)
	}
	gate := encap.NewGate()
	gate.Set([]netip.Addr{local}, []netip.Addr{remote})
	t, err := encap.OpenDatagrams(encap.Config{Name: tunnelDevice, MTU: p.MaxSize(), Local: local, Remote: remote, Gate: gate, Log: log})
	if err != nil {
		return err
	}
	defer t.Close()
	t.Attach(p)
	ip := fmt.Sprintf("addr add %s peer %s dev %s", local, remote, tunnelDevice)
	if out, err := exec.Command("ip", strings.Fields(ip)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", ip, err, out)
	}
	if err := os.WriteFile(filepath.Join(keys, site+".ready"), nil, 0o600); err != nil {
		return err
	}
	<-p.Done()
	return p.Err()
}
