package main

import (
	"fmt"
	"math"
	"time"

	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/rate"
)

// lost tells for how long nothing has carried a move that goes on, and what waits
// in its outbox; nothing while its link is up.
func lost(m migrate.Status, now time.Time) (since, waits string) {
	if m.Link.LostSince == nil || m.Phase.Final() {
		return "", ""
	}
	d := max(now.Sub(*m.Link.LostSince), 0)
	pending := diskTotals(m).Pending
	return fmt.Sprintf("link lost %02d:%02d, holding", int(d.Minutes()), int(d.Seconds())%60), unless(pending == 0, "outbox "+size(pending))
}

// speed is what the link carries, or that it is lost.
func speed(m migrate.Status, now time.Time) string {
	if since, waits := lost(m, now); since != "" {
		return join("; ", since, waits)
	}
	return join(", ", "link "+rateOf(m.Link.Rate), roundTrip(m.Link), limited(m.Link))
}

// limited is how much a move may send now, and why.
func limited(l migrate.Link) string {
	most := ""
	if l.Allowed > 0 {
		most = "at most " + round(rate.Rate(8*l.Allowed)).String()
		if l.LimitedBy != "" {
			most += " (" + printable(l.LimitedBy) + ")"
		}
	}
	return join(", ", unless(!l.Limit.Auto, "auto"), most)
}

// round leaves three digits of a rate.
func round(r rate.Rate) rate.Rate {
	step := math.Pow10(max(int(math.Log10(float64(max(r, 1))))-2, 0))
	return rate.Rate(math.Round(float64(r)/step) * step)
}

// carriers counts connections by their transport.
func carriers(all []migrate.Carrier) string {
	part := func(transport string) string {
		n, sent, rtt := 0, uint64(0), math.Inf(1)
		for _, c := range all {
			if c.Transport == transport {
				n, sent, rtt = n+1, sent+c.Sent, min(rtt, c.RTTMS)
			}
		}
		return unless(n == 0, fmt.Sprintf("%d %s (%s sent, RTT %s)", n, transport, size(int64(sent)), millis(rtt)))
	}
	return join(", ", part("quic"), part("tcp"))
}

// carriersUsed tells which connections a move had.
func carriersUsed(all []migrate.CarriersUsed) string {
	var parts []string
	for _, u := range all {
		parts = append(parts, fmt.Sprintf("up to %d %s", u.Most, printable(u.Transport)))
	}
	return join(", ", parts...)
}
