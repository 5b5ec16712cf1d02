package migrate

import (
	"time"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/memsync"
)

const (
	meterEvery = 250 * time.Millisecond
	jobEvery   = 4 // libvirt is asked at every 4th tick
)

// gauge makes a steady rate of a growing count: a moving average over about
// two seconds.
type gauge struct {
	last int64
	at   time.Time
	rate float64
}

func (g *gauge) add(count int64, now time.Time) int64 {
	if !g.at.IsZero() {
		if dt := now.Sub(g.at).Seconds(); dt > 0 {
			const window = 2.0
			w := min(1, dt/window)
			g.rate += w * (float64(count-g.last)/dt - g.rate)
		}
	}
	g.last, g.at = count, now
	return int64(g.rate)
}

// meter keeps the move's status up to date until the sync ends.
func (sy *syncer) meter() {
	disks := make([]gauge, len(sy.disks))
	var stream, drain gauge
	ticker := time.NewTicker(meterEvery)
	defer ticker.Stop()
	for tick := 0; ; tick++ {
		select {
		case <-sy.ctx.Done():
			sy.show(disks, &stream, &drain)
			return
		case <-ticker.C:
		}
		sy.show(disks, &stream, &drain)
		if tick%jobEvery == 0 {
			sy.showJob()
		}
	}
}

// show takes the counts of every part into the status.
func (sy *syncer) show(gauges []gauge, stream, drain *gauge) {
	now := time.Now()
	mem := sy.memoryStats()
	disks := make([]Disk, len(sy.disks))
	var left, sent int64
	for i, d := range sy.disks {
		o := d.outbox.Stats()
		// Blocks that the guest writes again are applied again: what is done is
		// then all that does not wait.
		done := min(o.Applied, d.Size-o.Pending())
		disks[i] = Disk{Target: d.Target, Size: d.Size, Read: o.Accepted, Pending: o.Pending(), Spooled: o.PendingSpool,
			Done: done, Sent: o.SentData + o.Held, Held: o.Held, Wire: o.Wire, Rate: gauges[i].add(o.Applied, now),
			Verified: o.Verified, Reduction: o.Reduction}
		if o.SpoolProblem != nil {
			disks[i].Problem = o.SpoolProblem.Error()
		}
		left += d.Size - done
		sent += o.SentData + o.Held
	}
	sy.diskRate.Store(drain.add(sent, now))
	sy.s.move.update(func(st *Status) {
		st.Disks = disks
		st.Memory.Size, st.Memory.Stream, st.Memory.Wire = int64(mem.RAMBytes), int64(mem.StreamBytes), int64(mem.WireBytes)
		st.Memory.Rate = stream.add(int64(mem.StreamBytes), now)
		st.Memory.Opaque = mem.Opaque
		st.Memory.Reduction = memoryReduction(mem.Reduction, mem.PageSize)
		st.Memory.Held = mem.RAMBytes > 0 && st.Phase == PhaseSync && !memoryMayRead(sy.load())
		if mem.StreamBytes > 0 && st.Memory.Round == 0 {
			st.Memory.Round = 1
		}
		if st.Memory.Round <= 1 {
			st.Memory.Remaining = int64(mem.UnseenPages * mem.PageSize)
		}
		st.ETAMS = eta(st, left).Milliseconds()
	})
}

// memoryReduction is nil before the first page.
func memoryReduction(r memsync.Reduction, pageSize uint64) *MemoryReduction {
	of := func(c memsync.Count) Reduced {
		return Reduced{Pages: int64(c.Pages), Bytes: int64(c.Pages * pageSize), Wire: int64(c.WireBytes)}
	}
	m := MemoryReduction{Zero: of(r.Zero), Reference: of(r.Reference),
		Disk: of(r.Disk), Seed: of(r.Seed), Old: of(r.Old), Delta: of(r.Delta), Data: of(r.Data)}
	if m == (MemoryReduction{}) {
		return nil
	}
	return &m
}

// showJob adds what only QEMU knows: rounds, dirty rate and what remains.
func (sy *syncer) showJob() {
	job, err := sy.s.Host.JobStats(sy.ctx, sy.s.dom.UUID)
	if err != nil || !job.Active {
		return
	}
	sy.adapt(job)
	if job.Iteration > 1 {
		sy.roundLeft.Store(int64(job.MemoryRemaining))
	}
	sy.s.move.update(func(st *Status) {
		st.Memory.Round = max(st.Memory.Round, int(job.Iteration))
		st.Memory.DirtyRate, st.Memory.Throttled = dirtyRate(job), job.Throttle
		if job.Iteration > 1 {
			st.Memory.Remaining = int64(job.MemoryRemaining)
		}
	})
}

// adapt paces the rounds of a move whose rate is "auto".
func (sy *syncer) adapt(job hypervisor.JobStats) {
	now, read := time.Now(), int64(sy.memoryStats().StreamBytes)
	got := float64(read-sy.readBefore) / now.Sub(sy.readAt).Seconds()
	sy.readBefore, sy.readAt = read, now
	held := sy.heldBack.Swap(false)
	l := sy.s.move.Limit()
	if !l.Auto {
		sy.pacer.rate.Store(0)
		return
	}
	sy.adaptive.least, sy.adaptive.most = l.Least.Bytes(), l.Most.Bytes()
	rate, full := sy.adaptive.follow(roundSample{round: int(job.Iteration), dirty: dirtyRate(job),
		left: int64(job.MemoryRemaining), got: int64(got), held: held})
	sy.pacer.rate.Store(rate)
	if full && !sy.fullSpeed.Swap(true) {
		sy.s.log.Info("the rest of memory goes at full speed", "round", job.Iteration)
		sy.s.rates.apply(now)
	}
}

// eta estimates the time left, or zero when there is too little to go by. The
// dirty rate lengthens memory's part as in a geometric series (Clark 2005).
func eta(st *Status, diskLeft int64) time.Duration {
	var diskRate int64
	for _, d := range st.Disks {
		diskRate += d.Rate
	}
	var s float64
	if diskLeft > 0 {
		if diskRate == 0 {
			return 0
		}
		s = float64(diskLeft) / float64(diskRate)
	}
	memoryRate := max(st.Memory.Rate, diskRate) // before memory began, disks tell what the link gives
	left := st.Memory.Remaining
	if st.Memory.Size == 0 || memoryRate == 0 {
		return time.Duration(s * float64(time.Second))
	}
	m := float64(left) / float64(memoryRate)
	if d := float64(st.Memory.DirtyRate) / float64(memoryRate); d < 0.9 {
		m /= 1 - d
	} else {
		return 0 // it does not converge at this rate
	}
	return time.Duration((s + m) * float64(time.Second))
}
