package memsync

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/wanmig/wanmig/compress"
)

// Version of the frames that Source sends, see the package's documentation.
const Version = 1

const (
	frameStart  = 0x01 // u16 version
	frameBatch  = 0x02 // u8 method, u8 page bits, u32 size, u32 crc, operations
	frameTail   = 0x03 // no payload
	frameEnd    = 0x04 // u64 bytes of the stream
	frameReturn = 0x81 // bytes of the return path
)

const (
	opBytes = 0x01 // u32 length, bytes
	opZero  = 0x02 // u64 word, u32 count, block
	opPage  = 0x03 // u64 word, block, one page
)

const (
	batchHeader  = 11
	maxStream    = 264 << 10     // stream bytes of a batch: 64 pages of 4 KiB and their records
	maxOps       = 2 * maxStream // an operation is never larger than its stream bytes twice
	maxReturn    = 64 << 10
	minPageBits  = 10
	maxPageBits  = 16
	runOverhead  = 1 + 8 + 4
	sizeOverhead = 1 + 4
)

// ErrFrame is returned when a frame from the peer is malformed, unknown or out
// of place.
var ErrFrame = errors.New("bad memory frame")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type frameWriter interface {
	Send(ctx context.Context, frame []byte) error
}

type frameReader interface {
	Recv(ctx context.Context, buf []byte) ([]byte, error)
}

// batch collects operations until they are sent as one frame.
type batch struct {
	pageBits uint8
	ops      []byte
	stream   int    // stream bytes that ops stand for
	last     int    // where the last operation begins in ops
	next     uint64 // the word that would extend the last operation, a run of zero pages
	frame    []byte
}

func newBatch() batch {
	return batch{
		pageBits: defaultPageBits,
		ops:      make([]byte, 0, maxOps),
		frame:    make([]byte, 0, batchHeader+maxOps),
	}
}

// fits tells whether the batch has room for n more bytes of the stream.
func (b *batch) fits(n int) bool { return b.stream+n <= maxStream }

func (b *batch) lastIs(op byte) bool { return b.stream > 0 && b.ops[b.last] == op }

func (b *batch) addBytes(p []byte) {
	if !b.lastIs(opBytes) {
		b.last = len(b.ops)
		b.ops = append(b.ops, opBytes, 0, 0, 0, 0)
	}
	b.ops = append(b.ops, p...)
	binary.BigEndian.PutUint32(b.ops[b.last+1:], uint32(len(b.ops)-b.last-sizeOverhead))
	b.stream += len(p)
}

// addZero takes the word of a zero page and the record's block, empty if the
// record continues the block of the one before.
func (b *batch) addZero(word uint64, block []byte) {
	b.stream += 8 + len(block) + 1
	if len(b.ops) > 0 && b.ops[b.last] == opZero && b.next == word {
		count := b.ops[b.last+9:]
		binary.BigEndian.PutUint32(count, binary.BigEndian.Uint32(count)+1)
		b.next += 1 << b.pageBits
		return
	}
	b.last = len(b.ops)
	b.ops = append(b.ops, opZero)
	b.ops = binary.BigEndian.AppendUint64(b.ops, word)
	b.ops = binary.BigEndian.AppendUint32(b.ops, 1)
	b.ops = append(b.ops, block...)
	b.next = 0 // no word of a zero page
	if len(block) == 0 {
		b.next = word + 1<<b.pageBits
	}
}

func (b *batch) addPage(word uint64, block, data []byte) {
	b.stream += 8 + len(block) + len(data)
	b.last = len(b.ops)
	b.ops = append(b.ops, opPage)
	b.ops = binary.BigEndian.AppendUint64(b.ops, word)
	b.ops = append(b.ops, block...)
	b.ops = append(b.ops, data...)
}

// seal returns the frame of the batch, valid until the next call, and empties
// the batch. crc is the checksum of its stream bytes.
func (b *batch) seal(crc uint32) []byte {
	f := append(b.frame[:0], frameBatch, 0, b.pageBits)
	f = binary.BigEndian.AppendUint32(f, uint32(len(b.ops)))
	f = binary.BigEndian.AppendUint32(f, crc)
	f, method := compress.Encode(f, b.ops)
	f[1] = byte(method)
	b.frame = f
	b.ops, b.stream = b.ops[:0], 0
	return f
}

// unbatch decodes the payload of batch frames into stream bytes.
type unbatch struct {
	ops []byte
	out []byte
}

// decode returns the stream bytes of a batch frame, valid until the next call.
func (u *unbatch) decode(frame []byte) ([]byte, error) {
	if len(frame) < batchHeader {
		return nil, fmt.Errorf("%w: batch of %d bytes", ErrFrame, len(frame))
	}
	bits := frame[2]
	if bits < minPageBits || bits > maxPageBits {
		return nil, fmt.Errorf("%w: batch with pages of %d bits", ErrFrame, bits)
	}
	size := binary.BigEndian.Uint32(frame[3:])
	if size == 0 || size > maxOps {
		return nil, fmt.Errorf("%w: batch with %d bytes of operations, allowed are 1 to %d", ErrFrame, size, maxOps)
	}
	var err error
	u.ops, err = compress.Decode(u.ops[:0], compress.Method(frame[1]), frame[batchHeader:], int(size))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	u.out = slices.Grow(u.out[:0], maxStream)
	for ops := u.ops; len(ops) > 0; {
		n, err := u.expand(ops, 1<<bits)
		if err != nil {
			return nil, err
		}
		ops = ops[n:]
	}
	if crc := crc32.Checksum(u.out, castagnoli); crc != binary.BigEndian.Uint32(frame[7:]) {
		return nil, fmt.Errorf("%w: the %d stream bytes of a batch have another checksum than at the source", ErrFrame, len(u.out))
	}
	return u.out, nil
}

// expand appends the stream bytes of the first operation in ops to u.out and
// returns the operation's length.
func (u *unbatch) expand(ops []byte, page int) (int, error) {
	op := ops[0]
	switch op {
	case opBytes:
		if len(ops) < sizeOverhead {
			return 0, truncated(op)
		}
		n := binary.BigEndian.Uint32(ops[1:])
		if uint64(n) > uint64(len(ops)-sizeOverhead) {
			return 0, truncated(op)
		}
		end := sizeOverhead + int(n)
		return end, u.put(ops[sizeOverhead:end])

	case opZero:
		if len(ops) < runOverhead {
			return 0, truncated(op)
		}
		word, count := binary.BigEndian.Uint64(ops[1:]), binary.BigEndian.Uint32(ops[9:])
		block, err := blockOf(op, word, flagZero, ops[runOverhead:], page)
		if err != nil {
			return 0, err
		}
		record := 8 + len(block) + 1
		if count == 0 || len(block) > 0 && count != 1 || int64(count)*int64(record) > int64(maxStream-len(u.out)) {
			return 0, fmt.Errorf("%w: run of %d zero pages", ErrFrame, count)
		}
		for range count {
			u.out = binary.BigEndian.AppendUint64(u.out, word)
			u.out = append(u.out, block...)
			u.out = append(u.out, 0)
			word += uint64(page)
		}
		return runOverhead + len(block), nil

	case opPage:
		if len(ops) < 9 {
			return 0, truncated(op)
		}
		block, err := blockOf(op, binary.BigEndian.Uint64(ops[1:]), flagPage, ops[9:], page)
		if err != nil {
			return 0, err
		}
		end := 9 + len(block) + page
		if len(ops) < end {
			return 0, truncated(op)
		}
		return end, u.put(ops[1:end])
	}
	return 0, fmt.Errorf("%w: unknown operation %#02x", ErrFrame, op)
}

func (u *unbatch) put(p []byte) error {
	if len(p) > maxStream-len(u.out) {
		return fmt.Errorf("%w: batch stands for more than %d stream bytes", ErrFrame, maxStream)
	}
	u.out = append(u.out, p...)
	return nil
}

// blockOf returns the length byte and id of a block at the start of p, nothing
// if word continues the block before.
func blockOf(op byte, word uint64, flag uint64, p []byte, page int) ([]byte, error) {
	switch word & uint64(page-1) {
	case flag | flagContinue:
		return nil, nil
	case flag:
		if len(p) == 0 || len(p) < 1+int(p[0]) {
			return nil, truncated(op)
		}
		return p[:1+int(p[0])], nil
	}
	return nil, fmt.Errorf("%w: operation %#02x with word %#x", ErrFrame, op, word)
}

func truncated(op byte) error {
	return fmt.Errorf("%w: operation %#02x is cut short", ErrFrame, op)
}
