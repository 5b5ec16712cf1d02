package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
)

const sessionProtocol = "wanmig/2" // ALPN of a session's carriers

const (
	greetHead  = 3 // version and length
	helloSize  = len(token{}) + 4 + 4 + 2 + 1
	answerSize = 1 + len(token{})

	// confirmation is the byte by which a dialer takes what it was answered.
	confirmation = 1
)

// hello is what a dialer wants: a new session, when the token is zero, or to
// carry the one that has the token.
type hello struct {
	token   token
	carrier uint32        // its number in the session
	outage  time.Duration // how long a new session may be without carriers, in whole seconds
	port    uint16        // at which the dialer listens itself
	// transport is what all carriers of a new session are restricted to, or Auto.
	transport Transport
}

// apart says whether the carrier comes from a port of its own over QUIC: every second
// one that is made does, so that a firewall which lets only the agents' port through,
// or a NAT that has forgotten that one, costs one attempt.
func (h hello) apart() bool { return h.carrier/2%2 == 1 }

func (h hello) append(b []byte) []byte {
	b = appendGreetHead(b, helloSize)
	b = append(b, h.token[:]...)
	b = binary.BigEndian.AppendUint32(b, h.carrier)
	b = binary.BigEndian.AppendUint32(b, uint32(min(h.outage/time.Second, math.MaxUint32)))
	b = binary.BigEndian.AppendUint16(b, h.port)
	return append(b, byte(h.transport))
}

// readHello reads a hello and not a byte more.
func readHello(r io.Reader) (hello, error) {
	b, err := readGreeted(r, helloSize)
	if err != nil {
		return hello{}, err
	}
	h := hello{token: token(b)}
	b = b[len(h.token):]
	h.carrier = binary.BigEndian.Uint32(b)
	h.outage = time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Second
	h.port = binary.BigEndian.Uint16(b[8:])
	if h.transport = Transport(b[10]); h.transport > TCP {
		return hello{}, fmt.Errorf("%w: a session over unknown transport %d", ErrFormat, b[10])
	}
	return h, nil
}

// status is what a listener makes of a hello.
type status uint8

const (
	welcome status = iota
	noSession
	busy
	crowded
)

// answer is what a listener says to a hello. The token is that of the session.
type answer struct {
	status status
	token  token
}

func (a answer) append(b []byte) []byte {
	b = append(appendGreetHead(b, answerSize), byte(a.status))
	return append(b, a.token[:]...)
}

// readAnswer reads an answer and not a byte more.
func readAnswer(r io.Reader) (answer, error) {
	b, err := readGreeted(r, answerSize)
	if err != nil {
		return answer{}, err
	}
	return answer{status(b[0]), token(b[1:])}, nil
}

// err returns what the answer means for the dialer, nil for a welcome.
func (a answer) err() error {
	switch a.status {
	case welcome:
		return nil
	case noSession:
		return errNoSession
	case busy:
		return ErrBusy
	case crowded:
		return errTooMany
	}
	return fmt.Errorf("%w: unknown answer %d", ErrVersion, a.status)
}

func appendGreetHead(b []byte, size int) []byte {
	return binary.BigEndian.AppendUint16(append(b, greetingVersion), uint16(size))
}

// readGreeted reads the head of a greeting and what it announces, which must
// be least bytes or more.
func readGreeted(r io.Reader, least int) ([]byte, error) {
	var head [greetHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, cutGreeting(err)
	}
	if head[0] < greetingVersion {
		return nil, fmt.Errorf("%w: greeting of version %d", ErrFormat, head[0])
	}
	size := int(binary.BigEndian.Uint16(head[1:]))
	if size < least || size > maxGreeting {
		return nil, fmt.Errorf("%w: greeting of %d bytes, allowed are %d to %d", ErrFormat, size, least, maxGreeting)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, cutGreeting(err)
	}
	return b, nil
}

// readConfirmation reads the byte that ends the greetings.
func readConfirmation(r io.Reader) error {
	var b [1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return cutGreeting(err)
	}
	if b[0] != confirmation {
		return fmt.Errorf("%w: %#02x instead of a confirmation", ErrFormat, b[0])
	}
	return nil
}

var errIncomplete = fmt.Errorf("%w: incomplete greeting", ErrFormat)

// cutGreeting says that a stream which ends here ends too early.
func cutGreeting(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errIncomplete
	}
	return err
}
