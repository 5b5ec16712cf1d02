//go:build bench

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// row is one migration as the world outside saw it: the link's counters, a
// clock, and a client that asks the guest for an echo every 2 ms.
type row struct {
	tool     string
	took     time.Duration
	sent     uint64 // IP bytes
	received uint64 // IP bytes, back to where the guest was
	downtime time.Duration
	result   migrate.Result // wanmig's
}

func (r row) bytes() uint64 { return r.sent + r.received }

// TestSideBySide migrates the same guest with virsh and with wanmig, over the
// same link in the same run, to freshly made disks, and prints what each took.
func TestSideBySide(t *testing.T) {
	w := newWorld(t, "100mbit", "50ms")
	for _, guest := range []struct {
		name string
		o    lab.VMOptions
	}{
		{"idle", lab.VMOptions{}},
		{"busy", lab.VMOptions{Dirty: 4 << 20, Write: 1 << 20, WorkingSet: 32 << 20}},
	} {
		var rows []row
		for _, tool := range []string{"virsh", "wanmig"} {
			o := guest.o
			o.Name, o.Memory = guest.name, 512<<20
			o.Disks = []lab.DiskOptions{disk(t, "1GiB")}
			v := w.vm(o)
			rows = append(rows, w.measure(v, tool, lab.LocalDC, lab.RemoteDC))
			w.healthy(lab.RemoteDC, v)
			if err := v.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		peer, ours := rows[0], rows[1]
		fmt.Printf("\n%s guest of 512 MiB with a disk of 1 GiB, 100 Mbit/s, 50 ms:\n", guest.name)
		fmt.Printf("  %-8s %10s %14s %12s\n", "", "time", "bytes sent", "downtime")
		for _, r := range rows {
			fmt.Printf("  %-8s %8.1f s %10.1f MiB %9d ms\n", r.tool, r.took.Seconds(), float64(r.bytes())/(1<<20), r.downtime.Milliseconds())
		}
		fmt.Printf("  %-8s %10.2f %14.2f %12.2f\n", "ratio", ours.took.Seconds()/peer.took.Seconds(),
			float64(ours.bytes())/float64(peer.bytes()), ours.downtime.Seconds()/peer.downtime.Seconds())
		if ours.took >= peer.took || ours.bytes()*2 > peer.bytes() || ours.downtime >= peer.downtime {
			t.Errorf("%s guest: wanmig is not faster with at most half the bytes and a shorter downtime", guest.name)
		}
	}
}

// measure migrates a guest with a tool. args are wanmig's.
func (w *world) measure(v *lab.VM, tool, from, to string, args ...string) row {
	w.t.Helper()
	ctx := w.t.Context()
	probe, err := v.StartProbe(ctx, 2*time.Millisecond)
	if err != nil {
		w.t.Fatal(err)
	}
	time.Sleep(2 * time.Second) // the echoes' own first answers
	sent, received := w.carried(from), w.carried(to)
	begun := time.Now()
	var result migrate.Result
	if tool == "virsh" {
		w.virshMigrate(ctx, v, from, to)
	} else {
		result = w.move(from, v.Name, to, args...)
	}
	r := row{tool: tool, took: time.Since(begun), sent: w.carried(from) - sent, received: w.carried(to) - received, result: result}
	time.Sleep(2 * time.Second)
	seen, err := probe.Stop()
	if err != nil {
		w.t.Fatal(err)
	}
	if len(seen.Switches) != 1 {
		w.t.Fatalf("%s: the guest answered at one site after the other %d times: %+v", tool, len(seen.Switches), seen)
	}
	r.downtime = seen.Switches[0].Length
	return r
}

// carried is how many IP bytes from a site the link has carried.
func (w *world) carried(site string) uint64 {
	w.t.Helper()
	state, err := w.LinkState(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return state.Counters[site].Bytes
}

// virshMigrate is what an operator types today. virsh makes no disks at the
// destination where no storage pool is defined: they are made first.
func (w *world) virshMigrate(ctx context.Context, v *lab.VM, from, to string) {
	w.t.Helper()
	for _, path := range v.Disks {
		out, err := exec.Command("qemu-img", "info", "-U", "--output=json", w.path(from, path)).Output()
		var info struct {
			Size   int64 `json:"virtual-size"`
			Format string
		}
		if err == nil {
			err = json.Unmarshal(out, &info)
		}
		if err != nil {
			w.t.Fatal(err)
		}
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", info.Format, w.path(to, path), fmt.Sprint(info.Size)).CombinedOutput(); err != nil {
			w.t.Fatalf("qemu-img create: %v: %s", err, out)
		}
	}
	remote := w.Sites[to]
	cmd, err := w.Command(ctx, from, "virsh", "migrate", "--live", "--copy-storage-all", "--persistent", "--undefinesource",
		v.Name, remote.LibvirtURI, "tcp://"+remote.WANAddr.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("virsh migrate: %v: %s", err, strings.TrimSpace(string(out)))
	}
}
