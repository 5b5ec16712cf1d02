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

// level is chosen by BenchmarkLevels: 256 KiB blocks of a guest's kinds of
// content, one core of a 2-core virtual machine, MB/s of input and ratio:
//
//	          machine code   source text   table        noise
//	fastest   200  1.98      240  3.36     179  2.40    2600  1
//	default   117  2.10      156  3.63     134  2.43    1300  1
//	better     44  2.11       65  3.81      43  2.43
//	best       17  2.18       21  4.08      14  2.48
//
// At default a core fills more than 400 Mbit/s of link with encoded bytes;
// better would hold back a 200 Mbit/s link for 1 to 5 % fewer bytes.
const level = zstd.SpeedDefault

// The encoder and the decoder keep one state per core, which bounds memory and
// parallelism of all callers together. zstd's own checksum is left out: the
// session below authenticates the bytes.
var (
	encoder = newEncoder(level)
	decoder = newDecoder()
)

func newEncoder(l zstd.EncoderLevel) *zstd.Encoder {
	e, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(l),
		zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)),
		zstd.WithWindowSize(1<<20),
		zstd.WithSingleSegment(true), // states the content size also of the smallest blocks
		// Without it, content with a skewed alphabet and no matches (base64) is
		// sent raw. zstd gives up on noise after its first look either way.
		zstd.WithAllLitEntropyCompression(true),
		zstd.WithEncoderCRC(false))
	if err != nil {
		panic(err) // constant options
	}
	return e
}

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

// Encode appends the encoded form of src to dst and returns it with its method.
// A block that would not shrink by at least 1/32, or is larger than MaxSize, is
// appended as it is. Encode may be called concurrently.
func Encode(dst, src []byte) ([]byte, Method) {
	if len(src) == 0 || len(src) > MaxSize {
		return append(dst, src...), Raw
	}
	start := len(dst)
	dst = slices.Grow(dst, len(src)+64) // zstd adds at most 3 bytes per 128 KiB and its header
	dst = encoder.EncodeAll(src, dst)
	if len(dst)-start > len(src)-len(src)/32 {
		return append(dst[:start], src...), Raw
	}
	return dst, Zstd
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
