//go:build bench

package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestDeltas moves a guest that goes over 200 MiB of its memory in a loop and
// changes a few words of each page, with a page store that holds all of it and
// without one. What is sent again is what a move of the guest takes beyond a
// move of it while it rests: five times less with the store.
func TestDeltas(t *testing.T) {
	fmt.Printf("\nguest of 448 MiB that makes small changes to 200 MiB of it in a loop, 16 MiB/s, 200 Mbit/s, 20 ms:\n")
	fmt.Printf("  %-12s %16s %16s %16s %10s\n", "page store", "at rest", "with changes", "sent again", "time")
	var again []int64
	for _, store := range []string{"0", "512MiB"} {
		again = append(again, deltas(t, store))
	}
	ratio := float64(again[0]) / float64(again[1])
	fmt.Printf("  %-12s %50.1f\n", "ratio", ratio)
	if ratio < 5 {
		t.Errorf("the page store cuts what is sent again by %.1f times, want 5 or more", ratio)
	}
}

// deltas returns the wire bytes of memory that were sent again. The other side
// allows more, which must not matter in either direction.
func deltas(t *testing.T, store string) int64 {
	w := newWorldWith(t, lab.Options{AgentConfig: map[string]string{
		lab.LocalDC:  "reduction: {memory: " + store + "}\n",
		lab.RemoteDC: "reduction: {memory: 1GiB}\n",
	}}, "200mbit", "20ms")
	const edit = 16 << 20
	v := w.vm(lab.VMOptions{Name: "web", Memory: 448 << 20, WorkingSet: 200 << 20, Edit: edit, Disks: []lab.DiskOptions{disk(t, "16MiB")}})
	for { // until all of it is what it will be but for small changes
		r, err := v.Report(t.Context(), lab.LocalDC)
		if err != nil {
			t.Fatal(err)
		}
		if r.Memory.DirtiedPages*4096 > 200<<20 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	load := func(site string, rate int64) {
		if _, err := v.Load(t.Context(), site, lab.LoadChange{Edit: &rate}); err != nil {
			t.Fatal(err)
		}
	}
	load(lab.LocalDC, 0)
	rest := w.move(lab.LocalDC, v.Name, lab.RemoteDC)
	load(lab.RemoteDC, edit)
	busy := w.move(lab.RemoteDC, v.Name, lab.LocalDC)
	w.healthy(lab.LocalDC, v)
	again := wireOf(busy) - wireOf(rest)
	const mib = 1 << 20
	fmt.Printf("  %-12s %12.1f MiB %12.1f MiB %12.1f MiB %8.1f s\n", store, float64(wireOf(rest))/mib, float64(wireOf(busy))/mib, float64(again)/mib,
		float64(busy.TotalMS)/1000)
	m := busy.Reduction.Memory
	fmt.Printf("  %12s %d rounds: %d zero, %d known, %d changed, %d new pages\n", "", busy.MemoryRounds, m.Zero.Pages, m.Reference.Pages, m.Delta.Pages, m.Data.Pages)
	return again
}

func wireOf(r migrate.Result) int64 {
	m := r.Reduction.Memory
	return m.Zero.Wire + m.Reference.Wire + m.Delta.Wire + m.Data.Wire
}
