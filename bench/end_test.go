//go:build bench

package bench

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// bulkFrame is what a move sends at a time.
const bulkFrame = 64 << 10

// probeInterval is how often a control frame asks for its answer, however long
// the answers before take.
const probeInterval = 50 * time.Millisecond

// A probe is when it was sent, as time since the sender's start; its answer is
// the probe and what the server has received of bulk and taken of CPU time.
//
//	probe:  sent u64, nanoseconds
//	answer: sent u64 | received u64, bytes | CPU time u64, nanoseconds
const (
	probeSize  = 8
	answerSize = 24
)

// load is the sender's end of what carries bulk and probes.
type load interface {
	bulk(ctx context.Context, frame []byte) error // waits until there is room
	probe(ctx context.Context, frame []byte) error
	answer(ctx context.Context) ([]byte, error)
	carriers() string
	close() error
}

// peer is the server's end. Its methods end with an error when the sender is gone.
type peer interface {
	bulk(ctx context.Context) (n int, err error)
	probe(ctx context.Context) ([]byte, error)
	answer(ctx context.Context, frame []byte) error
}

// sample is what the sender saw since its last sample.
type sample struct {
	Probes   []time.Duration `json:"probes"`   // round trips of control frames
	Received uint64          `json:"received"` // bytes of bulk that the server has, of all time
	CPU      time.Duration   `json:"cpu"`      // of both processes, of all time
	Carriers string          `json:"carriers"` // what carries it now
}

// serve takes what one sender sends: KIND ADDRESS FOLDER PROFILE.
func serve(args []string) error {
	kind, addr, shared := args[0], args[1], args[2]
	return profiled(args[3], func() error {
		ctx := context.Background()
		p, err := listen(ctx, kind, addr, shared)
		if err != nil {
			return err
		}
		var received atomic.Uint64
		var bulk sync.WaitGroup
		bulk.Go(func() {
			for {
				n, err := p.bulk(ctx)
				if err != nil {
					return
				}
				received.Add(uint64(n))
			}
		})
		for {
			frame, err := p.probe(ctx)
			if err != nil {
				break
			}
			if len(frame) != probeSize {
				return fmt.Errorf("a probe of %d bytes", len(frame))
			}
			frame = binary.BigEndian.AppendUint64(frame, received.Load())
			frame = binary.BigEndian.AppendUint64(frame, uint64(cpuTime()))
			if err := p.answer(ctx, frame); err != nil {
				break
			}
		}
		bulk.Wait()
		return nil
	})
}

// send puts a load on the link as its standard input tells, and answers there:
// KIND ADDRESS FOLDER PROFILE.
func send(args []string) error {
	kind, addr, shared := args[0], args[1], args[2]
	return profiled(args[3], func() error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		l, err := dial(ctx, kind, addr, shared)
		if err != nil {
			return err
		}
		m := &meter{start: time.Now()}
		var running sync.WaitGroup
		failed := make(chan error, 3)
		run := func(f func() error) {
			running.Go(func() {
				if err := f(); err != nil && ctx.Err() == nil {
					failed <- err
				}
			})
		}
		run(func() error { return m.ask(ctx, l) })
		run(func() error { return m.hear(ctx, l) })
		go func() { // ends with the process at the latest
			fmt.Fprintln(os.Stderr, <-failed)
			os.Exit(1)
		}()
		commands := bufio.NewScanner(os.Stdin)
		for commands.Scan() {
			switch commands.Text() {
			case "bulk":
				run(func() error { return fill(ctx, l) })
			case "sample":
				x := m.sample()
				x.Carriers = l.carriers()
				if err := json.NewEncoder(os.Stdout).Encode(x); err != nil {
					return err
				}
			default:
				return fmt.Errorf("no command %q", commands.Text())
			}
		}
		cancel()
		err = l.close()
		running.Wait()
		return err
	})
}

// fill sends bulk that does not compress, until ctx ends.
func fill(ctx context.Context, l load) error {
	frame := make([]byte, bulkFrame)
	random, err := os.Open("/dev/urandom")
	if err != nil {
		return err
	}
	defer random.Close()
	if _, err := random.Read(frame); err != nil {
		return err
	}
	for {
		if err := l.bulk(ctx, frame); err != nil {
			return fmt.Errorf("send bulk: %w", err)
		}
	}
}

// meter asks for answers and keeps their times.
type meter struct {
	start time.Time
	mu    sync.Mutex
	last  sample
	peer  time.Duration // CPU time of the server
}

// ask sends probes.
func (m *meter) ask(ctx context.Context, l load) error {
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		now := binary.BigEndian.AppendUint64(nil, uint64(time.Since(m.start)))
		if err := l.probe(ctx, now); err != nil {
			return fmt.Errorf("send probe: %w", err)
		}
	}
}

// hear takes answers.
func (m *meter) hear(ctx context.Context, l load) error {
	for {
		frame, err := l.answer(ctx)
		if err != nil {
			return fmt.Errorf("receive answer: %w", err)
		}
		if len(frame) != answerSize {
			return fmt.Errorf("an answer of %d bytes", len(frame))
		}
		m.mu.Lock()
		m.last.Probes = append(m.last.Probes, time.Since(m.start)-time.Duration(binary.BigEndian.Uint64(frame)))
		m.last.Received = binary.BigEndian.Uint64(frame[8:])
		m.peer = time.Duration(binary.BigEndian.Uint64(frame[16:]))
		m.mu.Unlock()
	}
}

func (m *meter) sample() sample {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.last
	s.CPU = m.peer + cpuTime()
	m.last.Probes = nil
	return s
}

// cpuTime is what this process has taken.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0 // it has no cause to fail
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// profiled runs f with its CPU profile written to a file, if it has a name.
func profiled(file string, f func() error) (err error) {
	if file == "" {
		return f()
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(out); err != nil {
		return errors.Join(err, out.Close())
	}
	defer func() {
		pprof.StopCPUProfile()
		err = errors.Join(err, out.Close())
	}()
	return f()
}
