package blocksync

import (
	"testing"

	"pgregory.net/rapid"
)

func TestBitmap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(1, 200).Draw(t, "n")
		m, model := newBitmap(n), make([]bool, n)
		next := func(from, to int64, want bool) int64 {
			for from < to && model[from] != want {
				from++
			}
			return from
		}
		for range 20 {
			from := rapid.Int64Range(0, n).Draw(t, "from")
			to := rapid.Int64Range(from, n).Draw(t, "to")
			if got, want := m.nextSet(from, to), next(from, to, true); got != want {
				t.Fatalf("nextSet(%d, %d) = %d, want %d", from, to, got, want)
			}
			if got, want := m.nextClear(from, to), next(from, to, false); got != want {
				t.Fatalf("nextClear(%d, %d) = %d, want %d", from, to, got, want)
			}
			add := rapid.Bool().Draw(t, "add")
			var want int64
			for i := from; i < to; i++ {
				if model[i] != add {
					want++
				}
				model[i] = add
			}
			change := m.clear
			if add {
				change = m.set
			}
			if got := change(from, to); got != want {
				t.Fatalf("changed %d, want %d", got, want)
			}
			for i := range n {
				if m.get(i) != model[i] {
					t.Fatalf("%d is %v", i, m.get(i))
				}
			}
		}
	})
}
