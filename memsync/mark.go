package memsync

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
)

// marks counts the marks that a source has sent, and those that are answered.
type marks struct {
	mu         sync.Mutex
	sent, past uint32
}

// Mark asks the destination to tell when its QEMU has taken all that was sent up to
// now. The function that it returns reports whether that is so. It may be called
// while Run runs, also by several goroutines.
func (s *Source) Mark(ctx context.Context) (passed func() bool, err error) {
	m := &s.marks
	m.mu.Lock()
	m.sent++
	number := m.sent
	m.mu.Unlock()
	if err := s.pipeline.send(ctx, binary.BigEndian.AppendUint32([]byte{frameMark}, number)); err != nil {
		return nil, err
	}
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.past >= number
	}, nil
}

// passed takes an answer.
func (m *marks) passed(body []byte) error {
	if len(body) != numberHeader-1 {
		return fmt.Errorf("%w: an answer of %d bytes to a mark", ErrFrame, len(body))
	}
	number := binary.BigEndian.Uint32(body)
	m.mu.Lock()
	defer m.mu.Unlock()
	if number <= m.past || number > m.sent {
		return fmt.Errorf("%w: an answer to mark %d, of %d, %d being answered", ErrFrame, number, m.sent, m.past)
	}
	m.past = number
	return nil
}
