package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/wanmig/wanmig/migrate"
)

// lineEvery is how often a move is reported where there is no terminal.
const lineEvery = 5 * time.Second

// lines shows a move as a line now and then, at each change of phase, and when its
// link goes and comes.
type lines struct {
	w       io.Writer
	now     func() time.Time
	phase   migrate.Phase
	lost    bool
	printed time.Time
	paused  bool
}

func (l *lines) show(m migrate.Status) {
	now := l.now()
	since, _ := lost(m, now)
	gone := since != ""
	if l.paused || (m.Phase == l.phase && gone == l.lost && now.Sub(l.printed) < lineEvery) {
		return
	}
	l.phase, l.lost, l.printed = m.Phase, gone, now
	fmt.Fprintln(l.w, progressLine(m, now))
}

func (l *lines) say(message string) { fmt.Fprintln(l.w, message) }
func (l *lines) pause()             { l.paused = true }
func (l *lines) resume()            { l.paused = false }
func (l *lines) close()             {}

// progressLine tells in one line how a move stands.
func progressLine(m migrate.Status, now time.Time) string {
	parts := []string{fmt.Sprintf("%s %s: %s", name(m.VM), state(m), clock(elapsed(m, now)))}
	if m.Phase == migrate.PhaseSync || m.Phase == migrate.PhaseHandoff {
		if d := diskTotals(m); d.Size > 0 {
			parts = append(parts, join(", ", "disks "+sizeOf(d.Done, d.Size), unless(d.Pending == 0, size(d.Pending)+" pending"), found(d)))
		}
		for _, d := range m.Disks {
			if d.Problem != "" {
				parts = append(parts, printable(d.Target)+": "+oneLine(d.Problem))
			}
		}
		parts = append(parts, join(", ", "memory "+memoryLeft(m.Memory), memoryRound(m.Memory), held(m.Memory),
			dirtying(m.Memory)), stalled(m.Memory))
		parts = append(parts, speed(m, now), left(m))
	} else {
		since, _ := lost(m, now)
		parts = append(parts, since)
	}
	return join("; ", parts...)
}

// The facts below are shared by the views; an empty one is left out.

func memoryLeft(m migrate.Memory) string {
	if m.Size == 0 {
		return "not begun"
	}
	return size(m.Remaining) + " left"
}

func memoryRound(m migrate.Memory) string {
	return unless(m.Round == 0, fmt.Sprintf("round %d", m.Round))
}

// dirtying is what stalled tells in a stall.
func dirtying(m migrate.Memory) string {
	return unless(m.Stalled, join(", ", unless(m.DirtyRate == 0, "dirty "+rateOf(m.DirtyRate)), throttled(m.Throttled)))
}

// throttled is about the guest's CPUs; the first step of 1 % is no guest's worry.
func throttled(percent int) string {
	return unless(percent <= 1, fmt.Sprintf("guest throttled by %d %%", percent))
}

// stalled tells of a guest that dirties its memory faster than the link takes it.
func stalled(m migrate.Memory) string {
	return unless(!m.Stalled, join(", ", "does not converge: dirty rate "+rateOf(m.DirtyRate), "the link takes "+rateOf(m.LinkTakes)+" of it",
		throttled(m.Throttled), "downtime now "+millis(float64(m.PredictedMS))))
}

// found is how much of a disk's content the destination had.
func found(d migrate.Disk) string {
	return unless(d.Held == 0, percent(d.Held, d.Sent)+" there already")
}

func held(m migrate.Memory) string { return unless(!m.Held, "held for disks") }

func roundTrip(l migrate.Link) string { return unless(l.RTTMS == 0, "RTT "+millis(l.RTTMS)) }

func left(m migrate.Status) string {
	return unless(m.ETAMS == 0 || m.Link.LostSince != nil || m.Phase.Final(), "about "+clock(time.Duration(m.ETAMS)*time.Millisecond)+" left")
}

func unless(absent bool, fact string) string {
	if absent {
		return ""
	}
	return fact
}

// join joins the facts that are there.
func join(separator string, facts ...string) string {
	var there []string
	for _, f := range facts {
		if f != "" {
			there = append(there, f)
		}
	}
	return strings.Join(there, separator)
}
