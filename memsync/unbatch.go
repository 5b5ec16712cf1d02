package memsync

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/wanmig/wanmig/compress"
)

// unbatch decodes batch frames into stream bytes. It has the destination's page
// store.
type unbatch struct {
	store    *store
	decoded  [sections][]byte // of the current batch, their memory used again
	rest     [sections][]byte // what is left of them
	pageSize int              // in the current batch
	held     []byte           // what is left of the pages that were found for it
	out      []byte
}

// newUnbatch takes address space for a page store of slots pages. close gives
// it back.
func newUnbatch(slots uint32) (*unbatch, error) {
	s, err := newStore(slots)
	if err != nil {
		return nil, err
	}
	return &unbatch{store: s}, nil
}

func (u *unbatch) close() error { return u.store.close() }

// decode returns the stream bytes of a batch frame, valid until the next call.
// After an error the page store is not the source's any more.
func (u *unbatch) decode(frame []byte) ([]byte, error) {
	if len(frame) < batchHeader {
		return nil, fmt.Errorf("%w: batch of %d bytes", ErrFrame, len(frame))
	}
	bits := frame[1]
	if bits < minPageBits || bits > maxPageBits {
		return nil, fmt.Errorf("%w: batch with pages of %d bits", ErrFrame, bits)
	}
	u.pageSize = 1 << bits
	if err := u.unpack(frame[batchHeader:]); err != nil {
		return nil, err
	}
	u.out = slices.Grow(u.out[:0], maxStream)
	for len(u.rest[sectionOps]) > 0 {
		if err := u.expand(); err != nil {
			return nil, err
		}
	}
	if n := len(u.rest[sectionDeltas]) + len(u.rest[sectionContents]) + len(u.held); n > 0 || len(u.out) == 0 {
		return nil, fmt.Errorf("%w: batch of %d stream bytes, %d bytes belong to no operation", ErrFrame, len(u.out), n)
	}
	if crc := crc32.Checksum(u.out, castagnoli); crc != binary.BigEndian.Uint32(frame[2:]) {
		return nil, fmt.Errorf("%w: the %d stream bytes of a batch have another checksum than at the source", ErrFrame, len(u.out))
	}
	return u.out, nil
}

// unpack decodes the sections of a batch, which are all of p.
func (u *unbatch) unpack(p []byte) error {
	for i := range u.decoded {
		if len(p) < sectionHeader {
			return fmt.Errorf("%w: batch is cut short", ErrFrame)
		}
		method, size, n := compress.Method(p[0]), binary.BigEndian.Uint32(p[1:]), binary.BigEndian.Uint32(p[5:])
		p = p[sectionHeader:]
		if size > most[i] || uint64(n) > uint64(len(p)) {
			return fmt.Errorf("%w: batch section %d of %d bytes, %d when decoded, allowed are %d", ErrFrame, i, n, size, most[i])
		}
		var err error
		if u.decoded[i], err = compress.Decode(u.decoded[i][:0], method, p[:n], int(size)); err != nil {
			return fmt.Errorf("%w: %w", ErrFrame, err)
		}
		u.rest[i] = u.decoded[i]
		p = p[n:]
	}
	if len(p) > 0 {
		return fmt.Errorf("%w: %d bytes after a batch", ErrFrame, len(p))
	}
	return nil
}

// expand appends the stream bytes of the next operation to u.out.
func (u *unbatch) expand() error {
	op := u.rest[sectionOps][0]
	switch op {
	case opBytes:
		b, err := u.take(op, sectionOps, sizeOverhead)
		if err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(b[1:])
		if b, err = u.take(op, sectionOps, int(n)); err != nil {
			return err
		}
		return u.put(b)
	case opZero:
		return u.expandZero()
	case opPage:
		return u.expandPage(op, pageOverhead)
	case opKeep, opReference, opHeld:
		return u.expandPage(op, keepOverhead)
	case opDelta:
		return u.expandPage(op, deltaOverhead)
	}
	return fmt.Errorf("%w: unknown operation %#02x", ErrFrame, op)
}

// take returns the next n bytes of a section.
func (u *unbatch) take(op byte, section, n int) ([]byte, error) {
	p := u.rest[section]
	if n < 0 || n > len(p) {
		return nil, fmt.Errorf("%w: operation %#02x is cut short", ErrFrame, op)
	}
	u.rest[section] = p[n:]
	return p[:n], nil
}

// put appends stream bytes to u.out.
func (u *unbatch) put(p []byte) error {
	if len(p) > maxStream-len(u.out) {
		return fmt.Errorf("%w: batch stands for more than %d stream bytes", ErrFrame, maxStream)
	}
	u.out = append(u.out, p...)
	return nil
}

func (u *unbatch) expandZero() error {
	head, err := u.take(opZero, sectionOps, runOverhead)
	if err != nil {
		return err
	}
	word, count := binary.BigEndian.Uint64(head[1:]), binary.BigEndian.Uint32(head[9:])
	block, err := u.block(opZero, word, flagZero)
	if err != nil {
		return err
	}
	record := 8 + len(block) + 1
	if count == 0 || len(block) > 0 && count != 1 || int64(count)*int64(record) > int64(maxStream-len(u.out)) {
		return fmt.Errorf("%w: run of %d zero pages", ErrFrame, count)
	}
	for range count {
		u.out = binary.BigEndian.AppendUint64(u.out, word)
		u.out = append(u.out, block...)
		u.out = append(u.out, 0)
		word += uint64(u.pageSize)
	}
	return nil
}

// expandPage appends the record of a page whose operation has so many bytes
// before its block.
func (u *unbatch) expandPage(op byte, overhead int) error {
	head, err := u.take(op, sectionOps, overhead)
	if err != nil {
		return err
	}
	word := head[1:pageOverhead]
	block, err := u.block(op, binary.BigEndian.Uint64(word), flagPage)
	if err != nil {
		return err
	}
	if len(word)+len(block)+u.pageSize > maxStream-len(u.out) {
		return fmt.Errorf("%w: batch stands for more than %d stream bytes", ErrFrame, maxStream)
	}
	u.out = append(append(u.out, word...), block...)
	if op == opPage {
		page, err := u.take(op, sectionContents, u.pageSize)
		u.out = append(u.out, page...)
		return err
	}
	if u.pageSize != storePage {
		return fmt.Errorf("%w: operation %#02x with pages of %d bytes", ErrFrame, op, u.pageSize)
	}
	return u.expandStored(op, head)
}

// expandStored appends a page of an operation that uses the page store.
func (u *unbatch) expandStored(op byte, head []byte) error {
	slot := binary.BigEndian.Uint32(head[pageOverhead:])
	if op == opReference {
		if !u.store.holds(slot) {
			return fmt.Errorf("%w: reference to slot %d of %d", ErrFrame, slot, u.store.filled)
		}
		u.out = append(u.out, u.store.page(slot)...)
		return nil
	}
	if !u.store.takes(slot) {
		return fmt.Errorf("%w: page for slot %d, %d of %d are filled", ErrFrame, slot, u.store.filled, u.store.slots)
	}
	switch op {
	case opKeep:
		page, err := u.take(op, sectionContents, storePage)
		if err != nil {
			return err
		}
		u.out = append(u.out, page...)
		u.store.put(slot, page)
		return nil
	case opHeld:
		if len(u.held) == 0 {
			return fmt.Errorf("%w: a page that was not found is used", ErrFrame)
		}
		page := u.held[:storePage]
		u.held = u.held[storePage:]
		u.out = append(u.out, page...)
		u.store.put(slot, page)
		return nil
	}
	base := binary.BigEndian.Uint32(head[keepOverhead:])
	if !u.store.holds(base) {
		return fmt.Errorf("%w: delta against slot %d of %d", ErrFrame, base, u.store.filled)
	}
	delta, err := u.take(op, sectionDeltas, int(binary.BigEndian.Uint16(head[keepOverhead+4:])))
	if err != nil {
		return err
	}
	u.out = append(u.out, u.store.page(base)...)
	page := u.out[len(u.out)-storePage:]
	if err := compress.ApplyDelta(page, delta); err != nil {
		return fmt.Errorf("%w: %w", ErrFrame, err)
	}
	u.store.put(slot, page)
	return nil
}

// block takes the length byte and id of a block, nothing if word continues the
// block before.
func (u *unbatch) block(op byte, word uint64, flag uint64) ([]byte, error) {
	switch word & uint64(u.pageSize-1) {
	case flag | flagContinue:
		return nil, nil
	case flag:
		if rest := u.rest[sectionOps]; len(rest) > 0 {
			return u.take(op, sectionOps, 1+int(rest[0]))
		}
		return u.take(op, sectionOps, 1)
	}
	return nil, fmt.Errorf("%w: operation %#02x with word %#x", ErrFrame, op, word)
}
