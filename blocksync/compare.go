package blocksync

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// ErrDiffers is returned when the disk at the destination is not the source's.
var ErrDiffers = errors.New("the disk at the destination differs from the source's")

// comparison is the destination's part of a verification.
type comparison struct {
	mu   sync.Mutex
	same bitmap // segments that were found the same, and not written since
}

// changed notes that an extent is written. Its writer has begun, so that no
// check of it is under way.
func (t *Target) changed(e extent) {
	if t.compare != nil {
		t.compare.mu.Lock()
		defer t.compare.mu.Unlock()
		t.compare.same.clear(e.offset/segment, segmentsIn(e.end()))
	}
}

// check compares segments, each when what was sent of it before is written.
func (t *Target) check(ctx context.Context, acks frameWriter, w *writers, body []byte) error {
	last, checks, err := parseChecks(body, segmentsIn(t.dev.Size()))
	if err == nil && t.compare == nil {
		err = fmt.Errorf("%w: a check of a disk that is not to be verified", ErrFrame)
	}
	if err != nil {
		return err
	}
	t.wipe(w, 0, pagesIn(t.dev.Size())) // the source has mentioned all by now
	results := make([]result, len(checks))
	var left atomic.Int64
	left.Store(int64(len(checks)))
	for i, c := range checks {
		e := segmentAt(c.segment, t.dev.Size())
		buf := w.begin(e)
		w.run(e, buf, func() error {
			if int64(cap(*buf)) < e.length {
				*buf = make([]byte, segment)
			}
			sum, err := digest(ctx, t.dev, e, (*buf)[:e.length])
			if err != nil {
				return err
			}
			results[i] = result{c.segment, sum == c.sum}
			if results[i].same {
				t.compare.mu.Lock()
				t.compare.same.set(c.segment, c.segment+1)
				t.compare.mu.Unlock()
			}
			switch {
			case last && !results[i].same:
				return fmt.Errorf("%w in the %d bytes at %d: look at the storage of both hosts, and move the guest again with --fresh", ErrDiffers, e.length, e.offset)
			case left.Add(-1) == 0:
				if err := acks.Send(ctx, appendResults(nil, results)); err != nil {
					return fmt.Errorf("answer a check: %w", err)
				}
			}
			return nil
		})
	}
	return nil
}

// compared tells what was not, of a disk that is complete.
func (t *Target) compared() error {
	if t.compare == nil {
		return nil
	}
	t.compare.mu.Lock()
	defer t.compare.mu.Unlock()
	n := segmentsIn(t.dev.Size())
	if i := t.compare.same.nextClear(0, n); i < n {
		return fmt.Errorf("%w: the disk is said to be complete, and the %d bytes at %d were not compared", ErrFrame, segment, i*segment)
	}
	return nil
}
