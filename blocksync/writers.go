package blocksync

import (
	"context"
	"sync"
)

// maxWriters is how many extents are written at once.
const maxWriters = 16

// writers applies extents concurrently, but never two that overlap: the later
// one waits for the earlier.
type writers struct {
	ctx    context.Context
	cancel context.CancelCauseFunc // of ctx, at the first error

	mu      sync.Mutex
	ended   *sync.Cond
	running []extent
	buffers []*[]byte
	err     error
}

func newWriters(ctx context.Context, cancel context.CancelCauseFunc) *writers {
	w := &writers{ctx: ctx, cancel: cancel}
	w.ended = sync.NewCond(&w.mu)
	return w
}

// begin waits until e may be written and returns a buffer for its content. Its
// writer is run or, when it is not written after all, end.
func (w *writers) begin(e extent) *[]byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.running) == maxWriters || w.overlaps(e) {
		w.ended.Wait()
	}
	w.running = append(w.running, e)
	if n := len(w.buffers); n > 0 {
		buf := w.buffers[n-1]
		w.buffers = w.buffers[:n-1]
		return buf
	}
	return new([]byte)
}

func (w *writers) overlaps(e extent) bool {
	for _, r := range w.running {
		if e.offset < r.end() && r.offset < e.end() {
			return true
		}
	}
	return false
}

// run calls write for e, begun before, in its own goroutine; after an error no
// more.
func (w *writers) run(e extent, buf *[]byte, write func() error) {
	go func() {
		var err error
		if w.ctx.Err() == nil {
			err = write()
		}
		w.end(e, buf, err)
	}()
}

func (w *writers) end(e extent, buf *[]byte, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, r := range w.running {
		if r == e {
			w.running[i] = w.running[len(w.running)-1]
			w.running = w.running[:len(w.running)-1]
			break
		}
	}
	w.buffers = append(w.buffers, buf)
	if err != nil && w.err == nil {
		w.err = err
		w.cancel(err)
	}
	w.ended.Broadcast()
}

// wait returns when nothing is written any more, with the first error.
func (w *writers) wait() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.running) > 0 {
		w.ended.Wait()
	}
	return w.err
}
