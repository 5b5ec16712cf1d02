package tunnel

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// RFC 8305, section 5: the next address is tried after this.
	addressDelay = 250 * time.Millisecond
	// tcpDelay is the start that QUIC has over TCP.
	tcpDelay = 300 * time.Millisecond
	// narrowDelay is when TCP with small segments is tried besides: by then an
	// ordinary handshake, which has packets of full size in both directions, is
	// over, or the path swallows these.
	narrowDelay = 2 * time.Second
	// maxAddresses bounds what a name server can make of a name.
	maxAddresses = 8
)

// attempt is one way to a peer.
type attempt struct {
	addr      netip.AddrPort
	transport Transport
	narrow    bool          // TCP with small segments
	start     time.Duration // into the race, unless an earlier one has failed before
}

func (a attempt) String() string { return a.transport.network() + " " + a.addr.String() }

// planAttempts returns the ways to addrs in the order of their start.
func planAttempts(addrs []netip.AddrPort, t Transport) []attempt {
	addrs = alternate(addrs)
	addrs = addrs[:min(len(addrs), maxAddresses)]
	var plan []attempt
	for i, addr := range addrs {
		start := time.Duration(i) * addressDelay
		if t != TCP {
			plan = append(plan, attempt{addr, QUIC, false, start})
		}
		if t == Auto {
			start += tcpDelay
		}
		if t != QUIC {
			plan = append(plan, attempt{addr, TCP, false, start}, attempt{addr, TCP, true, start + narrowDelay})
		}
	}
	slices.SortStableFunc(plan, func(a, b attempt) int { return cmp.Compare(a.start, b.start) })
	return plan
}

// alternate orders addresses so that the two families take turns, beginning with
// the resolver's first one (RFC 8305, section 4).
func alternate(addrs []netip.AddrPort) []netip.AddrPort {
	var first, second, mixed []netip.AddrPort
	for _, a := range addrs {
		if a.Addr().Is4() == addrs[0].Addr().Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	for i := range max(len(first), len(second)) {
		mixed = append(mixed, first[min(i, len(first)):min(i+1, len(first))]...)
		mixed = append(mixed, second[min(i, len(second)):min(i+1, len(second))]...)
	}
	return mixed
}

// race makes the attempts of a plan, each when its time has come or when one
// before it has failed, and returns what the first that succeeds has made. It
// ends the others, discards what they have made nevertheless, and waits for
// them. final says which failures end the race.
func race[T any](ctx context.Context, plan []attempt, try func(context.Context, attempt) (T, error),
	discard func(T), final func(error) bool) (won T, err error) {

	type result struct {
		attempt
		made T
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan result)
	running := 0
	defer func() {
		cancel()
		for ; running > 0; running-- {
			if late := <-results; late.err == nil {
				discard(late.made)
			}
		}
	}()
	launch := func() {
		a := plan[0]
		plan = plan[1:]
		running++
		go func() {
			made, err := try(ctx, a)
			results <- result{a, made, err}
		}()
	}

	began := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var failed failures
	for len(plan) > 0 || running > 0 {
		if len(plan) > 0 {
			timer.Reset(plan[0].start - time.Since(began))
		} else {
			timer.Stop()
		}
		select {
		case <-timer.C:
			launch()
		case r := <-results:
			running--
			if r.err == nil {
				return r.made, nil
			}
			if final(r.err) || errors.Is(ctx.Err(), context.Canceled) {
				return won, r.err
			}
			failed = append(failed, failure{r.attempt, r.err})
			if ctx.Err() != nil {
				plan = nil
			} else if len(plan) > 0 {
				launch()
			}
		}
	}
	return won, failed
}

// failure is what became of an attempt, and failures of all of them.
type (
	failure struct {
		attempt
		err error
	}
	failures []failure
)

// Error tells of all attempts but those with small segments, which say no more
// than the one that they repeat.
func (f failures) Error() string {
	var texts []string
	for _, one := range f {
		if !one.narrow {
			texts = append(texts, one.err.Error())
		}
	}
	return strings.Join(texts, "; ")
}

func (f failures) Unwrap() []error {
	var errs []error
	for _, one := range f {
		errs = append(errs, one.err)
	}
	return errs
}
