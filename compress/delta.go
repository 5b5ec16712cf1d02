package compress

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
)

// A delta says how a block differs from an older version of the same size. It
// is a list of changes, each
//
//	uvarint  bytes that are the same
//	uvarint  n, at least 1: bytes that differ
//	n bytes  old XOR new
//
// What follows the last change is the same. Equal blocks have an empty delta.
// A uvarint is that of encoding/binary, in any of its forms.

// ErrDelta is returned when a delta is malformed or belongs to a block of
// another size.
var ErrDelta = errors.New("bad delta")

// joined is the number of equal bytes between two changes from which on they
// are written apart: a change costs two bytes or more beside its content.
const joined = 4

// AppendDelta appends the delta that turns old into new, blocks of one size, to
// dst. It gives up, with dst unchanged and false, on a delta of more than limit
// bytes.
func AppendDelta(dst, old, new []byte, limit int) ([]byte, bool) {
	start := len(dst)
	for at := 0; ; {
		from := nextDifference(old, new, at)
		if from == len(new) {
			return dst, true
		}
		stop := min(len(new), from+limit+joined) // a longer change is more than the limit
		end := nextEquality(old[:stop], new[:stop], from)
		dst = binary.AppendUvarint(dst, uint64(from-at))
		dst = binary.AppendUvarint(dst, uint64(end-from))
		if len(dst)-start+end-from > limit {
			return dst[:start], false
		}
		n := len(dst)
		dst = slices.Grow(dst, end-from)[:n+end-from]
		subtle.XORBytes(dst[n:], old[from:end], new[from:end])
		at = end
	}
}

// nextDifference returns where, from at on, a and b first differ.
func nextDifference(a, b []byte, at int) int {
	const step = 128 // the best of 64 to 512 on pages with 1 and with 20 changed words
	for len(a)-at >= step && bytes.Equal(a[at:at+step], b[at:at+step]) {
		at += step
	}
	for ; len(a)-at >= 8; at += 8 {
		if x := binary.LittleEndian.Uint64(a[at:]) ^ binary.LittleEndian.Uint64(b[at:]); x != 0 {
			return at + bits.TrailingZeros64(x)/8
		}
	}
	for at < len(a) && a[at] == b[at] {
		at++
	}
	return at
}

// nextEquality returns where, from at on, a and b first have joined equal bytes
// or the equal bytes at their end.
func nextEquality(a, b []byte, at int) int {
	equal := 0
	for ; at < len(a) && equal < joined; at++ {
		if a[at] == b[at] {
			equal++
		} else {
			equal = 0
		}
	}
	return at - equal
}

// ApplyDelta turns block, which holds the old version, into the new one. After
// an error block holds anything.
func ApplyDelta(block, delta []byte) error {
	for len(delta) > 0 {
		same, n := binary.Uvarint(delta)
		if n <= 0 || same > uint64(len(block)) {
			return fmt.Errorf("%w: a change begins beyond the block", ErrDelta)
		}
		block, delta = block[same:], delta[n:]
		changed, n := binary.Uvarint(delta)
		if n <= 0 || changed == 0 || changed > uint64(len(block)) || changed > uint64(len(delta)-n) {
			return fmt.Errorf("%w: a change is cut short, empty or ends beyond the block", ErrDelta)
		}
		delta = delta[n:]
		subtle.XORBytes(block, block[:changed], delta)
		block, delta = block[changed:], delta[changed:]
	}
	return nil
}
