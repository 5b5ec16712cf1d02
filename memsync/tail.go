package memsync

import (
	"context"
	"fmt"
	"sync"
)

// tail holds back the end of a stream until its gate is open.
type tail struct {
	write func([]byte) error
	done  chan struct{} // closed when the gate is open and all that was held is written

	mu   sync.Mutex
	held []byte
	open bool
}

// newTail waits for gate and then writes what was put meanwhile. An error ends
// the caller through cancel.
func newTail(gate func() error, write func([]byte) error, cancel context.CancelCauseFunc) *tail {
	t := &tail{write: write, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		if err := gate(); err != nil {
			cancel(fmt.Errorf("wait for the disks: %w", err))
			return
		}
		if err := t.release(); err != nil {
			cancel(err)
		}
	}()
	return t
}

func (t *tail) release() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open = true
	held := t.held
	t.held = nil
	if len(held) == 0 {
		return nil
	}
	return t.write(held)
}

// put writes p, or holds a copy of it. It waits for the gate when it holds
// maxTail bytes.
func (t *tail) put(ctx context.Context, p []byte) error {
	if !t.hold(p) {
		if err := t.opened(ctx); err != nil {
			return err
		}
		return t.write(p)
	}
	return nil
}

// hold tells whether p could be held.
func (t *tail) hold(p []byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open || len(t.held)+len(p) > maxTail {
		return false
	}
	t.held = append(t.held, p...)
	return true
}

// opened waits until the gate is open and nothing is held.
func (t *tail) opened(ctx context.Context) error {
	select {
	case <-t.done:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wait returns when the goroutine of newTail has ended.
func (t *tail) wait() { <-t.done }
