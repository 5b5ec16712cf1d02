package memsync

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// messages follows the messages of a return path.
type messages struct {
	head [8]byte // type, length and the first bytes of the payload
	n    int     // bytes of the message so far
	raw  bool    // a bitmap follows, of a length that only QEMU knows

	shut   bool   // a whole SHUT has passed
	status uint32 // its payload
}

// next returns how many bytes at the start of p belong to the current message.
func (m *messages) next(p []byte) int {
	if m.raw {
		return len(p)
	}
	used := 0
	for used < len(p) {
		want := 4
		if m.n >= 4 {
			want += int(binary.BigEndian.Uint16(m.head[2:]))
		}
		k := min(want-m.n, len(p)-used)
		if m.n < len(m.head) {
			copy(m.head[m.n:], p[used:used+k])
		}
		m.n += k
		used += k
		if m.n >= 4 && m.n == 4+int(binary.BigEndian.Uint16(m.head[2:])) {
			m.finish()
			return used
		}
	}
	return used
}

func (m *messages) finish() {
	switch binary.BigEndian.Uint16(m.head[:]) {
	case messageShut:
		if m.n == 8 {
			m.shut, m.status = true, binary.BigEndian.Uint32(m.head[4:])
		}
	case messageBitmap:
		m.raw = true
	}
	m.n = 0
}

// boundary tells whether a message of one's own may follow.
func (m *messages) boundary() bool { return m.n == 0 && !m.raw }

// loaded tells whether the destination QEMU has said that it has the state.
func (m *messages) loaded() bool { return m.shut && m.status == 0 }

// answers writes the return path of the source QEMU.
type answers struct {
	held   func(body []byte) error // takes an answer to an offer
	passed func(body []byte) error // takes an answer to a mark

	mu     sync.Mutex
	qemu   io.Writer
	seen   messages
	used   bool // the destination has answered
	due    bool // the own SHUT is to be written at the next boundary
	own    bool // the own SHUT is written
	closed bool // nothing more goes to QEMU
}

var shutMessage = []byte{0, messageShut, 0, 4, 0, 0, 0, 0}

// run relays frames until the destination ends them or ctx is done.
func (a *answers) run(ctx context.Context, frames frameReader) error {
	var buf []byte
	for {
		frame, err := frames.Recv(ctx, buf)
		if err != nil {
			return err
		}
		buf = frame
		switch {
		case len(frame) > 0 && frame[0] == frameHeld:
			if err := a.held(frame[1:]); err != nil {
				return err
			}
		case len(frame) > 0 && frame[0] == framePassed:
			if err := a.passed(frame[1:]); err != nil {
				return err
			}
		case len(frame) < 2 || len(frame) > 1+maxReturn || frame[0] != frameReturn:
			return fmt.Errorf("%w: %d bytes on the return path", ErrFrame, len(frame))
		default:
			a.relay(frame[1:])
		}
	}
}

func (a *answers) relay(p []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.used = true
	for len(p) > 0 && !a.closed {
		n := a.seen.next(p)
		a.write(p[:n])
		p = p[n:]
		a.shutIfDue()
	}
}

// shut answers QEMU in place of the destination, at the next boundary between
// messages. What the destination sends later is dropped.
func (a *answers) shut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.due = true
	a.shutIfDue()
}

func (a *answers) shutIfDue() {
	if a.seen.shut {
		a.closed = true
	}
	if a.due && !a.closed && a.seen.boundary() {
		a.write(shutMessage)
		a.own, a.closed = true, true
	}
}

// write gives up on the return path when QEMU does: how the stream itself ends
// says whether the migration has failed.
func (a *answers) write(p []byte) {
	if _, err := a.qemu.Write(p); err != nil {
		a.closed = true
	}
}

// answered tells whether QEMU has its SHUT, and whether it came from the
// destination with good news.
func (a *answers) answered() (own, loaded, used bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.own, a.seen.loaded(), a.used
}
