package memsync

import (
	"context"
	"errors"
	"hash/crc32"

	"github.com/wanmig/wanmig/compress"
)

// Version of the frames that Source sends, see the package's documentation.
const Version = 4

const (
	frameStart  = 0x01 // u16 version, u32 slots of the page store
	frameBatch  = 0x02 // u8 page bits, u32 crc, three sections
	frameTail   = 0x03 // no payload
	frameEnd    = 0x04 // u64 bytes of the stream
	frameOffer  = 0x05 // u32 number, fingerprints
	frameUse    = 0x06 // like a batch, of the oldest offer
	frameMark   = 0x07 // u32 number
	frameReturn = 0x81 // bytes of the return path
	frameHeld   = 0x82 // u32 number, origins of 2 bits
	framePassed = 0x83 // u32 number
)

// Operations of a batch. A page that is kept is written to its slot of the
// page store.
const (
	opBytes     = 0x01 // u32 length, bytes
	opZero      = 0x02 // u64 word, u32 count, block
	opPage      = 0x03 // u64 word, block; the next page of the contents
	opKeep      = 0x04 // u64 word, u32 slot, block; the next page of the contents, kept
	opReference = 0x05 // u64 word, u32 slot, block; the page in the slot
	opDelta     = 0x06 // u64 word, u32 slot, u32 base, u16 length, block; the page in base, changed by the next delta, kept
	opHeld      = 0x07 // u64 word, u32 slot, block; the next page that was found of the offer, kept
)

// Sections of a batch.
const (
	sectionOps      = iota // operations
	sectionDeltas          // deltas, one after the other
	sectionContents        // pages, one after the other
	sections
)

const (
	startLength   = 1 + 2 + 4
	batchHeader   = 1 + 1 + 4
	sectionHeader = 1 + 4 + 4

	maxStream   = 264 << 10     // stream bytes of a batch: 64 pages of 4 KiB and their records
	maxOps      = 2 * maxStream // an operation is never larger than its stream bytes twice
	maxReturn   = 64 << 10
	maxOffers   = 128                   // made and not used yet: 33 MiB of stream
	maxOffered  = maxStream / storePage // pages of an offer
	minPageBits = 10
	maxPageBits = 16

	// maxDelta is the longest delta that is sent. What a delta holds hardly
	// compresses further, while whole pages shrink to about a half or a third.
	maxDelta = 1 << 10

	numberHeader   = 1 + 4 // of offer and held; all of mark and passed
	sumSize        = len(compress.Fingerprint{})
	originsPerByte = 4

	sizeOverhead  = 1 + 4
	runOverhead   = 1 + 8 + 4
	pageOverhead  = 1 + 8
	keepOverhead  = pageOverhead + 4
	deltaOverhead = keepOverhead + 4 + 2
)

// most is how long each section may be.
var most = [sections]uint32{maxOps, maxStream / storePage * maxDelta, maxStream}

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
