package tunnel

import (
	"context"
	"errors"
	"os"
	"time"
)

var longAgo = time.Unix(1, 0)

// interruptible runs op, which reads or writes a stream, and lets ctx end it by
// setting the stream's deadline.
func interruptible(ctx context.Context, setDeadline func(time.Time) error, op func() error) error {
	if ctx.Err() != nil {
		return os.ErrDeadlineExceeded
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		setDeadline(longAgo)
		close(fired)
	})
	err := op()
	if !stop() {
		<-fired
		setDeadline(time.Time{})
	}
	return err
}

func interrupted(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
