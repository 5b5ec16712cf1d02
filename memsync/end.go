package memsync

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
)

// endFinder recognises the end of a stream: the end marker, the description's
// header, and as many bytes of JSON as it says. The JSON holds no zero byte,
// so only the bytes from just before the last zero byte can be that end: they
// are all that is kept.
type endFinder struct {
	kept []byte
	last byte // the stream's last byte
	lost bool // more than maxDescription bytes without a zero byte
}

const (
	endHeader  = 6 // 00 06 u32 length
	beforeZero = endHeader - 1
)

func (f *endFinder) write(p []byte) {
	if len(p) == 0 {
		return
	}
	f.last = p[len(p)-1]
	zero := bytes.LastIndexByte(p, 0)
	switch {
	case zero >= beforeZero:
		f.kept, f.lost = append(f.kept[:0], p[zero-beforeZero:]...), false
		return
	case zero >= 0:
		need := min(beforeZero-zero, len(f.kept))
		f.kept = append(f.kept[:0], f.kept[len(f.kept)-need:]...)
		f.lost = false
	}
	if f.lost || len(f.kept)+len(p) > maxDescription+endHeader+beforeZero {
		f.lost = true
	}
	f.kept = append(f.kept, p...)
	if f.lost {
		f.kept = append(f.kept[:0], f.kept[max(0, len(f.kept)-beforeZero):]...)
	}
}

// atEnd tells whether the bytes so far could be a whole stream. Device state
// can imitate an end: it is a guess until QEMU closes its socket.
func (f *endFinder) atEnd() bool {
	if f.lost {
		return false
	}
	for i := 0; i <= beforeZero && i+endHeader < len(f.kept); i++ {
		h, text := f.kept[i:], f.kept[i+endHeader:]
		if h[0] == sectionEnd && h[1] == sectionDescription &&
			uint64(binary.BigEndian.Uint32(h[2:])) == uint64(len(text)) &&
			text[0] == '{' && json.Valid(text) {
			return true
		}
	}
	return false
}
