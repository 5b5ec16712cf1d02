package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/quic-go/quic-go"
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
	maxStreamID     = 1<<62 - 1 // RFC 9000, section 2.1
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

// readHeader reads the version and the rest of a header.
func readHeader(r io.Reader) (rest []byte, err error) {
	var fixed [2]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return nil, cutShort(err)
	}
	if fixed[0] < headerVersion {
		return nil, fmt.Errorf("%w: header of version %d", ErrFormat, fixed[0])
	}
	rest = make([]byte, fixed[1])
	if _, err := io.ReadFull(r, rest); err != nil {
		return nil, cutShort(err)
	}
	return rest, nil
}

// readChannelHeader reads a header and not a byte more.
func readChannelHeader(r io.Reader) (channelHeader, error) {
	rest, err := readHeader(r)
	if err != nil {
		return channelHeader{}, err
	}
	if len(rest) < 2 || len(rest) < 2+int(rest[1]) {
		return channelHeader{}, fmt.Errorf("%w: channel header of %d bytes is too short for its name", ErrFormat, len(rest))
	}
	h := channelHeader{priority: Priority(rest[0]), name: string(rest[2 : 2+int(rest[1])])}
	return h, h.check()
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

// laneHeader is what the first bytes of a channel's stream on a joined carrier
// say: the ID of the channel's stream on the first one.
type laneHeader struct {
	channel quic.StreamID
}

func (h laneHeader) append(b []byte) []byte {
	b = append(b, headerVersion, 8)
	return binary.BigEndian.AppendUint64(b, uint64(h.channel))
}

// readLaneHeader reads a header and not a byte more.
func readLaneHeader(r io.Reader) (laneHeader, error) {
	rest, err := readHeader(r)
	if err != nil {
		return laneHeader{}, err
	}
	if len(rest) < 8 {
		return laneHeader{}, fmt.Errorf("%w: stream header of %d bytes is too short", ErrFormat, len(rest))
	}
	id := binary.BigEndian.Uint64(rest)
	if id > maxStreamID {
		return laneHeader{}, fmt.Errorf("%w: stream ID %d", ErrFormat, id)
	}
	return laneHeader{channel: quic.StreamID(id)}, nil
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
