package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// UDPFlow is a sequence of UDP echoes from one port, a numbered one at each interval.
type UDPFlow struct {
	conn net.Conn
	stop context.CancelFunc
	sent chan struct{} // closed after the last echo
	done chan struct{}

	mu    sync.Mutex
	meter udpMeter
}

// UDPResult is what a UDPFlow saw. Times are exact to about the interval between echoes.
type UDPResult struct {
	Sent       int64         `json:"sent"`
	Answered   int64         `json:"answered"` // each counted once
	Lost       int64         `json:"lost"`
	Duplicated int64         `json:"duplicated"`
	Reordered  int64         `json:"reordered"` // came after one that was sent later
	Wrong      int64         `json:"wrong"`     // answers to what was not asked
	Errors     int64         `json:"errors"`    // that the network told of, such as a port that is not there
	FirstError string        `json:"first_error,omitempty"`
	LongestGap Silence       `json:"longest_gap"` // between two answers
	LongestAge time.Duration `json:"longest_age_ns"`
	Unanswered time.Duration `json:"unanswered_ns"` // from the last answer to the end, if that was long
}

// maxUnanswered is the longest silence at the end of a flow that goes on.
const maxUnanswered = time.Second

// Err is nil if the guest answered until the end, and nothing was wrong but losses, doubles and order, which UDP allows.
func (r UDPResult) Err() error {
	switch {
	case r.Errors != 0:
		return fmt.Errorf("%d errors, the first: %s", r.Errors, r.FirstError)
	case r.Wrong != 0:
		return fmt.Errorf("%d answers to what was not asked", r.Wrong)
	case r.Unanswered != 0:
		return fmt.Errorf("no answer in the last %v: %d of %d answered", r.Unanswered.Round(time.Millisecond), r.Answered, r.Sent)
	}
	return nil
}

func (r UDPResult) String() string {
	return fmt.Sprintf("%d sent, %d answered, %d lost, %d twice, %d out of order, %d wrong, %d errors; %v, longest wait for an answer %d ms",
		r.Sent, r.Answered, r.Lost, r.Duplicated, r.Reordered, r.Wrong, r.Errors, r.LongestGap, r.LongestAge.Milliseconds())
}

// StartUDP sends a UDP echo to an address of the guest from inside a site at each interval, until Stop.
func (v *VM) StartUDP(ctx context.Context, site string, to netip.Addr, interval time.Duration) (*UDPFlow, error) {
	if err := checkInterval(interval); err != nil {
		return nil, err
	}
	conn, err := v.dial(ctx, site, "udp", to, api.EchoPort)
	if err != nil {
		return nil, fmt.Errorf("udp to VM %q: %w", v.Name, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &UDPFlow{conn: conn, stop: cancel, sent: make(chan struct{}), done: make(chan struct{}), meter: newUDPMeter(time.Now())}
	go f.send(ctx, interval)
	go f.receive()
	return f, nil
}

func (f *UDPFlow) send(ctx context.Context, interval time.Duration) {
	defer close(f.sent)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var b [api.EchoSize]byte
	for {
		f.mu.Lock()
		question := f.meter.question(time.Now())
		f.mu.Unlock()
		if _, err := f.conn.Write(question.Append(b[:0])); err != nil {
			f.failed(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// receive ends when the last echo has been sent and answered, or when Stop has set a deadline and it passed.
func (f *UDPFlow) receive() {
	defer close(f.done)
	var b [api.EchoSize + 1]byte
	for {
		n, err := f.conn.Read(b[:])
		at := time.Now()
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			f.failed(err)
			continue
		}
		answer, err := api.ParseEcho(b[:n])
		f.mu.Lock()
		if err != nil {
			f.meter.result.Wrong++
		} else {
			f.meter.answer(answer, at)
		}
		f.mu.Unlock()
		select {
		case <-f.sent:
			if f.allAnswered() {
				return
			}
		default:
		}
	}
}

func (f *UDPFlow) allAnswered() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.meter.result.Answered == f.meter.result.Sent
}

func (f *UDPFlow) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.meter.result.Errors++; f.meter.result.Errors == 1 {
		f.meter.result.FirstError = err.Error()
	}
}

// Done is closed after Stop only: there is no end that a sender of UDP would notice.
func (f *UDPFlow) Done() <-chan struct{} { return f.done }

// Stop sends no more and waits for the answers that are due.
func (f *UDPFlow) Stop() UDPResult {
	f.stop()
	<-f.sent
	end := time.Now()
	deadline := end.Add(maxUnanswered)
	if f.allAnswered() {
		deadline = end
	}
	// An error means that receive has ended already.
	_ = f.conn.SetReadDeadline(deadline)
	<-f.done
	f.conn.Close()
	return f.meter.total(end)
}

// udpMeter numbers the echoes of a UDPFlow and compares what comes back.
type udpMeter struct {
	began   time.Time
	highest uint64   // number of an answer
	seen    []uint64 // a bit for each number that was answered
	gaps    silenceMeter
	result  UDPResult
}

func newUDPMeter(began time.Time) udpMeter {
	return udpMeter{began: began, gaps: silenceMeter{began: began}}
}

// question is the next echo to send.
func (m *udpMeter) question(at time.Time) api.EchoRecord {
	m.result.Sent++
	m.result.Lost++ // until it is answered
	if n := uint64(m.result.Sent); int(n/64) == len(m.seen) {
		m.seen = append(m.seen, 0)
	}
	return api.EchoRecord{Sequence: uint64(m.result.Sent), Stamp: uint64(at.Sub(m.began))}
}

func (m *udpMeter) answer(r api.EchoRecord, at time.Time) {
	now := at.Sub(m.began)
	if r.Sequence == 0 || r.Sequence > uint64(m.result.Sent) || r.Stamp > uint64(now) {
		m.result.Wrong++
		return
	}
	m.gaps.heard(at)
	word, bit := &m.seen[r.Sequence/64], uint64(1)<<(r.Sequence%64)
	if *word&bit != 0 {
		m.result.Duplicated++
		return
	}
	*word |= bit
	m.result.Answered++
	m.result.Lost--
	if r.Sequence < m.highest {
		m.result.Reordered++
	}
	m.highest = max(m.highest, r.Sequence)
	m.result.LongestAge = max(m.result.LongestAge, now-time.Duration(r.Stamp))
}

// total closes the account of a flow whose last echo was sent before end.
func (m *udpMeter) total(end time.Time) UDPResult {
	if silent := end.Sub(m.gaps.lastHeard()); m.result.Answered == 0 || silent > maxUnanswered {
		m.result.Unanswered = silent
		m.gaps.lost(end)
	}
	m.result.LongestGap = m.gaps.longest
	return m.result
}
