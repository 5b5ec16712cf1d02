package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ErrStillLost is returned when the link went while the guest stood still for the
// handoff: the guest goes on at the source, however long the link may be gone at
// other times.
var ErrStillLost = errors.New("the destination did not answer while the guest was stopped for the handoff, so it goes on here: move it again when the link holds")

const (
	// silence is how long a guest stands still for a destination that does not answer.
	silence = 10 * time.Second
	// vigilEvery is how often it is asked.
	vigilEvery = time.Second
)

// vigil is held while the guest stands still and the decision is not given away.
// ask begins to ask the destination something, and tells when the question has left;
// there is one at a time. vigil returns ErrStillLost when an answer takes longer than
// silence, and the error of asking. It returns nil when ctx ends, and after end when no
// question is on its way out: a channel whose Send is interrupted is of no use any more.
func vigil(ctx context.Context, end <-chan struct{}, ask func() <-chan error, answers <-chan struct{}) error {
	for {
		late := time.After(silence)
		asked, ending := ask(), end
		for answered := false; !answered; {
			select {
			case err := <-asked:
				if err != nil && ctx.Err() == nil {
					return fmt.Errorf("session to the destination: %w", err)
				}
				if asked = nil; ending == nil {
					return nil
				}
			case <-ending:
				if ending = nil; asked == nil {
					return nil
				}
			case <-answers:
				answered = true
			case <-late:
				return fmt.Errorf("%w (no answer for %v)", ErrStillLost, silence)
			case <-ctx.Done():
				return nil
			}
		}
		select {
		case <-time.After(vigilEvery):
		case <-end:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}
