package main

import (
	"log/slog"
	"sync"
	"time"

	"github.com/wanmig/wanmig/lab/guest/api"
)

const (
	maxRate = 10 << 30 // bytes per second

	verifyPages  = 256                    // per second, besides what it is told to verify
	verifyBlocks = 8                      // per second and disk
	verifyEvery  = 500 * time.Millisecond // seldom: to wake up costs an emulated CPU more than what it does then

	batch = 250 * time.Millisecond // of blocks written before an fsync
)

// load is the work asked for, and the workers that do it.
type load struct {
	mu      sync.Mutex
	now     api.Load
	changed sync.Cond // of mu
	memory  *memory
	disks   []*disk
}

func newLoad(m *memory, disks []*disk) *load {
	l := &load{memory: m, disks: disks}
	l.changed.L = &l.mu
	return l
}

// rate waits until some of a kind of load is asked for, and gives it in steps per second.
func (l *load) rate(of func(api.Load) int64, step float64) func() float64 {
	return func() float64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		for of(l.now) <= 0 {
			l.changed.Wait()
		}
		return float64(of(l.now)) / step
	}
}

func (l *load) get() api.Load {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// set changes the load to what is asked, within what the guest has.
func (l *load) set(want api.Load) {
	l.mu.Lock()
	defer l.mu.Unlock()
	want.Dirty = min(want.Dirty, maxRate)
	want.Edit = min(want.Edit, maxRate)
	want.Write = min(want.Write, maxRate)
	if want.WorkingSet != l.now.WorkingSet {
		want.WorkingSet = l.memory.setWorkingSet(want.WorkingSet)
	}
	l.now = want
	l.changed.Broadcast()
}

// start runs the workers for as long as the guest lives.
func (l *load) start() {
	go pace(10*time.Millisecond, l.rate(func(w api.Load) int64 { return w.Dirty }, api.PageSize), func(n int64) {
		for range n {
			l.memory.dirty()
		}
	})
	go pace(10*time.Millisecond, l.rate(func(w api.Load) int64 { return w.Edit }, api.PageSize), func(n int64) {
		for range n {
			l.memory.edit()
		}
	})
	go pace(verifyEvery, func() float64 { return verifyPages }, func(n int64) {
		for range n {
			l.memory.verifyNext()
		}
	})
	for _, d := range l.disks {
		if d.ring == nil {
			continue
		}
		go pace(batch, l.rate(func(w api.Load) int64 { return w.Write }, api.BlockSize), func(n int64) {
			if err := d.put(n); err != nil {
				slog.Error("disk write", "device", d.counts.Device, "err", err)
				d.fault("%v", err)
				time.Sleep(time.Second)
			}
		})
		go pace(verifyEvery, func() float64 { return verifyBlocks }, func(n int64) {
			for range n {
				d.verifyNext()
			}
		})
	}
}

// pace calls do every interval, for ever, with the number of steps that the rate, in steps per second, has made due since.
// After a pause it does not catch up on more than four intervals.
func pace(interval time.Duration, rate func() float64, do func(n int64)) {
	due := 0.0
	last := monotonic()
	for {
		asked := rate()
		time.Sleep(interval)
		now := monotonic()
		due += asked * min(now-last, 4*interval).Seconds()
		last = now
		if n := int64(due); n > 0 {
			due -= float64(n)
			do(n)
		}
	}
}
