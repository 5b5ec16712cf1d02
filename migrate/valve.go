package migrate

import (
	"context"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

// valve is the memory channel of a source. When a move fails with the guest stopped,
// QEMU is left to end its migration, into nothing, and the guest goes on by libvirt's
// Confirm. QEMU 7.2 crashes when it is cancelled, or loses a socket, while it lets go
// of its disks (assertion on BDRV_O_INACTIVE), and the guest with it.
type valve struct {
	ch *tunnel.Channel
	sy *syncer
}

const (
	// stopSoon is how long a guest may take to stop that was let go.
	stopSoon = 2 * time.Second
	// lastWait is how long QEMU may take to end when what it sends goes nowhere.
	lastWait = 20 * time.Second
)

func (v valve) Send(ctx context.Context, frame []byte) error {
	if v.sy.shut.Err() != nil {
		return nil
	}
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.sy.shut, cancel)()
	err := v.ch.Send(inner, frame)
	if err != nil && ctx.Err() == nil && v.sy.lose(err) {
		return nil
	}
	return err
}

func (v valve) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	frame, err := v.ch.Recv(ctx, buf)
	if err != nil && ctx.Err() == nil && v.sy.lose(err) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	return frame, err
}

// lose ends a move whose memory channel fails while the guest stands still, and
// reports whether that is so. What QEMU sent is not whole at the destination then.
func (sy *syncer) lose(err error) bool {
	if sy.stopAt.Load() == 0 {
		return false
	}
	sy.lost.CompareAndSwap(nil, &err)
	sy.close()
	sy.work.Go(func() { sy.fail(err) })
	return true
}

// letQEMUEnd waits for Perform, if the guest has been stopped for the handoff or is
// about to be.
func (sy *syncer) letQEMUEnd() {
	if sy.released.Load() {
		select {
		case <-sy.still:
		case <-sy.over:
		case <-time.After(stopSoon):
		}
	}
	if sy.stopAt.Load() == 0 {
		return
	}
	sy.close()
	select {
	case <-sy.over:
	case <-time.After(lastWait):
		sy.s.log.Warn("QEMU does not end its migration, it is cancelled")
	}
}
