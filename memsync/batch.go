package memsync

import (
	"encoding/binary"

	"github.com/wanmig/wanmig/compress"
)

// batch collects operations until they are sent as one frame.
type batch struct {
	pageBits uint8
	sections [sections][]byte
	stream   int    // stream bytes that the operations stand for
	crc      uint32 // of these
	last     int    // where the last operation begins in its section
	next     uint64 // the word that would extend the last operation, a run of zero pages

	bytes  [kinds]int // of the operations
	counts Reduction  // of the pages, without what their operations and contents take

	hurry    bool // the guest may be stopped any time
	asks     bool // pages are offered
	offered  []offered
	found    []compress.Origin // of what is offered, when it is answered
	answered chan struct{}     // receives then
	awaited  bool              // the one that reads the stream waits for sent
	sent     chan struct{}     // receives when the batch and all before it are sent, if awaited
}

// offered is a page of a batch that the destination may hold.
type offered struct {
	sum     compress.Fingerprint
	op      int // where its operation is in its section
	length  int // of the operation
	content int // where its content is in its section
}

func newBatch() *batch {
	b := &batch{pageBits: defaultPageBits, answered: make(chan struct{}, 1), sent: make(chan struct{}, 1),
		offered: make([]offered, 0, maxOffered), found: make([]compress.Origin, 0, maxOffered)}
	b.sections[sectionOps] = make([]byte, 0, maxOffered*deltaOverhead)
	b.sections[sectionContents] = make([]byte, 0, most[sectionContents])
	return b
}

// reset empties the batch.
func (b *batch) reset() {
	for i := range b.sections {
		b.sections[i] = b.sections[i][:0]
	}
	b.stream, b.bytes, b.counts = 0, [kinds]int{}, Reduction{}
	b.asks, b.offered, b.found, b.awaited = false, b.offered[:0], b.found[:0], false
}

// fits tells whether the batch has room for n more bytes of the stream.
func (b *batch) fits(n int) bool { return b.stream+n <= maxStream }

func (b *batch) lastIs(op byte) bool { return b.stream > 0 && b.sections[sectionOps][b.last] == op }

func (b *batch) addBytes(p []byte) {
	ops := b.sections[sectionOps]
	if !b.lastIs(opBytes) {
		b.last = len(ops)
		ops = append(ops, opBytes, 0, 0, 0, 0)
		b.bytes[kindOther] += sizeOverhead
	}
	ops = append(ops, p...)
	binary.BigEndian.PutUint32(ops[b.last+1:], uint32(len(ops)-b.last-sizeOverhead))
	b.sections[sectionOps] = ops
	b.bytes[kindOther] += len(p)
	b.stream += len(p)
}

// addZero takes the word of a zero page and the record's block, empty if the
// record continues the block of the one before.
func (b *batch) addZero(word uint64, block []byte) {
	ops := b.sections[sectionOps]
	extends := b.lastIs(opZero) && b.next == word
	b.count(kindZero, 8+len(block)+1)
	if extends {
		count := ops[b.last+9:]
		binary.BigEndian.PutUint32(count, binary.BigEndian.Uint32(count)+1)
		b.next += 1 << b.pageBits
		return
	}
	b.begin(kindZero, opZero, word)
	b.number(1)
	b.finish(kindZero, block)
	b.next = 0 // no word of a zero page
	if len(block) == 0 {
		b.next = word + 1<<b.pageBits
	}
}

// addPage takes a page that is not kept.
func (b *batch) addPage(word uint64, block, page []byte) {
	b.count(kindData, 8+len(block)+len(page))
	b.begin(kindData, opPage, word)
	b.finish(kindData, block)
	b.sections[sectionContents] = append(b.sections[sectionContents], page...)
}

// addKept takes a page that goes to a slot of the page store.
func (b *batch) addKept(word uint64, slot uint32, block, page []byte) {
	b.count(kindData, 8+len(block)+len(page))
	b.begin(kindData, opKeep, word)
	b.number(slot)
	b.finish(kindData, block)
	b.sections[sectionContents] = append(b.sections[sectionContents], page...)
}

// offer notes that the page of the last operation, which is kept, is offered.
func (b *batch) offer(sum compress.Fingerprint) {
	b.offered = append(b.offered, offered{sum: sum, op: b.last, length: len(b.sections[sectionOps]) - b.last,
		content: len(b.sections[sectionContents]) - storePage})
}

// resolve takes out the content of the offered pages that were found.
func (b *batch) resolve() {
	ops, contents := b.sections[sectionOps], b.sections[sectionContents]
	n, from := 0, 0
	for i, o := range b.offered {
		k := kindData + kind(b.found[i])
		b.counts.of(k).WireBytes += uint64(sumSize)
		if k == kindData {
			continue
		}
		ops[o.op] = opHeld
		n += copy(contents[n:], contents[from:o.content])
		from = o.content + storePage
		record := uint64(8 + o.length - keepOverhead + storePage)
		data, held := &b.counts.Data, b.counts.of(k)
		data.Pages, data.StreamBytes = data.Pages-1, data.StreamBytes-record
		held.Pages, held.StreamBytes = held.Pages+1, held.StreamBytes+record
		b.bytes[kindData] -= o.length
		b.bytes[k] += o.length
	}
	n += copy(contents[n:], contents[from:])
	b.sections[sectionContents] = contents[:n]
}

// addReference takes a page that is in a slot of the page store.
func (b *batch) addReference(word uint64, slot uint32, block []byte) {
	b.count(kindReference, 8+len(block)+storePage)
	b.begin(kindReference, opReference, word)
	b.number(slot)
	b.finish(kindReference, block)
}

// tryDelta puts the delta of a page against its old content at the end of the
// deltas. It returns its length; false, with nothing changed, if it is too long.
func (b *batch) tryDelta(old, page []byte) (int, bool) {
	before := len(b.sections[sectionDeltas])
	var ok bool
	b.sections[sectionDeltas], ok = compress.AppendDelta(b.sections[sectionDeltas], old, page, maxDelta)
	return len(b.sections[sectionDeltas]) - before, ok
}

// addDelta takes the page of the delta that tryDelta made.
func (b *batch) addDelta(word uint64, slot, base uint32, length int, block []byte) {
	b.count(kindDelta, 8+len(block)+storePage)
	b.begin(kindDelta, opDelta, word)
	b.number(slot)
	b.number(base)
	b.sections[sectionOps] = binary.BigEndian.AppendUint16(b.sections[sectionOps], uint16(length))
	b.finish(kindDelta, block)
}

func (b *batch) begin(k kind, op byte, word uint64) {
	b.last = len(b.sections[sectionOps])
	b.sections[sectionOps] = binary.BigEndian.AppendUint64(append(b.sections[sectionOps], op), word)
}

func (b *batch) number(n uint32) {
	b.sections[sectionOps] = binary.BigEndian.AppendUint32(b.sections[sectionOps], n)
}

// finish ends an operation with its block.
func (b *batch) finish(k kind, block []byte) {
	b.sections[sectionOps] = append(b.sections[sectionOps], block...)
	b.bytes[k] += len(b.sections[sectionOps]) - b.last
}

// count notes a page whose record has n bytes of the stream.
func (b *batch) count(k kind, n int) {
	b.stream += n
	c := b.counts.of(k)
	c.Pages++
	c.StreamBytes += uint64(n)
}

// press makes batches frames.
type press struct {
	encode func(dst, src []byte) ([]byte, compress.Method)
	frame  []byte
	counts Reduction // of all batches
}

// seal returns the frame of a batch, valid until the next call.
func (p *press) seal(b *batch) []byte {
	kind := byte(frameBatch)
	if len(b.offered) > 0 {
		kind = frameUse
		b.resolve()
	}
	f := append(p.frame[:0], kind, b.pageBits)
	f = binary.BigEndian.AppendUint32(f, b.crc)
	var wire [sections]int
	for i, src := range b.sections {
		head := len(f)
		f = append(f, make([]byte, sectionHeader)...)
		var method compress.Method
		f, method = p.encode(f, src)
		wire[i] = len(f) - head - sectionHeader
		f[head] = byte(method)
		binary.BigEndian.PutUint32(f[head+1:], uint32(len(src)))
		binary.BigEndian.PutUint32(f[head+5:], uint32(wire[i]))
	}
	p.frame = f
	p.account(b, wire)
	return f
}

// account adds a batch to the counts. Operations of all kinds are compressed
// together: each kind has its part of their wire bytes by its part of their
// bytes.
func (p *press) account(b *batch, wire [sections]int) {
	b.counts.Delta.WireBytes += uint64(wire[sectionDeltas])
	b.counts.Data.WireBytes += uint64(wire[sectionContents])
	ops := len(b.sections[sectionOps])
	for k := range kindOther {
		if ops > 0 {
			b.counts.of(k).WireBytes += uint64(wire[sectionOps] * b.bytes[k] / ops)
		}
		p.counts.of(k).add(*b.counts.of(k))
	}
}
