package tunnel

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// kind is the first byte of a frame on a carrier.
type kind uint8

const (
	kindData   kind = 1 // flags u8, channel u32, offset u64, length u16, bytes
	kindReset  kind = 2 // channel u32, code u8: the sender's bytes end here, undelivered ones are void
	kindDone   kind = 3 // channel u32, code u8: the receiver wants no more; code 0: it has had all
	kindCredit kind = 4 // channel u32, limit u64: offsets below it may be sent
	kindGone   kind = 5 // carrier u32, count u64: that carrier is closed here, and brought count numbered frames
	kindAck    kind = 6 // count u64: this carrier has brought count numbered frames
	kindPing   kind = 7 // nothing: asks for an ack now
	kindClose  kind = 8 // code u8, length u16, reason: the session is over
	kindRetire kind = 9 // nothing: this carrier gets no more frames that count, and should bring none
)

// numbered says whether frames of the kind count: they are acknowledged, and go
// over another carrier when theirs is gone.
func (k kind) numbered() bool { return k <= kindGone }

const (
	flagEnd = 1 << 0 // the bytes end the sender's direction

	dataHead = 1 + 1 + 4 + 8 + 2
	// maxData makes a full data frame one TLS record.
	maxData = 16<<10 - dataHead
)

// frameSizes are the lengths of the fixed parts behind the kind.
var frameSizes = [...]int{
	kindData: dataHead - 1, kindReset: 5, kindDone: 5, kindCredit: 12, kindGone: 12, kindAck: 8, kindPing: 0, kindClose: 3, kindRetire: 0,
}

// frame is what goes over a carrier. Which fields it has depends on its kind.
type frame struct {
	kind    kind
	flags   uint8
	channel uint32 // or carrier
	offset  uint64 // or limit, or count
	code    uint8
	data    []byte // or reason
}

func (f frame) end() uint64 { return f.offset + uint64(len(f.data)) }

func (f frame) append(b []byte) []byte {
	b = append(b, byte(f.kind))
	switch f.kind {
	case kindData:
		b = append(b, f.flags)
		b = binary.BigEndian.AppendUint32(b, f.channel)
		b = binary.BigEndian.AppendUint64(b, f.offset)
		b = binary.BigEndian.AppendUint16(b, uint16(len(f.data)))
		b = append(b, f.data...)
	case kindReset, kindDone:
		b = binary.BigEndian.AppendUint32(b, f.channel)
		b = append(b, f.code)
	case kindCredit, kindGone:
		b = binary.BigEndian.AppendUint32(b, f.channel)
		b = binary.BigEndian.AppendUint64(b, f.offset)
	case kindAck:
		b = binary.BigEndian.AppendUint64(b, f.offset)
	case kindClose:
		b = append(b, f.code)
		b = binary.BigEndian.AppendUint16(b, uint16(len(f.data)))
		b = append(b, f.data...)
	}
	return b
}

// readFrameHead reads a frame from a carrier, up to the bytes of a data frame:
// f.data is nil then, and length says how many follow.
func readFrameHead(r *bufio.Reader) (f frame, length int, err error) {
	first, err := r.ReadByte()
	if err != nil {
		return frame{}, 0, err
	}
	f.kind = kind(first)
	var b [dataHead - 1]byte
	if int(f.kind) >= len(frameSizes) || f.kind == 0 {
		return frame{}, 0, fmt.Errorf("%w: frame of kind %d", ErrFormat, first)
	}
	size := frameSizes[f.kind]
	if _, err := io.ReadFull(r, b[:size]); err != nil {
		return frame{}, 0, cutShort(err)
	}
	switch f.kind {
	case kindData:
		f.flags = b[0]
		f.channel = binary.BigEndian.Uint32(b[1:])
		f.offset = binary.BigEndian.Uint64(b[5:])
		length = int(binary.BigEndian.Uint16(b[13:]))
		switch {
		case f.flags&^flagEnd != 0:
			err = fmt.Errorf("%w: data with flags %#x", ErrFormat, f.flags)
		case length > maxData:
			err = fmt.Errorf("%w: data of %d bytes, %d are allowed", ErrFormat, length, maxData)
		case f.offset > maxOffset:
			err = fmt.Errorf("%w: data at offset %d", ErrFormat, f.offset)
		case length == 0 && f.flags&flagEnd == 0:
			err = fmt.Errorf("%w: data of no bytes", ErrFormat)
		}
	case kindReset, kindDone:
		f.channel, f.code = binary.BigEndian.Uint32(b[:]), b[4]
	case kindCredit, kindGone:
		f.channel, f.offset = binary.BigEndian.Uint32(b[:]), binary.BigEndian.Uint64(b[4:])
	case kindAck:
		f.offset = binary.BigEndian.Uint64(b[:])
	case kindClose:
		f.code = b[0]
		n := int(binary.BigEndian.Uint16(b[1:]))
		if n > maxReason {
			return frame{}, 0, fmt.Errorf("%w: reason of %d bytes, %d are allowed", ErrFormat, n, maxReason)
		}
		f.data = make([]byte, n)
		if _, err := io.ReadFull(r, f.data); err != nil {
			return frame{}, 0, cutShort(err)
		}
	}
	return f, length, err
}

// maxOffset bounds offsets so that sums of them cannot overflow.
const maxOffset = 1 << 62
