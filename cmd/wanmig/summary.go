package main

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/migrate"
)

// describe tells an operator how a move stands or ended, in several lines.
func describe(m migrate.Status, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "move %s: %s %s %s, %s\n", printable(m.Move), name(m.VM), toOrFrom(m), name(m.Peer),
		join(", ", state(m), clock(elapsed(m, now)), left(m)))
	if m.Result != nil {
		ended := *m.Result
		ended.Redirected = nil // as it was then
		b.WriteString(summary(ended))
		if m.Result.Error != "" {
			fmt.Fprintf(&b, "  error      %s\n", oneLine(m.Result.Error))
		}
		return b.String()
	}
	for _, d := range m.Disks {
		fmt.Fprintf(&b, "  %-10s %s\n", printable(d.Target), join(", ", "done "+sizeOf(d.Done, d.Size), percent(d.Done, d.Size), rateOf(d.Rate),
			unless(d.Pending == 0, size(d.Pending)+" pending"), unless(d.Spooled == 0, size(d.Spooled)+" spooled"), found(d), oneLine(d.Problem)))
	}
	if m.Memory.Size > 0 {
		fmt.Fprintf(&b, "  %-10s %s\n", "memory", join(", ", memoryLeft(m.Memory)+" of "+size(m.Memory.Size), rateOf(m.Memory.Rate),
			memoryRound(m.Memory), held(m.Memory), dirtying(m.Memory)))
		if line := stalled(m.Memory); line != "" {
			fmt.Fprintf(&b, "  %-10s %s\n", "", line)
		}
	}
	if m.Priority != "" {
		fmt.Fprintf(&b, "  %-10s %s\n", "priority", printable(string(m.Priority)))
	}
	if m.Link.Sent > 0 || m.Link.RTTMS > 0 {
		away, waits := lost(m, now)
		fmt.Fprintf(&b, "  %-10s %s\n", "link", join(", ", away, waits, unless(away != "", join(", ", rateOf(m.Link.Rate), roundTrip(m.Link))), limited(m.Link),
			size(int64(m.Link.Sent))+" sent", size(int64(m.Link.Received))+" received",
			unless(m.Link.Resent == 0, size(int64(m.Link.Resent))+" sent again"),
			unless(m.Link.LostMS == 0, "lost for "+span(time.Duration(m.Link.LostMS)*time.Millisecond)+" in all")))
	}
	if c := carriers(m.Link.Carriers); c != "" {
		fmt.Fprintf(&b, "  %-10s %s\n", "carriers", c)
	}
	b.WriteString(findings(m.Findings))
	return b.String()
}

// summary tells an operator how a move ended. Its error is left to the caller.
func summary(r migrate.Result) string {
	var b strings.Builder
	vm, to := name(r.VM), name(r.To)
	switch r.Result {
	case "done":
		fmt.Fprintf(&b, "%s runs at %s.\n", vm, to)
	case "rolled-back":
		fmt.Fprintf(&b, "%s was not moved: it runs at the source%s.\n", vm, leftAt(to, r))
	case "refused":
		fmt.Fprintf(&b, "%s can't be moved to %s as asked; nothing was touched.\n", vm, to)
	case "checked":
		if blocked(r) {
			fmt.Fprintf(&b, "%s can't be moved to %s as asked.\n", vm, to)
		} else {
			fmt.Fprintf(&b, "%s can be moved to %s.\n", vm, to)
		}
	case "in-doubt":
		fmt.Fprintf(&b, "%s is in doubt: who has it is not known here.\n", vm)
	case "abandoned":
		fmt.Fprintf(&b, "%s was given up here, as an operator said: it is %s's. Its disks stay here.\n", vm, to)
	case "split":
		fmt.Fprintf(&b, "%s HAS RUN AT BOTH SITES: here as an operator said, and at %s. Choose which one goes on, end the other\n"+
			"(virsh destroy, undefine) and keep its disks until nothing in them is missed.\n", vm, to)
	default:
		fmt.Fprintf(&b, "%s: %s.\n", vm, printable(r.Result))
	}
	line := func(label, text string) {
		if text != "" {
			fmt.Fprintf(&b, "  %-10s %s\n", label, text)
		}
	}
	if moved := r.DiskBytes + r.MemoryBytes; moved > 0 || r.Result == "done" {
		line("total", span(time.Duration(r.TotalMS)*time.Millisecond))
		line("downtime", unless(r.DowntimeMS == 0, millis(float64(r.DowntimeMS))))
		source, destination := downtime(r.Downtime)
		line("  source", source)
		line("  there", destination)
		line("sent", size(int64(r.WireBytesSent))+unless(moved == 0, fmt.Sprintf(", %s of %s of disks and %s of memory",
			percent(int64(r.WireBytesSent), moved), size(r.DiskBytes), size(r.MemoryBytes))))
		line("sent again", unless(r.Resent == 0, size(int64(r.Resent))+", over another connection"))
		line("received", size(int64(r.WireBytesReceived)))
		line("link lost", unless(r.LinkLostMS == 0, "for "+span(time.Duration(r.LinkLostMS)*time.Millisecond)+" in all"))
		line("carriers", carriersUsed(r.Carriers))
		if v := r.Verified; v != nil {
			line("verified", fmt.Sprintf("%s of disks are the same at both sites, %s looked at again while the guest was stopped", size(v.Same), size(v.Last)))
		}
		line("disks", reducedDisks(r.Reduction))
		line("memory", join(": ", join(", ", unless(r.MemoryRounds == 0, count(r.MemoryRounds, "round")), throttled(r.Throttled)), reduced(r.Reduction)))
	}
	var mapped map[netip.Addr]netip.Addr
	if r.Redirected != nil {
		line("redirect", goesOn(*r.Redirected, to, r.Move))
		mapped = r.Redirected.Mapped
	}
	if r.Redirect != nil {
		line("redirect", plannedRedirect(*r.Redirect, to))
		mapped = r.Redirect.Mapped
	}
	for _, m := range mappings(mapped) {
		line("new", m)
	}
	b.WriteString(findings(r.Findings))
	if len(r.Findings) == 0 { // they say what the notices do, and more
		for _, n := range r.Notices {
			line("notice", oneLine(n))
		}
	}
	line("attempts", unless(r.Attempt < 2, fmt.Sprint(r.Attempt)))
	line("next", unless(r.Next == "", "tried again as "+printable(r.Next)))
	for _, w := range r.Ways {
		line("decide", "`"+oneLine(w.Command)+"` "+oneLine(w.Does)+".")
	}
	if r.Redirect != nil {
		b.WriteString(listSteps("would be typed here", r.Redirect.Source) + listSteps("would be typed at "+to, r.Redirect.Destination))
	}
	return b.String()
}

// reduced tells as what memory was sent.
func reduced(r *migrate.Reduction) string {
	if r == nil {
		return ""
	}
	part := func(what string, p migrate.Reduced) string {
		return unless(p.Pages == 0, size(p.Bytes)+" "+what+" in "+size(p.Wire))
	}
	m := r.Memory
	return join(", ", part("zero", m.Zero), part("known", m.Reference), part("on disk", m.Disk), part("in an image", m.Seed),
		part("in an older copy", m.Old), part("changed", m.Delta), part("new", m.Data))
}

// reducedDisks tells as what the disks were sent.
func reducedDisks(r *migrate.Reduction) string {
	if r == nil {
		return ""
	}
	part := func(what string, c blocksync.Count) string {
		return unless(c.Bytes == 0, size(c.Bytes)+" "+what+" in "+size(c.WireBytes))
	}
	d := r.Disks
	return join(", ", part("zero", d.Zero), part("sent before", d.Disk), part("in seeds", d.Seed), part("in older copies", d.Old),
		part("compressed", d.Compressed), part("raw", d.Raw))
}

// leftAt tells what is left at the destination of a move that did not end.
func leftAt(to string, r migrate.Result) string {
	k := r.Kept
	switch {
	case r.Unconfirmed:
		return fmt.Sprintf(". %s was not reached: it removes what it has of the VM when it is, or after the longest outage", to)
	case k == nil:
		return ", and nothing is left at " + to
	}
	return fmt.Sprintf(". %s of its disks have arrived and are kept at %s until %s; the next attempt starts from them, or with --fresh from nothing",
		size(k.Bytes), to, k.Until.Local().Format("2006-01-02 15:04"))
}

// downtime tells on what each side spent the time that the guest did not run.
func downtime(d migrate.Downtime) (source, destination string) {
	part := func(ms float64, what string) string { return unless(ms < 0.05, millis(ms)+" "+what) }
	source = join(", ", part(d.LastPages, "stop and last pages"), part(d.DeviceState, "device state"), part(d.Perform, "libvirt"),
		part(d.Offer, "offer"), part(d.Transfer, "transfer"))
	destination = join(", ", part(d.DrainDisks, "disks"), part(d.Tail, "tail"), part(d.LoadState, "device state"), part(d.Journal, "journal"), part(d.FinishGuest, "finish"))
	return source, destination
}

// findings lists what a check found, each with its remedy.
func findings(all []migrate.Finding) string {
	var b strings.Builder
	for _, f := range all {
		kind := "notice"
		if f.Fatal {
			kind = "problem"
		}
		fmt.Fprintf(&b, "  %-10s %s\n", kind, join(": ", printable(f.Check), oneLine(f.Problem)))
		if f.Remedy != "" {
			fmt.Fprintf(&b, "  %-10s   remedy: %s\n", "", oneLine(f.Remedy))
		}
	}
	return b.String()
}

// blocked reports whether a check found what keeps a move from being made.
func blocked(r migrate.Result) bool {
	for _, f := range r.Findings {
		if f.Fatal {
			return true
		}
	}
	return r.Error != ""
}
