package blocksync

import "math/bits"

// bitmap is a fixed set of small integers. Ranges are half open.
type bitmap []uint64

func newBitmap(n int64) bitmap { return make(bitmap, (n+63)/64) }

func (m bitmap) get(i int64) bool { return m[i/64]>>(i%64)&1 != 0 }

// word returns the bits of [from, to) that lie in from's word, and where the
// next word begins.
func word(from, to int64) (mask uint64, next int64) {
	mask = ^uint64(0) << (from % 64)
	next = (from/64 + 1) * 64
	if to < next {
		mask &= ^uint64(0) >> (next - to)
		next = to
	}
	return mask, next
}

// set adds a range and returns how many of it were not there before.
func (m bitmap) set(from, to int64) (added int64) {
	for from < to {
		mask, next := word(from, to)
		added += int64(bits.OnesCount64(mask &^ m[from/64]))
		m[from/64] |= mask
		from = next
	}
	return added
}

// clear removes a range and returns how many of it were there before.
func (m bitmap) clear(from, to int64) (removed int64) {
	for from < to {
		mask, next := word(from, to)
		removed += int64(bits.OnesCount64(mask & m[from/64]))
		m[from/64] &^= mask
		from = next
	}
	return removed
}

// count returns how many of the first n are members.
func (m bitmap) count(n int64) (count int64) {
	for i := m.nextSet(0, n); i < n; i = m.nextSet(i, n) {
		end := m.nextClear(i, n)
		count += end - i
		i = end
	}
	return count
}

// nextSet returns the first member of [from, to), or to.
func (m bitmap) nextSet(from, to int64) int64 {
	for from < to {
		mask, next := word(from, to)
		if w := m[from/64] & mask; w != 0 {
			return from/64*64 + int64(bits.TrailingZeros64(w))
		}
		from = next
	}
	return to
}

// nextClear returns the first of [from, to) that is not a member, or to.
func (m bitmap) nextClear(from, to int64) int64 {
	for from < to {
		mask, next := word(from, to)
		if w := ^m[from/64] & mask; w != 0 {
			return from/64*64 + int64(bits.TrailingZeros64(w))
		}
		from = next
	}
	return to
}
