package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// Stream is one TCP connection to a guest's echo port, with a numbered record at each interval.
type Stream struct {
	conn *net.TCPConn
	stop context.CancelFunc
	done chan struct{}

	mu    sync.Mutex
	meter streamMeter
}

// StreamResult is what a Stream saw. Times are exact to about the interval between records.
type StreamResult struct {
	Sent       int64         `json:"sent"`
	Answered   int64         `json:"answered"`
	Breaks     int64         `json:"breaks"`      // records that did not follow the one before, here or at the guest
	LongestGap Silence       `json:"longest_gap"` // between two answers
	LongestAge time.Duration `json:"longest_age_ns"`
	Broken     string        `json:"broken,omitempty"` // how the connection ended, unless by Stop and with all answered
	Resets     int           `json:"resets"`           // of the connection: 0 or 1
}

// Err is nil if every record was answered, in order and over a connection that lived until Stop.
func (r StreamResult) Err() error {
	switch {
	case r.Broken != "":
		return fmt.Errorf("the connection broke with %d of %d records answered: %s", r.Answered, r.Sent, r.Broken)
	case r.Breaks != 0:
		return fmt.Errorf("%d of %d records did not follow the one before", r.Breaks, r.Sent)
	}
	return nil
}

func (r StreamResult) String() string {
	return fmt.Sprintf("%d sent, %d answered, %d out of order, %d resets%s; %v, longest wait for an answer %d ms",
		r.Sent, r.Answered, r.Breaks, r.Resets, describeBroken(r.Broken), r.LongestGap, r.LongestAge.Milliseconds())
}

// StartStream connects to an address of the guest from inside a site and sends it a record at each interval, until Stop.
func (v *VM) StartStream(ctx context.Context, site string, to netip.Addr, interval time.Duration) (*Stream, error) {
	if err := checkInterval(interval); err != nil {
		return nil, err
	}
	conn, err := v.dial(ctx, site, "tcp", to, api.EchoPort)
	if err != nil {
		return nil, fmt.Errorf("stream to VM %q: %w", v.Name, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &Stream{conn: conn.(*net.TCPConn), stop: cancel, done: make(chan struct{}), meter: newStreamMeter(time.Now())}
	go func() {
		defer close(s.done)
		var sender sync.WaitGroup
		sender.Go(func() { s.send(ctx, interval) })
		s.receive(ctx)
		cancel()
		sender.Wait()
	}()
	return s, nil
}

// send ends the connection's half when it ends, upon which the guest ends the other.
func (s *Stream) send(ctx context.Context, interval time.Duration) {
	defer s.conn.CloseWrite()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var b [api.EchoSize]byte
	for {
		s.mu.Lock()
		question := s.meter.question(time.Now())
		s.mu.Unlock()
		if _, err := s.conn.Write(question.Append(b[:0])); err != nil {
			s.failed(err)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Stream) receive(ctx context.Context) {
	in := bufio.NewReader(s.conn)
	var b [api.EchoSize]byte
	for {
		_, err := io.ReadFull(in, b[:])
		var answer api.EchoRecord
		if err == nil {
			answer, err = api.ParseEcho(b[:])
		}
		if err == nil {
			s.mu.Lock()
			s.meter.answer(answer, time.Now())
			s.mu.Unlock()
			continue
		}
		if errors.Is(err, io.EOF) {
			if ctx.Err() != nil && s.allAnswered() {
				return
			}
			err = errors.New("the guest closed it")
		}
		s.failed(err)
		return
	}
}

func (s *Stream) allAnswered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meter.result.Answered == s.meter.result.Sent
}

// failed keeps the first error: those that follow come from it.
func (s *Stream) failed(err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("no more answers within %v of the end", drainTime)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.meter.result.Broken == "" {
		s.meter.broke(err, time.Now())
	}
}

// Done is closed when the connection has ended, by Stop or by itself.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Stop sends no more, waits for the answers that are due and closes the connection.
func (s *Stream) Stop() StreamResult {
	s.stop()
	// An error means that the connection has ended already.
	_ = s.conn.SetDeadline(time.Now().Add(drainTime))
	<-s.done
	s.conn.Close()
	return s.meter.total()
}

// streamMeter numbers the records of a Stream and compares what comes back.
type streamMeter struct {
	began  time.Time
	last   uint64 // number of the last answer
	breaks uint32 // that the guest has counted
	gaps   silenceMeter
	result StreamResult
}

func newStreamMeter(began time.Time) streamMeter {
	return streamMeter{began: began, gaps: silenceMeter{began: began}}
}

// question is the next record to send.
func (m *streamMeter) question(at time.Time) api.EchoRecord {
	m.result.Sent++
	return api.EchoRecord{Sequence: uint64(m.result.Sent), Stamp: uint64(at.Sub(m.began))}
}

func (m *streamMeter) answer(r api.EchoRecord, at time.Time) {
	m.gaps.heard(at)
	m.result.Answered++
	if r.Sequence != m.last+1 || r.Sequence > uint64(m.result.Sent) || r.Breaks != m.breaks {
		m.result.Breaks++
	}
	m.last, m.breaks = r.Sequence, r.Breaks
	// A stamp that is not ours makes no age.
	if now := at.Sub(m.began); r.Stamp <= uint64(now) {
		m.result.LongestAge = max(m.result.LongestAge, now-time.Duration(r.Stamp))
	}
}

func (m *streamMeter) broke(err error, at time.Time) {
	m.result.Broken, m.result.Resets = err.Error(), countReset(err)
	m.gaps.lost(at)
}

func (m *streamMeter) total() StreamResult {
	m.result.LongestGap = m.gaps.longest
	return m.result
}
