//go:build !race

package compress

import (
	"runtime/debug"
	"testing"
)

// zstd keeps tables in a sync.Pool, which a collection empties and the race
// detector makes forget at random.
func TestNoAllocations(t *testing.T) {
	b := table(64 << 10)
	enc, dec := make([]byte, 0, 1<<20), make([]byte, 0, 1<<20)
	block := func() {
		var m Method
		var err error
		enc, m = normally.Encode(enc[:0], b)
		if dec, err = Decode(dec[:0], m, enc, len(b)); err != nil {
			t.Fatal(err)
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for range 20 { // every core's state grows to its size once
		block()
	}
	got := testing.AllocsPerRun(50, block)
	if got >= 1 {
		t.Errorf("%v allocations per block", got)
	}
}
