package memsync

// Stats describes a stream so far, as of the last frame that was sent.
type Stats struct {
	StreamBytes uint64 // bytes read from QEMU
	WireBytes   uint64 // bytes of the frames sent
	Pages       uint64 // pages with content, in any encoding of QEMU's
	ZeroPages   uint64 // pages of zeros
	Parts       uint64 // parts of the RAM section; QEMU sends one per slice of a pre-copy round
	OpaqueBytes uint64 // bytes passed in opaque mode
	TailBytes   uint64 // bytes after the RAM section: device state and description

	RAMBytes    uint64 // the guest's RAM, all blocks, known from the start of the RAM section
	PageSize    uint64 // bytes
	UnseenPages uint64 // pages never sent yet: what is left of the first pass

	Tail   bool // the RAM section has ended
	Opaque bool // the stream was not understood before the RAM section's end
}

const seenChunk = 1 << 15 // pages

// block is a RAM block of the guest.
type block struct {
	pages uint64
	seen  [][]uint64 // a bitmap in chunks, made when a page in them is seen
}

func newBlock(pages uint64) *block {
	return &block{pages: pages, seen: make([][]uint64, (pages+seenChunk-1)/seenChunk)}
}

// see marks a page and tells whether it is seen for the first time.
func (b *block) see(page uint64) bool {
	chunk := &b.seen[page/seenChunk]
	if *chunk == nil {
		*chunk = make([]uint64, seenChunk/64)
	}
	word, bit := &(*chunk)[page%seenChunk/64], uint64(1)<<(page%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}
