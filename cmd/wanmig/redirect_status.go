package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
)

// describeRedirect tells an operator how a redirect stands.
func describeRedirect(r netredirect.Status, now time.Time) string {
	var b strings.Builder
	line := func(label, text string) {
		if text != "" {
			fmt.Fprintf(&b, "  %-10s %s\n", label, oneLine(text))
		}
	}
	fmt.Fprintf(&b, "redirect %s: %s %s %s, %s\n", printable(r.Move), name(r.VM), direction(r), name(r.Peer), printable(string(r.State)))
	if tunnelled(r) {
		line("tunnel", fmt.Sprintf("%s, %s, %s to %s, MTU %d", r.Kind, r.Device, r.Local, r.Remote, r.MTU))
	} else {
		line("tunnel", "none any more: this host stays the VM's gateway until it leaves")
	}
	line("addresses", unless(len(r.Addresses) == 0, texts(r.Addresses)+unless(r.Mode != netredirect.Keep, ", kept")))
	line("follows", unless(r.Follows == "", printable(r.Follows)+", by which the VM came here: this tunnel is from a host that it had left before"))
	for _, m := range mappings(r.Mapped) {
		line("new", m)
	}
	line("DNS", texts(r.Names))
	line("announced", unless(len(r.Announced) == 0, texts(r.Announced)+" by BGP"))
	if r.Switched != nil {
		line("since", moment(*r.Switched))
	}
	if r.Deadline != nil {
		line("at most", "until "+moment(*r.Deadline)+unless(!r.Deadline.After(now), ", "+span(r.Deadline.Sub(now))+" more"))
	}
	if tunnelled(r) {
		for _, w := range stays(r) {
			line("stays", w)
		}
		line("sent", counter(r.Out))
		line("received", counter(r.In))
		line("last used", unless(r.In.Packets+r.Out.Packets == 0, span(time.Duration(r.IdleMS)*time.Millisecond)+" ago"))
		line("dropped", drops(r.Dropped))
	}
	for _, p := range r.Problems {
		line("problem", p)
	}
	for _, f := range r.Flows {
		line("used by", flow(f))
	}
	return b.String()
}

// stays tells why the tunnel is not removed.
func stays(r netredirect.Status) []string {
	switch {
	case r.State == netredirect.Opening || r.State == netredirect.Armed:
		return []string{"the VM has not moved yet"}
	case len(r.Waits) == 0:
		return []string{"until both ends have agreed that nothing needs it"}
	}
	return r.Waits
}

// tunnelled reports whether a redirect has its tunnel still.
func tunnelled(r netredirect.Status) bool { return r.State != netredirect.Resident }

func direction(r netredirect.Status) string {
	if r.Role == netredirect.Destination {
		return "from"
	}
	return "to"
}

func moment(t time.Time) string { return t.Local().Format(time.DateTime) }

func counter(c netredirect.Counter) string {
	return count(int(min(c.Packets, 1<<62)), "packet") + ", " + size(int64(min(c.Bytes, 1<<62)))
}

// drops names the reasons for which packets were dropped.
func drops(d netredirect.Drops) string {
	n := func(count uint64, reason string) string {
		return unless(count == 0, fmt.Sprintf("%d %s", count, reason))
	}
	return join(", ", n(d.Spoofed, "spoofed"), n(d.Malformed, "malformed"), n(d.Nested, "nested"), n(d.Foreign, "foreign"),
		n(d.TooBig, "too big"), n(d.Unsent, "unsent"))
}

func flow(f netredirect.Flow) string {
	return printable(fmt.Sprintf("%s %s -> %s", f.Proto, f.From, f.To)) + unless(f.Bytes == 0, ", "+size(int64(min(f.Bytes, 1<<62))))
}

// mappings lists the VM's own addresses and its new ones.
func mappings(m map[netip.Addr]netip.Addr) []string {
	var all []string
	for _, own := range sortedAddresses(m) {
		all = append(all, printable(fmt.Sprintf("%s for %s", m[own], own)))
	}
	return all
}

func sortedAddresses(m map[netip.Addr]netip.Addr) []netip.Addr {
	var all []netip.Addr
	for a := range m {
		all = append(all, a)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// texts joins things, printable.
func texts[T any](things []T) string {
	var all []string
	for _, t := range things {
		all = append(all, printable(fmt.Sprint(t)))
	}
	return strings.Join(all, ", ")
}

// listSteps lists commands that may have several lines, each to be copied as it is.
func listSteps(title string, steps []string) string {
	if len(steps) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# %s:\n", title)
	for _, s := range steps {
		for l := range strings.Lines(s) {
			fmt.Fprintln(&b, printable(strings.ReplaceAll(strings.TrimSuffix(l, "\n"), "\t", "    ")))
		}
	}
	return b.String()
}

// plannedRedirect tells which tunnel a redirect would have.
func plannedRedirect(p migrate.RedirectPlan, to string) string {
	kinds := "no kind of tunnel passes to " + to
	if len(p.Kinds) > 0 {
		kinds = strings.ReplaceAll(texts(p.Kinds), ", ", ", else ")
	}
	return kinds + unless(p.Mode != netredirect.Keep, "; addresses are kept")
}

// goesOn tells in one line how connections go on after a move.
func goesOn(r migrate.Redirected, to, move string) string {
	return join(", ", printable(string(r.Kind))+" to "+to, unless(r.Until == nil, "until "+atMost(r.Until))) + see(move)
}

// standing tells in one line how the redirect of a move stands.
func standing(r netredirect.Status) string {
	if !tunnelled(r) {
		return "its tunnel is gone, the VM's addresses are served here" + see(r.Move)
	}
	return join(", ", fmt.Sprintf("%s %s %s", printable(string(r.Kind)), direction(r), name(r.Peer)), printable(string(r.State)),
		unless(r.Deadline == nil, "until "+atMost(r.Deadline)), unless(len(r.Problems) == 0, count(len(r.Problems), "problem"))) + see(r.Move)
}

func atMost(t *time.Time) string {
	if t == nil {
		return ""
	}
	return moment(*t) + " at most"
}

func see(move string) string { return ": wanmig redirect show " + printable(move) }
