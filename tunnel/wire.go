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
	name      string
	priority  Priority
	unordered bool
}

const headerUnordered = 1 << 0 // of a channel header's flags

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
	if h.priority > Background {
		return fmt.Errorf("%w: unknown priority %d", ErrFormat, h.priority)
	}
	return nil
}

func (h channelHeader) append(b []byte) []byte {
	flags := byte(0)
	if h.unordered {
		flags = headerUnordered
	}
	b = append(b, headerVersion, byte(3+len(h.name)), byte(h.priority), flags, byte(len(h.name)))
	return append(b, h.name...)
}

// parseChannelHeader reads the header at the beginning of b, which has it whole,
// and returns its length.
func parseChannelHeader(b []byte) (h channelHeader, n int, err error) {
	if len(b) < 2 || len(b) < 2+int(b[1]) {
		return channelHeader{}, 0, fmt.Errorf("%w: channel header of %d bytes is cut short", ErrFormat, len(b))
	}
	if b[0] < headerVersion {
		return channelHeader{}, 0, fmt.Errorf("%w: channel header of version %d", ErrFormat, b[0])
	}
	n = 2 + int(b[1])
	rest := b[2:n]
	if len(rest) < 3 || len(rest) < 3+int(rest[2]) {
		return channelHeader{}, 0, fmt.Errorf("%w: channel header of %d bytes is too short for its name", ErrFormat, len(rest))
	}
	if rest[1]&^headerUnordered != 0 {
		return channelHeader{}, 0, fmt.Errorf("%w: channel header with flags %#x", ErrFormat, rest[1])
	}
	h = channelHeader{priority: Priority(rest[0]), unordered: rest[1]&headerUnordered != 0, name: string(rest[3 : 3+int(rest[2])])}
	return h, n, h.check()
}

// token names a session to the connections that join it.
type token [16]byte

// append writes a token as the greeting and the request to join have it.
func (t token) append(b []byte) []byte {
	return append(append(b, greetingVersion), t[:]...)
}

// readToken reads a greeting or a request to join up to its token.
func readToken(r io.Reader) (token, error) {
	var b [1 + len(token{})]byte
	if n, err := io.ReadFull(r, b[:]); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return token{}, fmt.Errorf("%w: greeting of %d bytes", ErrFormat, n)
	} else if err != nil {
		return token{}, err
	}
	if b[0] < greetingVersion {
		return token{}, fmt.Errorf("%w: greeting of version %d", ErrFormat, b[0])
	}
	return token(b[1:]), nil
}

// skipLater reads what later versions have put behind the token, up to the end
// of the stream.
func skipLater(r io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxGreeting))
	if err == nil && n == maxGreeting {
		err = fmt.Errorf("%w: greeting above %d bytes", ErrFormat, maxGreeting)
	}
	return err
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
