// Package compress reduces blocks of guest data before they cross the link.
//
// A block is encoded alone, without state shared between blocks, so blocks may
// be encoded and decoded in parallel and in any order. The method travels in
// the caller's frame:
//
//	0  Raw   the bytes as they are
//	1  Zstd  one zstd frame (RFC 8878) that states its content size
//
// Methods are only appended; a decoder refuses one it does not know.
//
// How hard zstd tries is not in the frame: an Encoder has that follow the link
// and the CPU while it goes.
//
// What has changed in a block since an older version of it is a delta, see
// AppendDelta.
package compress

import (
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// Method says how a block is encoded on the wire.
type Method uint8

const (
	Raw  Method = 0 // the bytes as they are
	Zstd Method = 1 // one zstd frame with its content size
)

func (m Method) String() string {
	switch m {
	case Raw:
		return "raw"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("method %d", uint8(m))
}

// MaxSize is the largest block, in decoded bytes, that is compressed.
const MaxSize = 4 << 20

var (
	// ErrMethod is returned when the method of a block is not known.
	ErrMethod = errors.New("unknown compression method")

	// ErrSize is returned when a block does not decode to exactly the size
	// that was announced for it.
	ErrSize = errors.New("block does not have the announced size")
)

// The decoder keeps one state per core, which bounds memory and parallelism of
// all callers together. zstd's own checksum is left out: the session below
// authenticates the bytes.
var decoder = newDecoder()

func newDecoder() *zstd.Decoder {
	d, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)),
		zstd.WithDecoderMaxMemory(MaxSize),
		zstd.WithDecoderMaxWindow(MaxSize),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // constant options
	}
	return d
}

// Decode appends the block in src to dst: exactly size bytes, or an error with
// dst unchanged. It never uses more memory than size and a constant, whatever
// src holds. Decode may be called concurrently.
func Decode(dst []byte, m Method, src []byte, size int) ([]byte, error) {
	switch m {
	case Raw:
		if len(src) != size {
			return dst, fmt.Errorf("%w: raw block of %d bytes, announced %d", ErrSize, len(src), size)
		}
		return append(dst, src...), nil
	case Zstd:
		return decodeZstd(dst, src, size)
	}
	return dst, fmt.Errorf("%w %d", ErrMethod, uint8(m))
}

func decodeZstd(dst, src []byte, size int) ([]byte, error) {
	if size <= 0 || size > MaxSize {
		return dst, fmt.Errorf("%w: zstd block announced with %d bytes, allowed are 1 to %d", ErrSize, size, MaxSize)
	}
	var h zstd.Header
	if err := h.Decode(src); err != nil {
		return dst, fmt.Errorf("zstd header: %w", err)
	}
	if h.Skippable || !h.HasFCS || h.FrameContentSize != uint64(size) {
		return dst, fmt.Errorf("%w: zstd frame of %d bytes, announced %d", ErrSize, h.FrameContentSize, size)
	}
	start := len(dst)
	out := slices.Grow(dst, size)
	// The capacity is the limit, so that nothing beyond size is ever produced.
	got, err := decoder.DecodeAll(src, out[start:start:start+size])
	if err != nil {
		return dst, fmt.Errorf("zstd block: %w", err)
	}
	if len(got) != size {
		return dst, fmt.Errorf("%w: zstd block of %d bytes, announced %d", ErrSize, len(got), size)
	}
	return out[:start+size], nil
}
