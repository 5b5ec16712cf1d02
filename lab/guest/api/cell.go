package api

import (
	"fmt"
	"math/bits"
	"unsafe"
)

// Sizes of cells: a page of memory and a block on disk.
const (
	PageSize  = 4096
	BlockSize = 64 << 10
)

// Cell names the content of a page or block: all of its bytes follow from these four numbers, so that an error can be
// described exactly. In memory a cell is little-endian 64-bit words:
//
//	word 0          kind
//	word 1          index
//	word 2          generation
//	word 3          seed
//	word 4 to n-2   payload: a fifth noise, the rest words of text; about 3:1 by zstd, like memory in use
//	word n-1        checksum of words 0 to n-2
//
// The payload of an edited page is the same in all generations but for a few words.
type Cell struct {
	Kind       uint64
	Index      uint64 // the page's or slot's number
	Generation uint64 // times the page was written, or the block's sequence number
	Seed       uint64
}

// The kinds of cell.
const (
	PageCell  uint64 = 0x6567615062616c77
	BlockCell uint64 = 0x6b636f4c62616c77
	FileCell  uint64 = 0x656c694662616c77
	EditCell  uint64 = 0x7469644562616c77 // an edited page
)

// edits is how many words of an edited page follow from its generation.
const edits = 4

// The text: every word is one of 16 beginnings and one of 16 ends.
var text = func() (t [256]uint64) {
	heads := []string{"the ", "from", "into", "over", "with", "ship", "port", "gate", "road", "mail", "page", "disk", "host", "wire", "link", "time"}
	tails := []string{" sea", " is ", "ward", "ing ", " and", "less", ".\n  ", " to ", "ers ", ", a ", "ful ", " of ", " at ", "; it", " or ", "ed, "}
	for i := range t {
		t[i] = *(*uint64)(unsafe.Pointer(&[]byte(heads[i>>4] + tails[i&15])[0]))
	}
	return t
}()

// Words is the view of p as words. It panics unless p is aligned to 8 bytes and whole words long.
func Words(p []byte) []uint64 {
	if len(p) == 0 || len(p)%8 != 0 || uintptr(unsafe.Pointer(&p[0]))%8 != 0 {
		panic("cell is not made of words")
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&p[0])), len(p)/8)
}

// next is a step of SplitMix64.
func next(state *uint64) uint64 {
	*state += 0x9e3779b97f4a7c15
	z := *state
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// Fill writes the cell's content to w.
func (c Cell) Fill(w []uint64) {
	last := len(w) - 1
	w[0], w[1], w[2], w[3] = c.Kind, c.Index, c.Generation, c.Seed
	base := c.Generation
	if c.Kind == EditCell {
		base = 0
	}
	state := c.Kind ^ bits.RotateLeft64(c.Index, 17) ^ bits.RotateLeft64(base, 39) ^ c.Seed
	next(&state)
	i := 4
	for ; i < 4+last/5; i++ {
		w[i] = next(&state)
	}
	for i < last {
		r := next(&state)
		for n := 0; n < 8 && i < last; n++ {
			w[i] = text[r&255]
			r >>= 8
			i++
		}
	}
	if c.Kind == EditCell {
		state ^= c.Generation
		for range edits {
			w[4+next(&state)%uint64(last-4)] = next(&state)
		}
	}
	w[last] = sum(w[:last])
}

// sum is a checksum that any change of a single word changes: each step is a bijection of the state and of the word.
func sum(w []uint64) uint64 {
	h := uint64(len(w))
	for _, v := range w {
		h = bits.RotateLeft64(h^v, 29) * 0x9e3779b97f4a7c15
	}
	return h
}

// Matches says whether w is exactly what Fill would write, but for collisions of the checksum.
func (c Cell) Matches(w []uint64) bool {
	last := len(w) - 1
	return w[0] == c.Kind && w[1] == c.Index && w[2] == c.Generation && w[3] == c.Seed && w[last] == sum(w[:last])
}

// Diagnose says in what w differs from the cell, having not matched: it holds another whole cell, or its bytes are
// damaged.
func (c Cell) Diagnose(w []uint64) string {
	last := len(w) - 1
	if found := (Cell{w[0], w[1], w[2], w[3]}); found != c && w[last] == sum(w[:last]) {
		switch {
		case found.Kind != c.Kind || found.Seed != c.Seed:
			return fmt.Sprintf("%d: expected generation %d, holds something of another origin", c.Index, c.Generation)
		case found.Index != c.Index:
			return fmt.Sprintf("%d: expected generation %d, holds %d of generation %d", c.Index, c.Generation, found.Index, found.Generation)
		case found.Generation < c.Generation:
			return fmt.Sprintf("%d: expected generation %d, holds the stale generation %d", c.Index, c.Generation, found.Generation)
		default:
			return fmt.Sprintf("%d: expected generation %d, holds the later generation %d", c.Index, c.Generation, found.Generation)
		}
	}
	want := make([]uint64, len(w))
	c.Fill(want)
	damaged, first := 0, 0
	for i := range w {
		for d := w[i] ^ want[i]; d != 0; {
			at := bits.TrailingZeros64(d) / 8
			if damaged == 0 {
				first = i*8 + at
			}
			damaged++
			d &^= 0xff << (8 * at)
		}
	}
	shift := 8 * (first % 8)
	return fmt.Sprintf("%d: generation %d damaged in %d of %d bytes, first at offset %d: %#02x instead of %#02x", c.Index, c.Generation,
		damaged, len(w)*8, first, byte(w[first/8]>>shift), byte(want[first/8]>>shift))
}
