package migrate

import (
	"context"
	"sync/atomic"
	"time"
)

const (
	// paceBurst is how far the reading may be behind its rate and catch up.
	paceBurst = 50 * time.Millisecond
	// paceStep is how soon a new rate, or the guest's stop, is noticed.
	paceStep = 5 * time.Millisecond
)

// pacer spaces what is read of QEMU's stream.
type pacer struct {
	rate atomic.Int64 // bytes per second; 0: no limit
	due  time.Time    // when what was read may have been; of the reading goroutine
}

// wait returns when n more bytes that were read fit the rate, or urgent says so.
func (p *pacer) wait(ctx context.Context, n int, urgent func() bool) error {
	rate := p.rate.Load()
	if rate == 0 {
		return nil
	}
	now := time.Now()
	if p.due.Before(now.Add(-paceBurst)) {
		p.due = now.Add(-paceBurst)
	}
	p.due = p.due.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	for ; now.Before(p.due) && !urgent() && p.rate.Load() == rate; now = time.Now() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(min(p.due.Sub(now), paceStep)):
		}
	}
	return nil
}
