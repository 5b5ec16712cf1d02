package tunnel

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

const (
	// maxChunk is the largest piece of a striped channel's bytes that goes to one
	// carrier at a time.
	maxChunk  = 16 << 10
	chunkSize = 8 + 2 // of a chunk's head
)

// chunkHead says where the bytes behind it belong in a direction of a striped
// channel. One of length 0 marks the end of the direction.
type chunkHead struct {
	offset uint64
	length uint16
}

func (h chunkHead) end() uint64 { return h.offset + uint64(h.length) }

func (h chunkHead) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, h.offset)
	return binary.BigEndian.AppendUint16(b, h.length)
}

// readChunkHead reads a head and not a byte more. It returns io.EOF only when r
// ends before the head.
func readChunkHead(r io.Reader) (chunkHead, error) {
	var b [chunkSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return chunkHead{}, err
	}
	h := chunkHead{offset: binary.BigEndian.Uint64(b[:]), length: binary.BigEndian.Uint16(b[8:])}
	if h.length > maxChunk {
		return chunkHead{}, fmt.Errorf("%w: chunk of %d bytes, %d are allowed", ErrFormat, h.length, maxChunk)
	}
	if h.offset > math.MaxUint64-uint64(h.length) {
		return chunkHead{}, fmt.Errorf("%w: chunk of %d bytes at offset %d", ErrFormat, h.length, h.offset)
	}
	return h, nil
}
