package migrate

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/handoff"
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
	s.move.update(func(st *Status) {
		r := Result{Move: st.Move, VM: st.VM, To: st.Peer, TotalMS: time.Since(st.Started).Milliseconds()}
		switch {
		case errors.As(err, &stop):
			st.Phase, r.Result = PhaseRolledBack, "refused"
		case errors.Is(err, errUndecided):
			st.Phase, r.Result = PhaseInDoubt, "in-doubt"
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
		if s.session != nil {
			c := s.session.Stats()
			r.WireBytesSent, r.WireBytesReceived = c.BytesSent, c.BytesReceived
		}
		for _, d := range st.Disks {
			r.DiskBytes += d.Sent
		}
		r.MemoryBytes, r.MemoryRounds = st.Memory.Stream, st.Memory.Round
		for _, f := range st.Findings {
			if f.Fatal {
				continue
			}
			r.Notices = append(r.Notices, strings.TrimSuffix(f.Problem+": "+f.Remedy, ": "))
		}
		if r.Result == "refused" || r.Result == "checked" {
			r.Findings = st.Findings
		}
		if st.Phase == PhaseDone {
			r.Notices = append(r.Notices, s.leftBehind()...)
		}
		st.Result = &r
	})
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
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	s.downtime = Downtime{StopToTail: ms(offered.Sub(sy.stopped())), Transfer: ms(s.session.Stats().RTT / 2),
		DrainDisks: r.DrainMS, LoadState: r.LoadMS, Journal: r.JournalMS, FinishGuest: r.FinishMS}
}
