package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrStillLost is returned when the link went while the guest stood still for the
// handoff: the guest goes on at the source, however long the link may be gone at
// other times.
var ErrStillLost = errors.New("the destination did not answer while the guest was stopped for the handoff, so it goes on here: move it again when the link holds")

const (
	// vigilEvery is how often the destination is asked, and quiet when an answer is
	// so late that nothing should begin that needs the link.
	vigilEvery = 250 * time.Millisecond
	quiet      = 1500 * time.Millisecond
	// stillWait is how long a guest stands still for a destination that does not answer.
	stillWait = 10 * time.Second
)

// vigil asks the destination time and again, one question after the other, so that
// the loss of the link is known sooner than a session can afford to tell.
type vigil struct {
	mu     sync.Mutex
	silent bool      // the last question waits for its answer for longer than quiet
	since  time.Time // when silent last changed
}

// keep asks until ctx ends, and after end until no question is on its way out: a
// channel whose Send is interrupted is of no use any more. ask begins to ask, and
// tells when the question has left. From still on the guest stands still: keep then
// returns ErrStillLost when an answer takes longer than stillWait. It returns the
// error of asking.
func (v *vigil) keep(ctx context.Context, still, end <-chan struct{}, ask func() <-chan error, answers <-chan struct{}) error {
	for {
		asked, stopped, ending := ask(), still, end
		late := time.After(quiet)
		var lost <-chan time.Time
		for answered := false; !answered; {
			select {
			case err := <-asked:
				if err != nil && ctx.Err() == nil {
					return fmt.Errorf("session to the destination: %w", err)
				}
				if asked = nil; ending == nil {
					return nil
				}
			case <-answers:
				answered = true
			case <-late:
				v.note(true)
			case <-stopped:
				lost, stopped = time.After(stillWait), nil
			case <-lost:
				return fmt.Errorf("%w (no answer for %v)", ErrStillLost, stillWait)
			case <-ending:
				if ending = nil; asked == nil {
					return nil
				}
			case <-ctx.Done():
				return nil
			}
		}
		v.note(false)
		select {
		case <-time.After(vigilEvery):
		case <-end:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

func (v *vigil) note(silent bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.silent != silent {
		v.silent, v.since = silent, time.Now()
	}
}

// isSilent reports whether the destination does not answer just now.
func (v *vigil) isSilent() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.silent
}

// wasSilent reports whether that is so, or was at some time after t.
func (v *vigil) wasSilent(t time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.silent || v.since.After(t)
}

// errSlow is the cause of a context of patience.
var errSlow = errors.New("it takes too long")

// patience ends ctx when d has passed in which the destination answered.
func (v *vigil) patience(ctx context.Context, d time.Duration, end context.CancelCauseFunc) {
	ticker := time.NewTicker(vigilEvery)
	defer ticker.Stop()
	for left := d; left > 0; {
		select {
		case <-ticker.C:
			if !v.isSilent() {
				left -= vigilEvery
			}
		case <-ctx.Done():
			return
		}
	}
	end(errSlow)
}
