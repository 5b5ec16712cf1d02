package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// pauses measures for how long the guest did not run.
type pauses struct {
	mu      sync.Mutex
	longest time.Duration
	at      time.Duration
	stops   stops
}

// monotonic is the time since boot by CLOCK_MONOTONIC.
func monotonic() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

// tickEvery is no finer: downtime is measured from outside. Each tick costs an emulated CPU most of a millisecond.
const tickEvery = 100 * time.Millisecond

// tick records gaps between the ticks of a ticker, for ever.
func (p *pauses) tick() {
	last := monotonic()
	for {
		time.Sleep(tickEvery)
		now := monotonic()
		p.mu.Lock()
		if gap := now - last; gap > p.longest {
			p.longest, p.at = gap, now
		}
		p.mu.Unlock()
		last = now
	}
}

// watchRTC records stops of the whole VM until the real-time clock fails. The clock interrupts when its second changes;
// it runs on the host's time, also while the VM does not.
func (p *pauses) watchRTC() error {
	f, err := os.Open("/dev/rtc0")
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd()) // blocking reads
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RTC_UIE_ON, 0); errno != 0 {
		return fmt.Errorf("real-time clock: update interrupts: %w", errno)
	}
	var b [8]byte
	for {
		if n, err := unix.Read(fd, b[:]); err != nil || n != len(b) {
			return fmt.Errorf("read the real-time clock: %d bytes, %w", n, err)
		}
		now := monotonic()
		t, err := unix.IoctlGetRTCTime(fd)
		if err != nil {
			return fmt.Errorf("read the real-time clock: %w", err)
		}
		wall := time.Date(int(t.Year)+1900, time.Month(t.Mon+1), int(t.Mday), int(t.Hour), int(t.Min), int(t.Sec), 0, time.UTC)
		p.mu.Lock()
		p.stops.edge(wall.Sub(time.Unix(0, 0)), now)
		p.mu.Unlock()
	}
}

const (
	// minStop is the shortest stop that can be told from late interrupts and from drift.
	minStop = 5 * time.Millisecond
	// settleReadings are taken before a rise counts, and settleTime after a stop a rise belongs to that stop: the first
	// readings may have been late.
	settleReadings = 5
	settleTime     = 3 * time.Second
)

// stops finds stops in pairs of readings: of a clock that runs always and of one that stands still in a stop. A late
// reading lowers the difference for once; only a stop raises it for good.
type stops struct {
	readings int
	since    time.Duration // when readings began to count
	ahead    time.Duration // the largest difference so far
	count    int64
	last     time.Duration // length of the last stop, and when it was
	lastAt   time.Duration
	longest  time.Duration
	at       time.Duration
}

func (s *stops) edge(always, running time.Duration) {
	ahead := always - running
	gained := ahead - s.ahead
	s.readings++
	if s.readings == 1 || gained > 0 {
		s.ahead = ahead
	}
	if s.readings == settleReadings {
		s.since = running
	}
	if s.readings <= settleReadings || gained <= 0 {
		return
	}
	switch {
	case s.count > 0 && running-s.lastAt < settleTime:
		s.last += gained
	case gained >= minStop:
		s.count++
		s.last, s.lastAt = gained, running
	default:
		return
	}
	if s.last > s.longest {
		s.longest, s.at = s.last, s.lastAt
	}
}

func (p *pauses) report() api.PauseReport {
	p.mu.Lock()
	defer p.mu.Unlock()
	return api.PauseReport{
		LongestMS:       milliseconds(p.longest),
		LongestAtMS:     p.at.Milliseconds(),
		StopsSinceMS:    p.stops.since.Milliseconds(),
		Stops:           p.stops.count,
		LongestStopMS:   milliseconds(p.stops.longest),
		LongestStopAtMS: p.stops.at.Milliseconds(),
	}
}

// milliseconds is d with three decimals.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
