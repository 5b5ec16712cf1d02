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
const version = 1

const (
	frameOpen    = 1 // version u8, size u64
	frameData    = 2 // {offset u64, size u32, method u8, length u32, payload}...
	frameZero    = 3 // {offset u64, length u64}...
	frameBarrier = 4 // id u64, final u8
)

const (
	ackDurable  = 1 // id u64, applied u64
	ackProgress = 2 // applied u64
	ackFailure  = 3 // text
)

const (
	maxFrame    = 4 << 20
	maxExtent   = 1 << 20 // bytes of one data extent, decoded
	maxFailure  = 1 << 10
	dataHeader  = 8 + 4 + 1 + 4
	zeroExtent  = 8 + 8
	barrierSize = 8 + 1
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

func appendOpen(dst []byte, size int64) []byte {
	dst = append(dst, frameOpen, version)
	return binary.BigEndian.AppendUint64(dst, uint64(size))
}

// parseOpen returns the disk size that the source announces.
func parseOpen(frame []byte) (uint64, error) {
	if len(frame) < 2 || frame[0] != frameOpen {
		return 0, fmt.Errorf("%w: the first is not open", ErrFrame)
	}
	if frame[1] != version {
		return 0, fmt.Errorf("%w: version %d of the disk protocol, this side has %d: run the same wanmig on both", ErrFrame, frame[1], version)
	}
	if len(frame) != 10 {
		return 0, fmt.Errorf("%w: open of %d bytes", ErrFrame, len(frame))
	}
	return binary.BigEndian.Uint64(frame[2:]), nil
}

// appendData appends one extent to a data frame.
func appendData(dst []byte, offset int64, content []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(offset))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(content)))
	method := len(dst)
	dst = append(dst, 0, 0, 0, 0, 0)
	payload := len(dst)
	dst, m := compress.Encode(dst, content)
	dst[method] = byte(m)
	binary.BigEndian.PutUint32(dst[method+1:], uint32(len(dst)-payload))
	return dst
}

// dataExtent is content as it travels.
type dataExtent struct {
	offset  int64
	size    int
	method  compress.Method
	payload []byte
}

// nextData splits the first extent off the body of a data frame for a disk of
// the given size.
func nextData(body []byte, disk int64) (e dataExtent, rest []byte, err error) {
	if len(body) < dataHeader {
		return e, nil, fmt.Errorf("%w: %d bytes of a data extent", ErrFrame, len(body))
	}
	offset, size := binary.BigEndian.Uint64(body), binary.BigEndian.Uint32(body[8:])
	if size == 0 || size > maxExtent {
		return e, nil, fmt.Errorf("%w: data extent of %d bytes", ErrFrame, size)
	}
	if err := within(offset, uint64(size), disk); err != nil {
		return e, nil, err
	}
	length := binary.BigEndian.Uint32(body[13:])
	if uint64(length) > uint64(len(body)-dataHeader) {
		return e, nil, fmt.Errorf("%w: payload of %d bytes where %d are left", ErrFrame, length, len(body)-dataHeader)
	}
	end := dataHeader + int(length)
	return dataExtent{
		offset:  int64(offset),
		size:    int(size),
		method:  compress.Method(body[12]),
		payload: body[dataHeader:end],
	}, body[end:], nil
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
	dst = binary.BigEndian.AppendUint64(dst, id)
	if final {
		return append(dst, 1)
	}
	return append(dst, 0)
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
