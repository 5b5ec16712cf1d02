package blocksync

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/wanmig/wanmig/compress"
)

// version of the protocol in doc.go.
const version = 3

const (
	frameOpen    = 1 // version u8, size u64
	frameData    = 2 // count u16, {offset u64, size u32}..., method u8, payload
	frameZero    = 3 // {offset u64, length u64}...
	frameBarrier = 4 // id u64, final u8
	frameOffer   = 5 // id u32, unit u8, count u16, {offset u64, size u32}..., fingerprints
	frameApply   = 6 // id u32
	frameCheck   = 7 // last u8, {segment u32, fingerprint}...
)

const (
	ackDurable  = 1 // id u64, applied u64
	ackProgress = 2 // applied u64
	ackFailure  = 3 // text
	ackHeld     = 4 // id u32, 2 bits a unit
	ackReady    = 5 // flags u8
	ackChecked  = 6 // {segment u32, same u8}...
)

const (
	maxFrame    = 4 << 20
	maxContent  = 1 << 20 // bytes of the extents of one data or offer frame, decoded
	maxPages    = maxContent / page
	maxOffers   = 64 // that the destination has not been told to apply
	maxFailure  = 1 << 10
	maxChecks   = 256 // in one frame
	dataExtent  = 8 + 4
	zeroExtent  = 8 + 8
	barrierSize = 8 + 1
	applySize   = 1 + 4
)

// ErrFrame is returned when the peer sent a frame that the protocol does not
// allow.
var ErrFrame = errors.New("invalid frame")

// A frameWriter sends one frame at a time, in order. Send may be called
// concurrently; the frame may be reused after it returned.
type frameWriter interface {
	Send(ctx context.Context, frame []byte) error
}

// A frameReader receives the next frame into buf[:0], growing it as needed.
type frameReader interface {
	Recv(ctx context.Context, buf []byte) ([]byte, error)
}

func appendOpen(dst []byte, size int64, verify bool) []byte {
	dst = append(dst, frameOpen, version)
	return append(binary.BigEndian.AppendUint64(dst, uint64(size)), flag(verify))
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// parseOpen returns what the source announces: the disk's size, and whether it is
// to be verified.
func parseOpen(frame []byte) (size uint64, verify bool, err error) {
	if len(frame) < 2 || frame[0] != frameOpen {
		return 0, false, fmt.Errorf("%w: the first is not open", ErrFrame)
	}
	if frame[1] != version {
		return 0, false, fmt.Errorf("%w: version %d of the disk protocol, this side has %d: run the same wanmig on both", ErrFrame, frame[1], version)
	}
	if len(frame) != 11 || frame[10] > 1 {
		return 0, false, fmt.Errorf("%w: open of %d bytes", ErrFrame, len(frame))
	}
	return binary.BigEndian.Uint64(frame[2:]), frame[10] == 1, nil
}

// appendExtents appends the list of a data or offer frame.
func appendExtents(dst []byte, list []extent) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(list)))
	for _, e := range list {
		dst = binary.BigEndian.AppendUint64(dst, uint64(e.offset))
		dst = binary.BigEndian.AppendUint32(dst, uint32(e.length))
	}
	return dst
}

// parseExtents splits the list off the body of a data or offer frame for a disk
// of the given size, and appends it to list. n is the sum of the lengths.
func parseExtents(list []extent, body []byte, disk int64) (_ []extent, n int64, rest []byte, err error) {
	if len(body) < 2 {
		return list, 0, nil, fmt.Errorf("%w: %d bytes of a list of extents", ErrFrame, len(body))
	}
	count := int(binary.BigEndian.Uint16(body))
	body = body[2:]
	if count == 0 || count > len(body)/dataExtent {
		return list, 0, nil, fmt.Errorf("%w: %d extents in %d bytes", ErrFrame, count, len(body))
	}
	for range count {
		offset, size := binary.BigEndian.Uint64(body), binary.BigEndian.Uint32(body[8:])
		body = body[dataExtent:]
		if n += int64(size); size == 0 || n > maxContent {
			return list, 0, nil, fmt.Errorf("%w: extent of %d bytes, %d with those before it", ErrFrame, size, n)
		}
		if err := within(offset, uint64(size), disk); err != nil {
			return list, 0, nil, err
		}
		list = append(list, extent{int64(offset), int64(size)})
	}
	return list, n, body, nil
}

// encode is compress.Encoder.Encode.
type encode func(dst, src []byte) ([]byte, compress.Method)

// appendData appends a data frame; content is that of the extents, one after the
// other. They are compressed together.
func appendData(dst []byte, encode encode, list []extent, content []byte) ([]byte, compress.Method) {
	dst = appendExtents(append(dst, frameData), list)
	method := len(dst)
	dst, m := encode(append(dst, 0), content)
	dst[method] = byte(m)
	return dst, m
}

// parseData reads the body of a data frame. n is the size of its content.
func parseData(list []extent, body []byte, disk int64) (_ []extent, n int64, m compress.Method, payload []byte, err error) {
	list, n, body, err = parseExtents(list, body, disk)
	if err == nil && len(body) < 1 {
		err = fmt.Errorf("%w: data without content", ErrFrame)
	}
	if err != nil {
		return list, 0, 0, nil, err
	}
	return list, n, compress.Method(body[0]), body[1:], nil
}

// blockUnit is the larger of the two units that are offered: what is the same is
// mostly so in long runs.
const (
	blockUnit  = blockPages * page
	blockPages = 16
)

// unitsOf calls f with each whole unit of the extents, counted from the disk's
// start: which it is, and where it is in the extents' content.
func unitsOf(list []extent, unit int64, f func(u, at int64)) {
	at := int64(0)
	for _, e := range list {
		for u := (e.offset + unit - 1) / unit; (u+1)*unit <= e.end(); u++ {
			f(u, at+u*unit-e.offset)
		}
		at += e.length
	}
}

// countUnits returns how many whole units lie in the extents.
func countUnits(list []extent, unit int64) (n int) {
	unitsOf(list, unit, func(_, _ int64) { n++ })
	return n
}

// appendOffer appends an offer frame of the whole pages, or blocks, in list by the
// fingerprints of its whole pages.
func appendOffer(dst []byte, id uint32, unit int64, list []extent, sums []compress.Fingerprint) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, frameOffer), id)
	dst = append(dst, flag(unit == blockUnit))
	dst = appendExtents(dst, list)
	if unit == page {
		for i := range sums {
			dst = append(dst, sums[i][:]...)
		}
		return dst
	}
	i := 0
	unitsOf(list, page, func(p, _ int64) {
		if i++; inBlock(list, p) && p%blockPages == blockPages-1 {
			pages := sums[i-blockPages : i]
			block := compress.SumOf(pages)
			dst = append(append(dst, block[:]...), pages[0][:]...)
		}
	})
	return dst
}

// inBlock reports whether the block of a page lies whole in one of the extents.
func inBlock(list []extent, p int64) bool {
	from := p / blockPages * blockUnit
	for _, e := range list {
		if e.offset <= from && from+blockUnit <= e.end() {
			return true
		}
	}
	return false
}

// parseOffer reads the body of an offer frame.
func parseOffer(body []byte, disk int64) (id uint32, x *offer, err error) {
	if len(body) < 5 || body[4] > 1 {
		return 0, nil, fmt.Errorf("%w: offer % x", ErrFrame, body[:min(len(body), 5)])
	}
	const size = len(compress.Fingerprint{})
	x = &offer{unit: page}
	each := size
	if body[4] == 1 {
		x.unit, each = blockUnit, 2*size
	}
	id = binary.BigEndian.Uint32(body)
	x.extents, _, body, err = parseExtents(nil, body[5:], disk)
	if err != nil {
		return 0, nil, err
	}
	units := countUnits(x.extents, x.unit)
	if len(body) != units*each {
		return 0, nil, fmt.Errorf("%w: %d bytes of fingerprints of %d units", ErrFrame, len(body), units)
	}
	x.sums = make([]compress.Fingerprint, units)
	if x.unit == blockUnit {
		x.firsts = make([]compress.Fingerprint, units)
	}
	for i := range x.sums {
		copy(x.sums[i][:], body[i*each:])
		if x.unit == blockUnit {
			copy(x.firsts[i][:], body[i*each+size:])
		}
	}
	return id, x, nil
}

func appendApply(dst []byte, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, frameApply), id)
}

func parseApply(body []byte) (uint32, error) {
	if len(body) != 4 {
		return 0, fmt.Errorf("%w: apply of %d bytes", ErrFrame, len(body))
	}
	return binary.BigEndian.Uint32(body), nil
}

func appendZero(dst []byte, e extent) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.offset))
	return binary.BigEndian.AppendUint64(dst, uint64(e.length))
}

// nextZero splits the first extent off the body of a zero frame for a disk of
// the given size.
func nextZero(body []byte, disk int64) (e extent, rest []byte, err error) {
	if len(body) < zeroExtent {
		return e, nil, fmt.Errorf("%w: %d bytes of a zero extent", ErrFrame, len(body))
	}
	offset, length := binary.BigEndian.Uint64(body), binary.BigEndian.Uint64(body[8:])
	if length == 0 {
		return e, nil, fmt.Errorf("%w: empty zero extent", ErrFrame)
	}
	if err := within(offset, length, disk); err != nil {
		return e, nil, err
	}
	return extent{int64(offset), int64(length)}, body[zeroExtent:], nil
}

func within(offset, length uint64, disk int64) error {
	if offset > uint64(disk) || length > uint64(disk)-offset {
		return fmt.Errorf("%w: %d bytes at %d of a disk of %d", ErrFrame, length, offset, disk)
	}
	return nil
}

func appendBarrier(dst []byte, id uint64, final bool) []byte {
	dst = append(dst, frameBarrier)
	return append(binary.BigEndian.AppendUint64(dst, id), flag(final))
}

func parseBarrier(body []byte) (id uint64, final bool, err error) {
	if len(body) != barrierSize || body[8] > 1 {
		return 0, false, fmt.Errorf("%w: barrier % x", ErrFrame, body[:min(len(body), 16)])
	}
	return binary.BigEndian.Uint64(body), body[8] == 1, nil
}

func appendDurable(dst []byte, id, applied uint64) []byte {
	dst = append(dst, ackDurable)
	dst = binary.BigEndian.AppendUint64(dst, id)
	return binary.BigEndian.AppendUint64(dst, applied)
}

func appendProgress(dst []byte, applied uint64) []byte {
	return binary.BigEndian.AppendUint64(append(dst, ackProgress), applied)
}

// appendHeld appends the answer to an offer: two bits for each of its whole
// units, the first the lowest of the first byte.
func appendHeld(dst []byte, id uint32, found []compress.Origin) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, ackHeld), id)
	start := len(dst)
	dst = append(dst, make([]byte, (len(found)+3)/4)...)
	for i, o := range found {
		dst[start+i/4] |= byte(o) << (i % 4 * 2)
	}
	return dst
}

// heldAt returns what an answer says of a unit.
func heldAt(held []byte, i int) compress.Origin {
	return compress.Origin(held[i/4] >> (i % 4 * 2) & 3)
}

// appendReady appends the answer to open.
func appendReady(dst []byte, blocks bool) []byte {
	return append(dst, ackReady, flag(blocks))
}

// appendChecks appends the digests of segments. The last have to be the same.
func appendChecks(dst []byte, last bool, checks []check) []byte {
	dst = append(dst, frameCheck, flag(last))
	for i := range checks {
		dst = binary.BigEndian.AppendUint32(dst, uint32(checks[i].segment))
		dst = append(dst, checks[i].sum[:]...)
	}
	return dst
}

// parseChecks reads the body of a check frame for a disk of so many segments.
func parseChecks(body []byte, segments int64) (last bool, checks []check, err error) {
	const size = 4 + len(compress.Fingerprint{})
	if len(body) < 1+size || body[0] > 1 || (len(body)-1)%size != 0 || (len(body)-1)/size > maxChecks {
		return false, nil, fmt.Errorf("%w: check of %d bytes", ErrFrame, len(body))
	}
	for p := body[1:]; len(p) > 0; p = p[size:] {
		c := check{segment: int64(binary.BigEndian.Uint32(p))}
		copy(c.sum[:], p[4:])
		if c.segment >= segments {
			return false, nil, fmt.Errorf("%w: check of segment %d of %d", ErrFrame, c.segment, segments)
		}
		checks = append(checks, c)
	}
	return body[0] == 1, checks, nil
}

// result is what came of a check.
type result struct {
	segment int64
	same    bool
}

func appendResults(dst []byte, results []result) []byte {
	dst = append(dst, ackChecked)
	for _, r := range results {
		dst = append(binary.BigEndian.AppendUint32(dst, uint32(r.segment)), flag(r.same))
	}
	return dst
}

func appendFailure(dst []byte, text string) []byte {
	text = strings.ToValidUTF8(text, "?")
	if len(text) > maxFailure {
		text = strings.ToValidUTF8(text[:maxFailure], "") // a cut rune
	}
	return append(append(dst, ackFailure), text...)
}

// ack is any frame from the destination.
type ack struct {
	kind    byte
	id      uint64
	applied uint64
	held    []byte
	blocks  bool
	results []result
	text    string
}

func parseAck(frame []byte) (ack, error) {
	if len(frame) == 0 {
		return ack{}, fmt.Errorf("%w: empty", ErrFrame)
	}
	a, body := ack{kind: frame[0]}, frame[1:]
	switch {
	case a.kind == ackDurable && len(body) == 16:
		a.id, a.applied = binary.BigEndian.Uint64(body), binary.BigEndian.Uint64(body[8:])
	case a.kind == ackProgress && len(body) == 8:
		a.applied = binary.BigEndian.Uint64(body)
	case a.kind == ackHeld && len(body) >= 4 && len(body) <= 4+maxPages/4:
		a.id, a.held = uint64(binary.BigEndian.Uint32(body)), body[4:]
	case a.kind == ackReady && len(body) == 1 && body[0] <= 1:
		a.blocks = body[0] == 1
	case a.kind == ackChecked && len(body) > 0 && len(body)%5 == 0 && len(body)/5 <= maxChecks:
		for p := body; len(p) > 0; p = p[5:] {
			if p[4] > 1 {
				return ack{}, fmt.Errorf("%w: result %d of a check", ErrFrame, p[4])
			}
			a.results = append(a.results, result{int64(binary.BigEndian.Uint32(p)), p[4] == 1})
		}
	case a.kind == ackFailure && len(body) <= maxFailure:
		a.text = printable(string(body))
	default:
		return ack{}, fmt.Errorf("%w: type %d of %d bytes from the destination", ErrFrame, a.kind, len(frame))
	}
	return a, nil
}

// printable keeps a peer's text from controlling the operator's terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, strings.ToValidUTF8(s, "?"))
}
