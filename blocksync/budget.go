package blocksync

import (
	"fmt"
	"os"
	"sync"
)

const (
	// blockSize is the unit in which an outbox keeps content. It is the default
	// granularity of QEMU's mirror and the default cluster size of qcow2.
	blockSize  = 64 << 10
	sectorSize = 512
	sectors    = blockSize / sectorSize
)

type buffer [blockSize]byte

// Budget is what the outboxes of a move may hold together: memory first, then a
// spool file.
type Budget struct {
	mu      sync.Mutex
	change  signal
	free    []*buffer
	buffers int // that may still be made

	file    spoolFile
	holes   []int64 // free slots below next
	next    int64   // first slot never used
	limit   int64   // slots that may be used
	problem error
}

// spoolFile is the part of os.File that a spool needs.
type spoolFile interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Close() error
}

// noSlot is where a block is that lies in memory.
const noSlot = -1

// NewBudget allows memory bytes (at least one block of 64 KiB) and, when spool
// is not 0, a file of spool bytes in dir. The file has no name there: it is gone
// when it is closed, also by a crash.
func NewBudget(memory int64, dir string, spool int64) (*Budget, error) {
	b := &Budget{buffers: int(max(memory/blockSize, 1)), limit: spool / blockSize}
	if b.limit == 0 {
		return b, nil
	}
	f, err := os.CreateTemp(dir, "wanmig-spool-*")
	if err != nil {
		return nil, fmt.Errorf("create spool file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("remove the spool file's name: %w", err)
	}
	b.file = f
	return b, nil
}

// Close frees the spool file. No outbox of the budget may be in use any more.
func (b *Budget) Close() error {
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}

// Problem returns why the spool file takes less than it was allowed to, or nil.
// The move goes on: what does not fit makes the mirror wait.
func (b *Budget) Problem() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.problem
}

// reserve returns a buffer, else a slot of the spool file, else a channel that
// is closed when there may be room again.
func (b *Budget) reserve() (*buffer, int64, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch n := len(b.free); {
	case n > 0:
		buf := b.free[n-1]
		b.free = b.free[:n-1]
		return buf, noSlot, nil
	case b.buffers > 0:
		b.buffers--
		return new(buffer), noSlot, nil
	}
	switch n := len(b.holes); {
	case n > 0:
		slot := b.holes[n-1]
		b.holes = b.holes[:n-1]
		return nil, slot, nil
	case b.next < b.limit:
		b.next++
		return nil, b.next - 1, nil
	}
	return nil, noSlot, b.change.wait()
}

// release gives back what reserve returned.
func (b *Budget) release(buf *buffer, slot int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if buf != nil {
		b.free = append(b.free, buf)
	} else {
		b.holes = append(b.holes, slot)
	}
	b.change.broadcast()
}

// write puts p into a slot. A slot that can't be written is not used again, and
// the file does not grow any more: what it holds is still good, so this is a
// file that is full earlier than it was allowed to be.
func (b *Budget) write(slot int64, at int, p []byte) error {
	_, err := b.file.WriteAt(p, slot*blockSize+int64(at))
	if err != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.limit = b.next
		b.problem = fmt.Errorf("write spool file: %w", err)
		return b.problem
	}
	return nil
}

// read gets len(p) bytes that were written to a slot.
func (b *Budget) read(slot int64, at int, p []byte) error {
	if _, err := b.file.ReadAt(p, slot*blockSize+int64(at)); err != nil {
		return fmt.Errorf("read spool file: %w", err)
	}
	return nil
}

// signal wakes all who wait for a change of what a mutex protects.
type signal struct{ ch chan struct{} }

func (s *signal) wait() <-chan struct{} {
	if s.ch == nil {
		s.ch = make(chan struct{})
	}
	return s.ch
}

func (s *signal) broadcast() {
	if s.ch != nil {
		close(s.ch)
		s.ch = nil
	}
}
