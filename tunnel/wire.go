package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// MaxFrame is the largest frame in bytes.
const MaxFrame = 4 << 20

const (
	headerVersion   = 1
	greetingVersion = 1
	maxGreeting     = 1024
	maxName         = 64
	frameHead       = 4
	frameGrowth     = 64 << 10
)

// channelHeader is what the opener of a channel says first.
type channelHeader struct {
	name     string
	priority Priority
}

func (h channelHeader) check() error {
	if len(h.name) < 1 || len(h.name) > maxName {
		return fmt.Errorf("%w: channel name of %d bytes, allowed are 1 to %d", ErrFormat, len(h.name), maxName)
	}
	for i := range len(h.name) {
		c := h.name[i]
		ok := c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-' || c == '/'
		if !ok {
			return fmt.Errorf("%w: channel name %q: byte %#02x is not allowed", ErrFormat, h.name, c)
		}
	}
	if h.priority > Disk {
		return fmt.Errorf("%w: unknown priority %d", ErrFormat, h.priority)
	}
	return nil
}

func (h channelHeader) append(b []byte) []byte {
	b = append(b, headerVersion, byte(2+len(h.name)), byte(h.priority), byte(len(h.name)))
	return append(b, h.name...)
}

// readChannelHeader reads a header and not a byte more.
func readChannelHeader(r io.Reader) (channelHeader, error) {
	var fixed [2]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return channelHeader{}, cutShort(err)
	}
	if fixed[0] < headerVersion {
		return channelHeader{}, fmt.Errorf("%w: channel header of version %d", ErrFormat, fixed[0])
	}
	rest := make([]byte, fixed[1])
	if _, err := io.ReadFull(r, rest); err != nil {
		return channelHeader{}, cutShort(err)
	}
	if len(rest) < 2 || len(rest) < 2+int(rest[1]) {
		return channelHeader{}, fmt.Errorf("%w: channel header of %d bytes is too short for its name", ErrFormat, len(rest))
	}
	h := channelHeader{priority: Priority(rest[0]), name: string(rest[2 : 2+int(rest[1])])}
	return h, h.check()
}

// readGreeting reads the listener's greeting, up to the end of its stream.
func readGreeting(r io.Reader) error {
	b, err := io.ReadAll(io.LimitReader(r, maxGreeting+1))
	if err != nil {
		return err
	}
	if len(b) < 1 || len(b) > maxGreeting || b[0] < greetingVersion {
		return fmt.Errorf("%w: greeting of %d bytes", ErrFormat, len(b))
	}
	return nil
}

// readFrame appends the next frame to buf and says how many bytes it took from
// r. It returns io.EOF only at the end of a whole frame. Memory grows with the
// bytes that arrive, not with the length that the peer announces.
func readFrame(r io.Reader, buf []byte) (frame []byte, taken int, err error) {
	var head [frameHead]byte
	taken, err = io.ReadFull(r, head[:])
	if err != nil {
		return nil, taken, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > MaxFrame {
		return nil, taken, fmt.Errorf("%w: %d bytes announced, %d allowed", ErrFrameTooLarge, length, MaxFrame)
	}
	end := len(buf) + int(length)
	for len(buf) < end {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, min(end-len(buf), max(len(buf), frameGrowth)))
		}
		n, err := r.Read(buf[len(buf):min(cap(buf), end)])
		buf, taken = buf[:len(buf)+n], taken+n
		if err != nil && len(buf) < end {
			return nil, taken, cutShort(err)
		}
	}
	return buf, taken, nil
}

// cutShort says that a stream which ends here ends too early.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
