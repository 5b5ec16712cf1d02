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

	Reduction Reduction

	Tail   bool // the RAM section has ended
	Opaque bool // the stream was not understood before the RAM section's end
}

// Count is what was sent of pages of one kind.
type Count struct {
	Pages       uint64
	StreamBytes uint64 // of QEMU's stream
	WireBytes   uint64 // of the frames, without their headers
}

func (c *Count) add(d Count) {
	c.Pages += d.Pages
	c.StreamBytes += d.StreamBytes
	c.WireBytes += d.WireBytes
}

// Reduction says as what the pages of a stream were sent. Pages that QEMU has
// encoded itself, or that a silence of QEMU cut in two, are not in it. What an
// offer took is counted with the pages that were offered.
type Reduction struct {
	Zero      Count // pages of zeros
	Reference Count // pages equal to one that the destination has in its page store
	Delta     Count // changes against a page that the destination has in its page store
	Data      Count // pages, compressed where that helps
	Disk      Count // pages that the destination found on a disk of the move
	Seed      Count // pages that it found in an image there
	Old       Count // pages that it found in an older copy of a disk
}

// kind is a kind of operation.
type kind int

const (
	kindZero kind = iota
	kindReference
	kindDelta
	kindData
	kindDisk // these three in the order of compress.Origin
	kindSeed
	kindOld
	kindOther // not a page
	kinds
)

func (r *Reduction) of(k kind) *Count {
	return [...]*Count{kindZero: &r.Zero, kindReference: &r.Reference, kindDelta: &r.Delta, kindData: &r.Data,
		kindDisk: &r.Disk, kindSeed: &r.Seed, kindOld: &r.Old}[k]
}

const seenChunk = 1 << 15 // pages

// block is a RAM block of the guest.
type block struct {
	pages uint64
	first uint64     // pages of the blocks before
	seen  [][]uint64 // a bitmap in chunks, made when a page in them is seen
	bases [][]uint32 // 1 + the slot that had a page's last content, in chunks; it may have another by now
}

func newBlock(pages, first uint64) *block {
	chunks := (pages + seenChunk - 1) / seenChunk
	return &block{pages: pages, first: first, seen: make([][]uint64, chunks), bases: make([][]uint32, chunks)}
}

// base is where the slot of a page's last content is kept, plus 1.
func (b *block) base(page uint64) *uint32 {
	chunk := &b.bases[page/seenChunk]
	if *chunk == nil {
		*chunk = make([]uint32, seenChunk)
	}
	return &(*chunk)[page%seenChunk]
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
