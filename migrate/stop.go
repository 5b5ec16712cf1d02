package migrate

import (
	"errors"
	"fmt"
	"time"

	"github.com/wanmig/wanmig/hypervisor"
)

// ErrStalled is returned when a guest dirties its memory faster than the link takes
// it, and the operator wants no other end of that.
var ErrStalled = errors.New("the move does not converge")

const (
	// withheld is the downtime that QEMU is told to aim at while the guest shall run.
	// It multiplies it with what it has sent per millisecond lately, and stops the guest
	// when no more is left. What it sees is our socket, in bursts; so this is but a bound
	// for a guest that hardly writes. Should the product be 0, QEMU would stop the guest
	// without having asked once more which pages are dirty (migration_iteration_run): it
	// aims at withheldLong where the stream was not read for longHold.
	withheld     = time.Millisecond
	withheldLong = 100 * time.Millisecond
	longHold     = 20 * time.Second
	// brakeEvery is how often the link is looked at, and brakePoll whether a stop
	// that is due can be now.
	brakeEvery = 250 * time.Millisecond
	brakePoll  = 10 * time.Millisecond
	ratedEvery = 4 // its rate is taken at every 4th look
	// A guest is quiet when it dirties no more than this part of what the link takes:
	// while the way is cleared for it, little comes together.
	quietPart = 1.0 / 8
	// clearMost is how long that may take; then the next round is judged anew, and may take
	// twice as long: a destination that is so slow would keep a stopped guest waiting too.
	clearMost = 3 * time.Second
)

// brake withholds the stop of a guest until convergence says so. Its methods are
// for one goroutine.
type brake struct {
	sy       *syncer
	converge convergence
	due      bool // the guest shall stop

	quiet    bool          // it may wait until the way is clear
	ahead    []func() bool // what the destination has to have taken; nil: it was not asked
	asked    time.Time
	patience time.Duration // for that

	held time.Duration // as of the last look
	hold time.Duration // for so long nothing was read

	looks  int
	recent recentRate // what the session has sent
	sent   uint64     // by it, in all,
	at     time.Time  // at that time

	first  time.Time // when the first round was judged
	before passed
	ratio  float64 // bytes on the wire for one of memory's content
}

// steer runs the brake until the guest stands still.
func (sy *syncer) steer() {
	b := brake{sy: sy, converge: convergence{goal: sy.s.req.downtime(), onStall: sy.s.req.onStall()}, ratio: 1, patience: clearMost}
	ticker := time.NewTicker(brakeEvery)
	defer ticker.Stop()
	for {
		var poll <-chan time.Time
		if b.due && !sy.released.Load() {
			poll = time.After(brakePoll)
		}
		select {
		case <-sy.newRound:
			b.round(time.Now())
		case now := <-ticker.C:
			b.look(now)
		case <-poll:
		case <-sy.still:
			return
		case <-sy.ctx.Done():
			return
		}
		if b.due && !sy.released.Load() {
			b.release()
		}
	}
}

// withhold keeps QEMU from stopping the guest by what it believes of the link.
func (sy *syncer) withhold(aim time.Duration) {
	if err := sy.s.Host.SetMaxDowntime(sy.ctx, sy.s.dom.UUID, aim); err != nil && sy.ctx.Err() == nil {
		sy.s.log.Warn("libvirt does not take a goal for the downtime: QEMU may stop the guest too early", "error", err)
	}
}

// look takes the link's rate, and takes a release back when the link has gone before
// QEMU stopped the guest.
func (b *brake) look(now time.Time) {
	if b.looks++; b.looks%ratedEvery == 0 {
		sent := b.sy.s.session.Stats().BytesSent
		if dt := now.Sub(b.at).Seconds(); !b.at.IsZero() && dt > 0 {
			b.recent.add(int64(float64(sent-min(b.sent, sent)) / dt))
		}
		b.sent, b.at = sent, now
	}
	if b.sy.released.Load() && b.sy.s.vigil.isSilent() {
		b.withdraw()
		b.sy.withhold(withheld)
		b.sy.released.Store(false)
	}
	b.followHold()
}

// followHold has QEMU aim at more where its stream is not read for long.
func (b *brake) followHold() {
	held, before := time.Duration(b.sy.held.Load()), b.hold
	if b.hold += held - b.held; held == b.held {
		b.hold = 0 // it has been read all the time since the last look
	}
	b.held = held
	switch {
	case b.sy.released.Load():
	case before < longHold && b.hold >= longHold:
		b.sy.withhold(withheldLong)
	case before >= longHold && b.hold == 0:
		b.sy.withhold(withheld)
	}
}

// round judges a round that has begun.
func (b *brake) round(now time.Time) {
	sy := b.sy
	if sy.released.Load() {
		return // it is QEMU's last look before the stop
	}
	job, err := sy.s.Host.JobStats(sy.ctx, sy.s.dom.UUID)
	if err != nil || !job.Active || job.Iteration < 2 {
		return
	}
	r := b.start(now, job)
	sy.roundLeft.Store(r.left)
	v := b.converge.begin(r)
	if v != stopNow {
		b.withdraw()
	}
	begins := v == stopNow && !b.due
	b.due = v == stopNow
	b.quiet = r.takes == 0 || float64(dirtyRate(job)) <= quietPart*float64(r.takes)
	sy.foresee.Store(&r)
	sy.s.move.update(func(st *Status) {
		st.Memory.Stalled = b.converge.stalled
		st.Memory.LinkTakes, st.Memory.PredictedMS = r.takes, r.downtime().Milliseconds()
	})
	switch {
	case begins:
		sy.s.log.Info("the guest may be stopped", "round", job.Iteration, "left", r.left, "link", r.link, "takes", r.takes,
			"predicted_ms", r.downtime().Milliseconds(), "stalled", b.converge.stalled, "throttled", r.throttle)
	case v == giveUp:
		const mib = 1 << 20
		sy.fail(fmt.Errorf("%w: round %d of memory has %.1f MiB left, no less than the rounds before it; the guest dirties %.1f MiB/s and the link takes %.1f; "+
			"the downtime would be %v, and %v is the goal: use --on-stall throttle or stop, a longer --downtime, or move it when it does less",
			ErrStalled, job.Iteration, float64(r.left)/mib, float64(dirtyRate(job))/mib, float64(r.takes)/mib,
			r.downtime().Round(time.Millisecond), b.converge.goal))
	}
}

// start measures what the link takes of this guest, and predicts from that.
func (b *brake) start(now time.Time, job hypervisor.JobStats) roundStart {
	sy, m := b.sy, b.sy.memoryStats()
	if b.first.IsZero() {
		b.first = now
	}
	link := sy.s.session.Stats()
	data, delta := m.Reduction.Data, m.Reduction.Delta
	is := passed{at: now, round: int(job.Iteration), held: time.Duration(sy.held.Load()), memory: int64((m.Pages + m.ZeroPages) * m.PageSize),
		content: int64((data.Pages + delta.Pages) * m.PageSize), frames: int64(data.WireBytes + delta.WireBytes), wire: link.BytesSent}
	if m.Opaque {
		is.memory = int64(m.StreamBytes)
	}
	r := roundStart{at: now.Sub(b.first), left: int64(job.MemoryRemaining), throttle: job.Throttle}
	r.link, r.takes, b.ratio = is.since(b.before, b.recent.most(), b.ratio, sy.pacer.rate.Load() != 0)
	b.before = is
	pending, _ := sy.outboxes()
	r.base = sy.s.overheads.of(sy.s.req.To) + link.MinRTT/2 + max(link.RTT-link.MinRTT, 0)
	if r.link > 0 {
		r.base += time.Duration(float64(pending) / float64(r.link) * float64(time.Second))
	}
	return r
}

// withdraw lets the guest run on.
func (b *brake) withdraw() {
	b.due, b.ahead = false, nil
	b.sy.clearing.Store(false)
}

// clear has the destination take everything that was sent, so that what follows the
// guest's stop has nothing before it: no queue on the link, no pages that its QEMU has not got yet, no
// blocks that are not durable. Meanwhile no more memory is read. It reports whether
// that is done.
func (b *brake) clear() bool {
	sy := b.sy
	memory := sy.memory.Load()
	if b.ahead == nil && memory != nil {
		sy.clearing.Store(true)
		b.asked = time.Now()
		for _, d := range sy.disks {
			b.ahead = append(b.ahead, d.outbox.Settle())
		}
		passed, err := memory.Mark(sy.ctx)
		if err != nil {
			return false // the stream's own error ends the sync
		}
		b.ahead = append(b.ahead, passed)
	}
	if time.Since(b.asked) > b.patience {
		b.patience *= 2
		b.withdraw()
		return false
	}
	for _, done := range b.ahead {
		if !done() {
			return false
		}
	}
	return true
}

// release lets QEMU stop the guest, when nothing else would keep it waiting then.
func (b *brake) release() {
	sy := b.sy
	if l := sy.load(); !l.drained() || l.Silent || b.quiet && !b.clear() {
		return
	}
	sy.released.Store(true) // from now on the stream is read as at its end
	sy.clearing.Store(false)
	if err := sy.s.Host.SetMaxDowntime(sy.ctx, sy.s.dom.UUID, hypervisor.MaxDowntimeLimit); err != nil {
		sy.released.Store(false)
		b.withdraw()
		if sy.ctx.Err() == nil {
			sy.s.log.Warn("libvirt does not let the guest be stopped, the next round is waited for", "error", err)
		}
		return
	}
	if b.ahead != nil {
		sy.s.log.Info("the way is clear", "took_ms", time.Since(b.asked).Milliseconds())
	}
}

// dirtyRate is in bytes per second.
func dirtyRate(job hypervisor.JobStats) int64 { return int64(job.DirtyPages * max(job.PageSize, 4096)) }
