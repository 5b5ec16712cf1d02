package main

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/wanmig/wanmig/migrate"
)

// size formats a count of bytes.
func size(n int64) string {
	value, unit := scale(n, n)
	return value + " " + unit
}

// sizeOf formats "part of whole" with the unit once where both have the same.
func sizeOf(part, whole int64) string {
	p, pu := scale(part, part)
	w, wu := scale(whole, whole)
	if pu == wu {
		return fmt.Sprintf("%s of %s %s", p, w, wu)
	}
	return fmt.Sprintf("%s %s of %s %s", p, pu, w, wu)
}

// scale formats n in the binary unit that suits the size of like.
func scale(n, like int64) (value, unit string) {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, l := float64(n), float64(like)
	i := 0
	// 999.5 and above would print as 1000.
	for ; max(l, -l) >= 999.5 && i < len(units)-1; i++ {
		v, l = v/1024, l/1024
	}
	if i == 0 || max(v, -v) >= 99.95 {
		return fmt.Sprintf("%.0f", v), units[i]
	}
	return fmt.Sprintf("%.1f", v), units[i]
}

// rateOf formats bytes per second.
func rateOf(n int64) string { return size(n) + "/s" }

// percent formats how much of whole a part is.
func percent(part, whole int64) string {
	if whole <= 0 {
		return ""
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

// span formats a duration.
func span(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Truncate(100*time.Millisecond).Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
}

// clock formats a running time to the second, so that it doesn't jitter.
func clock(d time.Duration) string {
	d = max(d, 0)
	if d < time.Minute {
		return fmt.Sprintf("%d s", int(d.Seconds()))
	}
	return span(d)
}

// millis formats a short time that is given in milliseconds.
func millis(ms float64) string {
	switch {
	case ms < 10:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return span(time.Duration(min(ms, 1e12) * float64(time.Millisecond)))
}

// count formats a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// printable replaces what could drive a terminal: names and messages come from
// guests' definitions and from peers.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}

// oneLine makes a message printable in one line.
func oneLine(s string) string {
	return printable(strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; "))
}

// name formats the name of a VM or site, quoted where its end wouldn't show.
func name(s string) string {
	if s == "" || strings.ContainsFunc(s, unicode.IsSpace) {
		return `"` + printable(s) + `"`
	}
	return printable(s)
}

// state tells where a move stands; a check ends in a phase of a move that
// wasn't one.
func state(m migrate.Status) string {
	if m.Result != nil {
		return printable(m.Result.Result)
	}
	return printable(string(m.Phase))
}

// elapsed returns how long a move took, or takes already.
func elapsed(m migrate.Status, now time.Time) time.Duration {
	if m.Ended != nil {
		now = *m.Ended
	}
	return max(now.Sub(m.Started), 0)
}

// diskTotals adds up the disks of a move.
func diskTotals(m migrate.Status) (t migrate.Disk) {
	for _, d := range m.Disks {
		t.Size += d.Size
		t.Done += d.Done
		t.Pending += d.Pending
		t.Sent += d.Sent
		t.Held += d.Held
	}
	return t
}
