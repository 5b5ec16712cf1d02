package api

import (
	"encoding/binary"
	"errors"
)

// EchoSize is the length of an EchoRecord on the wire.
const EchoSize = 32

const echoMagic = 0x77656368 // "wech"

// ErrEcho is returned when bytes are not an echo record.
var ErrEcho = errors.New("not an echo record")

// EchoRecord is both question and answer of the echo service. Big-endian:
//
//	u32 magic 0x77656368
//	u32 breaks    answer: records out of order on this connection so far (UDP: 0)
//	u64 sequence  the client's; over TCP each must be the one before it plus one
//	u64 count     answer: records the server has seen on this connection (UDP: in all)
//	u64 stamp     the client's, returned as it is
type EchoRecord struct {
	Breaks   uint32
	Sequence uint64
	Count    uint64
	Stamp    uint64
}

// Append appends the record's EchoSize bytes to b.
func (r EchoRecord) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, echoMagic)
	b = binary.BigEndian.AppendUint32(b, r.Breaks)
	b = binary.BigEndian.AppendUint64(b, r.Sequence)
	b = binary.BigEndian.AppendUint64(b, r.Count)
	return binary.BigEndian.AppendUint64(b, r.Stamp)
}

// ParseEcho reads a record of exactly EchoSize bytes.
func ParseEcho(b []byte) (EchoRecord, error) {
	if len(b) != EchoSize || binary.BigEndian.Uint32(b) != echoMagic {
		return EchoRecord{}, ErrEcho
	}
	return EchoRecord{
		Breaks:   binary.BigEndian.Uint32(b[4:]),
		Sequence: binary.BigEndian.Uint64(b[8:]),
		Count:    binary.BigEndian.Uint64(b[16:]),
		Stamp:    binary.BigEndian.Uint64(b[24:]),
	}, nil
}
