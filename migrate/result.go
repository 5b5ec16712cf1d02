package migrate

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/netredirect"
)

// refused is the error of a move that the checks stopped.
type refused struct{ findings []Finding }

func (r refused) Error() string {
	n, first := 0, Finding{}
	for _, f := range r.findings {
		if f.Fatal {
			if n == 0 {
				first = f
			}
			n++
		}
	}
	more := ""
	if n > 1 {
		more = fmt.Sprintf(" (and %d more: see the findings)", n-1)
	}
	return fmt.Sprintf("%s: %s: %s%s", first.Check, first.Problem, first.Remedy, more)
}

// end leaves the result in the status, where it is not yet, and logs it.
func (s *source) end(err error) {
	if s.move.Status().Result == nil {
		s.summarise(err)
	}
	r := s.move.Status().Result
	s.log.Info("move ends", "result", r.Result, "total_ms", r.TotalMS, "downtime_ms", r.DowntimeMS, "downtime", r.Downtime,
		"wire_bytes_sent", r.WireBytesSent, "error", r.Error)
}

// summarise makes the result of the move from its status.
func (s *source) summarise(err error) {
	var stop refused
	var plan *RedirectPlan
	if s.req.DryRun {
		plan = s.redirectPlan()
	}
	redirected, problems := s.redirected()
	if s.next == nil && s.mayRetry(err) {
		s.next = s.nextAttempt()
	}
	s.move.update(func(st *Status) {
		r := Result{Move: st.Move, VM: st.VM, To: st.Peer, TotalMS: time.Since(st.Started).Milliseconds()}
		switch {
		case errors.As(err, &stop):
			st.Phase, r.Result = PhaseRolledBack, "refused"
		case s.entry.State == handoff.Abandoned, s.entry.State == handoff.Split:
			st.Phase = phaseOf(s.entry.State)
			r.Result = string(st.Phase)
		case s.entry.State == handoff.Released:
			st.Phase, r.Result = PhaseDone, "done"
			r.Downtime, r.DowntimeMS = s.downtime, s.downtime.total()
		case s.req.DryRun && err == nil:
			st.Phase, r.Result = PhaseRolledBack, "checked"
		default:
			st.Phase, r.Result = PhaseRolledBack, "rolled-back"
		}
		if err != nil {
			r.Error = err.Error()
		}
		if r.Attempt = s.move.attempt; s.next != nil {
			r.Next = s.next.Status().Move
		}
		if s.session != nil {
			l := s.meter.look(time.Now())
			r.WireBytesSent, r.WireBytesReceived, r.Resent = l.Sent, l.Received, l.Resent
			r.LinkLostMS, r.Carriers = l.LostMS, s.meter.carriersUsed()
		}
		var disks blocksync.Reduction
		for _, d := range st.Disks {
			r.DiskBytes += d.Sent
			disks.Add(d.Reduction)
		}
		r.MemoryBytes, r.MemoryRounds, r.Throttled = st.Memory.Stream, st.Memory.Round, st.Memory.Throttled
		if st.Memory.Reduction != nil {
			r.Reduction = &Reduction{Memory: *st.Memory.Reduction, Disks: disks}
		}
		for _, f := range st.Findings {
			if f.Fatal {
				continue
			}
			r.Notices = append(r.Notices, strings.TrimSuffix(f.Problem+": "+f.Remedy, ": "))
		}
		if r.Result == "refused" || r.Result == "checked" {
			r.Findings = st.Findings
		}
		if r.Result == "checked" {
			r.Redirect = plan
		}
		if s.kept.Bytes > 0 && st.Phase == PhaseRolledBack {
			r.Kept = &s.kept
		}
		r.Unconfirmed = st.Phase == PhaseRolledBack && s.listening && !s.aborted
		if st.Phase == PhaseDone {
			r.Verified = s.verified
			r.Redirected = redirected
			r.Notices = append(r.Notices, problems...)
			r.Notices = append(r.Notices, s.leftBehind()...)
		}
		st.Result = &r
	})
}

// redirected is the redirect that stands after the move, if any, and what is
// wrong with it.
func (s *source) redirected() (*Redirected, []string) {
	x, ok := s.Redirects.Find(s.entry.Move)
	if !ok {
		return nil, nil
	}
	st := x.Status()
	var problems []string
	for _, p := range st.Problems {
		problems = append(problems, "redirect: "+p)
	}
	return &Redirected{Kind: st.Kind, Device: st.Device, Mode: st.Mode, Mapped: st.Mapped, Until: st.Deadline}, problems
}

// redirectPlan is what a redirect would change at both hosts; nil if nothing.
func (s *source) redirectPlan() *RedirectPlan {
	ask, offer := s.redirect.ask, s.redirect.offer
	if s.session == nil || len(ask.NICs) == 0 || len(offer.Steps) == 0 {
		return nil
	}
	peer, err := addrOf(s.session.RemoteAddr())
	if err != nil {
		return nil // Ask has told
	}
	p := &RedirectPlan{Mode: offer.Mode, Mapped: offer.Mapped, Destination: bounded(offer.Steps)}
	for _, k := range ask.Kinds {
		if slices.Contains(offer.Kinds, k) && (k == netredirect.QUIC || !offer.NAT) {
			p.Kinds = append(p.Kinds, k)
		}
	}
	ask.Kinds = p.Kinds
	p.Source = s.Redirects.Preview(ask, peer)
	return p
}

// bounded leaves as many of a peer's texts as a status can carry.
func bounded(texts []string) []string {
	const most = 256 << 10 // bytes
	n := 0
	for i, t := range texts {
		if n += len(t); n > most {
			return texts[:i]
		}
	}
	return texts
}

// leftBehind tells where the source's disks are that stay.
func (s *source) leftBehind() []string {
	var stay []string
	for _, d := range s.plan.disks {
		if path := s.plan.source[d.Target]; !slices.Contains(s.entry.Remove, path) {
			stay = append(stay, path)
		}
	}
	if len(stay) == 0 {
		return nil
	}
	return []string{"kept at the source: " + strings.Join(stay, ", ")}
}

// measure splits the downtime: source clock up to the offer, half a round trip,
// destination clock from there.
func (s *source) measure(sy *syncer, offered time.Time, r running) {
	if r.Paused || sy.stopped().IsZero() {
		return // it landed paused or was paused before: there is no downtime to speak of
	}
	d := Downtime{Transfer: ms(s.session.Stats().RTT / 2),
		DrainDisks: r.DrainMS, Tail: r.TailMS, LoadState: r.LoadMS, Journal: r.JournalMS, FinishGuest: r.FinishMS}
	at := sy.stopped()
	for _, part := range []struct {
		ms    *float64
		until int64
	}{{&d.LastPages, sy.tailAt.Load()}, {&d.DeviceState, sy.endAt.Load()}, {&d.Perform, sy.doneAt.Load()}, {&d.Offer, offered.UnixNano()}} {
		until := latest(at, time.Unix(0, part.until)) // a stream that passed opaque has no last page
		*part.ms, at = ms(until.Sub(at)), until
	}
	s.downtime = d
	if p := sy.foresee.Load(); p != nil && p.tail() <= tellingTail {
		s.overheads.learn(s.req.To, time.Duration(d.total())*time.Millisecond-p.downtime())
	}
}
