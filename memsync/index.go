package memsync

import (
	"bytes"
	"hash/maphash"
	"math/bits"
)

// index is what the source knows of the page store: which slot has which
// content, and for which page of the guest it was written last. No two slots
// have the same content. It takes 15 to 17 bytes a slot, in arrays without
// pointers; block.bases takes 4 more for each page of the guest.
//
// Contents are found by a keyed hash and then compared byte for byte, so the
// hash decides nothing but speed, and a guest can't aim at it. On 4 KiB, one
// core of an EPYC with SHA-NI, MB/s: maphash 10,700, SHA-256 1650 to 1730, BLAKE3
// (zeebo/blake3) 1400 to 1760; to compare adds less than a microsecond a page.
//
// A full store replaces by second chance: in the order of the slots, passing
// once over those that were of use since the last time.
type index struct {
	*store
	seed   maphash.Seed
	shift  uint8    // of a tag, to its chain
	chains []uint32 // 1 + the first slot of a chain, by the tag's upper bits
	next   []uint32 // 1 + the next slot of the chain, by slot
	tags   []uint32 // hash of the content, by slot
	owners []uint32 // the page that the slot was written for, by slot
	useful []bool   // referred to, or written again, since the hand passed
	hand   uint32   // the slot to be replaced next
}

func newIndex(s *store) *index {
	size := bits.Len32(s.slots) - 1 // the power of two that is not more
	return &index{
		store:  s,
		seed:   maphash.MakeSeed(),
		shift:  uint8(32 - size),
		chains: make([]uint32, 1<<size),
		next:   make([]uint32, s.slots),
		tags:   make([]uint32, s.slots),
		owners: make([]uint32, s.slots),
		useful: make([]bool, s.slots),
	}
}

func (x *index) tag(page []byte) uint32 { return uint32(maphash.Bytes(x.seed, page)) }

// find returns the slot that has this content.
func (x *index) find(tag uint32, page []byte) (slot uint32, found bool) {
	for n := x.chains[tag>>x.shift]; n != 0; n = x.next[n-1] {
		if x.tags[n-1] == tag && bytes.Equal(x.page(n-1), page) {
			return n - 1, true
		}
	}
	return 0, false
}

// slotFor returns the slot that the new content of a page goes to: base, which
// has its last one, if it was written for that page, else another.
func (x *index) slotFor(owner uint32, base uint32, hasBase bool) uint32 {
	switch {
	case hasBase && x.owners[base] == owner:
		x.useful[base] = true
		x.unlink(base)
		return base
	case x.filled < x.slots:
		return x.filled
	}
	for x.useful[x.hand] {
		x.useful[x.hand] = false
		x.advance()
	}
	slot := x.hand
	x.advance()
	x.unlink(slot)
	return slot
}

func (x *index) advance() {
	if x.hand++; x.hand == x.slots {
		x.hand = 0
	}
}

// insert writes content that is in no slot into one that slotFor gave.
func (x *index) insert(slot, owner, tag uint32, page []byte) {
	x.put(slot, page)
	chain := &x.chains[tag>>x.shift]
	x.tags[slot], x.owners[slot], x.next[slot] = tag, owner, *chain
	*chain = slot + 1
}

// unlink takes a filled slot out of its chain.
func (x *index) unlink(slot uint32) {
	link := &x.chains[x.tags[slot]>>x.shift]
	for *link != slot+1 {
		link = &x.next[*link-1]
	}
	*link = x.next[slot]
}
