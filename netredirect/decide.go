package netredirect

import (
	"fmt"
	"time"
)

// situation is what decides whether the tunnel of a VM can go. It is judged at
// the destination.
type situation struct {
	Mode    Mode
	Home    bool // the VM's addresses belong to the destination's own network
	Relayed bool // it came from a host where the VM was foreign, and another tunnel leads to the VM by now
	Drained bool // an operator said that nothing more will move

	Names      int           // DNS names that are to move; of mode New
	NamesKnown bool          // they were looked up
	NameServed bool          // every authoritative server answers with the new addresses
	CachedFor  time.Duration // how long a cache may still have an old address
	DNS        bool          // DNS updates are configured

	BGP       bool // BGP is configured
	RouteSeen bool // the network has the new routes

	Idle  time.Duration // since a packet of the VM passed the tunnel, at either end
	Quiet time.Duration // needed
	Flows int
	Left  time.Duration // until the tunnel's deadline
}

// decide reports whether the tunnel can go, and else what it waits for, in words
// that say what to do.
func decide(s situation) (remove bool, waits []string) {
	if s.Left <= 0 {
		return true, nil
	}
	if !s.Drained {
		waits = append(waits, unsettled(s)...)
	}
	if s.Idle < s.Quiet {
		what := "packets still take it"
		if s.Flows > 0 {
			what = fmt.Sprintf("%d connections still use it", s.Flows)
		}
		waits = append(waits, fmt.Sprintf("%s: it goes when none has for %v", what, s.Quiet))
	}
	return len(waits) == 0, waits
}

// unsettled is what keeps new connections from finding the VM directly.
func unsettled(s situation) []string {
	const then = "then: wanmig redirect drain MOVE"
	switch {
	case s.Mode == New && !s.DNS:
		return []string{"no DNS server is configured at the destination: point the VM's names to its new addresses, " + then}
	case s.Mode == New && !s.NamesKnown:
		return []string{"the VM's DNS names are not known yet"}
	case s.Mode == New && s.Names == 0:
		return []string{"no DNS name of the VM is known: name them with --dns-name, or move them by hand, " + then}
	case s.Mode == New && !s.NameServed:
		return []string{"DNS does not answer with the new addresses everywhere yet"}
	case s.Mode == New && s.CachedFor > 0:
		return []string{fmt.Sprintf("caches may have the old addresses for %v more", s.CachedFor.Round(time.Second))}
	case s.Mode == New, s.Home, s.Relayed:
		return nil
	case !s.BGP:
		return []string{"no BGP is configured at the destination: route the VM's addresses there, " + then}
	case !s.RouteSeen:
		return []string{"the new route is not seen at any BGP peer yet"}
	}
	return nil
}

// cachedFor is how long caches may still hold an old address: those from before
// the TTL was lowered, and those from before the change.
func cachedFor(now, lowered, moved time.Time, oldTTL, lowTTL time.Duration) time.Duration {
	until := moved.Add(oldTTL)
	if !lowered.IsZero() && lowered.Before(moved) {
		until = lowered.Add(oldTTL)
		if low := moved.Add(lowTTL); low.After(until) {
			until = low
		}
	}
	return max(0, until.Sub(now))
}
