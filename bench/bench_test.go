//go:build bench

// Package bench measures sessions beside what else could carry the same bytes:
// on the lab's link, at several losses, beside another user, and with no network
// to speak of. Each row is one line, to be compared and searched for:
//
//	make bench RUN=TestLink
//	go test -tags bench -v ./bench -run 'TestLink/^loss=1%$' -window 20s
//
// Both ends are processes of this program, each at its site (see end_test.go).
package bench

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
)

var (
	startup = flag.Duration("startup", 10*time.Second, "how long a load runs before it is measured")
	window  = flag.Duration("window", 15*time.Second, "how long it is measured")
	only    = flag.String("only", "", "measure only rows with this in their name")
	profile = flag.String("profile", "", "folder for CPU profiles of both ends of each session")
)

// child is what this program can be started as, by its first argument.
var child = map[string]func(args []string) error{"serve": serve, "send": send}

func TestMain(m *testing.M) {
	lab.RunChild()
	if len(os.Args) > 1 && child[os.Args[1]] != nil {
		if err := child[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// bench is a lab that a test has to itself: its sites, and the link.
type bench struct {
	*lab.Lab
	t *testing.T
}

func newBench(t *testing.T, link lab.LinkSettings) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the lab makes network namespaces: run this as root")
	}
	dir, err := os.MkdirTemp("/var/tmp", "wb-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := lab.Up(t.Context(), lab.Options{Dir: dir, Link: link, NoAgent: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return &bench{l, t}
}

// change changes the link.
func (b *bench) change(c lab.LinkChange) {
	b.t.Helper()
	if err := b.ChangeLink(b.t.Context(), c); err != nil {
		b.t.Fatal(err)
	}
}

// wire is what local-dc has put on the link so far, in bytes of IP.
func (b *bench) wire() lab.LinkCounters {
	b.t.Helper()
	state, err := b.LinkState(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return state.Counters[lab.LocalDC]
}

func (b *bench) resetCounters() {
	b.t.Helper()
	if err := b.ResetCounters(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// start runs a command at a site until it ends or the test does.
func (b *bench) start(site string, out io.Writer, name string, args ...string) *exec.Cmd {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd, err := b.Command(ctx, site, name, args...)
	if err != nil {
		b.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, b.t.Output()
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	return cmd
}

// pings asks an address for echoes from local-dc for some time, and returns the
// times that they took.
func (b *bench) pings(to string, during time.Duration) quantiles {
	b.t.Helper()
	cmd, err := b.Command(b.t.Context(), lab.LocalDC, "ping", "-n", "-i", "0.05", "-w", fmt.Sprintf("%.0f", during.Seconds()), to)
	if err != nil {
		b.t.Fatal(err)
	}
	out, _ := cmd.Output() // its status tells of lost ones too
	var times []time.Duration
	for line := range strings.Lines(string(out)) {
		if _, text, found := strings.Cut(line, "time="); found {
			d, err := time.ParseDuration(strings.ReplaceAll(strings.TrimSpace(text), " ", ""))
			if err != nil {
				b.t.Fatalf("ping printed %q", line)
			}
			times = append(times, d)
		}
	}
	if len(times) == 0 {
		b.t.Fatalf("no echo from %s: %s", to, out)
	}
	return newQuantiles(times)
}

// flow is a TCP flow of iperf3 from local-dc that is not over yet.
type flow struct {
	*bench
	client, server *exec.Cmd
	out            *strings.Builder
}

// iperf starts one that leaves out its first seconds.
func (b *bench) iperf(control, site, to string, omit, during time.Duration) *flow {
	b.t.Helper()
	server := b.start(site, io.Discard, "iperf3", "-s", "-1")
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		cmd, err := b.Command(b.t.Context(), site, "ss", "-Hltn", "sport = :5201")
		if err != nil {
			b.t.Fatal(err)
		}
		if out, err := cmd.Output(); err == nil && len(out) > 0 {
			break
		}
		if time.Now().After(until) {
			b.t.Fatalf("iperf3 does not listen at %s", site)
		}
	}
	f := &flow{bench: b, server: server, out: &strings.Builder{}}
	f.client = b.start(lab.LocalDC, f.out, "iperf3", "-c", to, "-C", control, "-J",
		"-O", fmt.Sprintf("%.0f", omit.Seconds()), "-t", fmt.Sprintf("%.0f", during.Seconds()))
	return f
}

// end waits for the flow's end and returns its payload in bits per second.
func (f *flow) end() float64 {
	f.t.Helper()
	err := errors.Join(f.client.Wait(), f.server.Wait())
	var result struct {
		Intervals []struct {
			Sum struct {
				Seconds float64 `json:"seconds"`
				Bytes   float64 `json:"bytes"`
				Omitted bool    `json:"omitted"`
			} `json:"sum"`
		} `json:"intervals"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(f.out.String()), &result)
	}
	bytes, seconds := 0.0, 0.0
	for _, i := range result.Intervals {
		if !i.Sum.Omitted {
			bytes, seconds = bytes+i.Sum.Bytes, seconds+i.Sum.Seconds
		}
	}
	if err != nil || seconds == 0 {
		f.t.Fatalf("iperf3: %v: %s", err, f.out)
	}
	return bytes * 8 / seconds
}

// quantiles are of a set of times.
type quantiles struct{ median, p95 time.Duration }

func newQuantiles(times []time.Duration) quantiles {
	if len(times) == 0 {
		return quantiles{}
	}
	slices.Sort(times)
	return quantiles{times[len(times)/2], times[len(times)*95/100]}
}

func (q quantiles) String() string {
	if q == (quantiles{}) {
		return "-"
	}
	return fmt.Sprintf("%.1f / %.1f ms", float64(q.median)/1e6, float64(q.p95)/1e6)
}

// ends starts a process at either end of what carries a load.
func (b *bench) ends(kind, site, addr string) *sender {
	b.t.Helper()
	self, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	shared := b.t.TempDir()
	serverProfile, senderProfile := "", ""
	if *profile != "" {
		name, err := filepath.Abs(filepath.Join(*profile, strings.ReplaceAll(b.t.Name(), "/", "-")+"-"+kind))
		if err != nil {
			b.t.Fatal(err)
		}
		serverProfile, senderProfile = name+"-server.pprof", name+"-sender.pprof"
	}
	server := b.start(site, b.t.Output(), self, "serve", kind, addr, shared, serverProfile)
	ctx, cancel := context.WithCancel(context.Background())
	cmd, err := b.Command(ctx, lab.LocalDC, self, "send", kind, addr, shared, senderProfile)
	if err != nil {
		b.t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	cmd.Stderr = b.t.Output()
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	s := &sender{t: b.t, cmd: cmd, in: in, answers: json.NewDecoder(out), server: server}
	s.sample() // once it is connected
	return s
}

// sender is a process that puts a load on the link.
type sender struct {
	t       *testing.T
	cmd     *exec.Cmd
	in      io.WriteCloser
	answers *json.Decoder
	server  *exec.Cmd
}

func (s *sender) tell(command string) {
	s.t.Helper()
	if _, err := fmt.Fprintln(s.in, command); err != nil {
		s.t.Fatalf("the sender is gone: %v", err)
	}
}

// bulk begins to fill the link.
func (s *sender) bulk() { s.t.Helper(); s.tell("bulk") }

// sample says what went on since the sample before.
func (s *sender) sample() (x sample) {
	s.t.Helper()
	s.tell("sample")
	if err := s.answers.Decode(&x); err != nil {
		s.t.Fatalf("the sender is gone: %v", err)
	}
	return x
}

// stop ends both processes.
func (s *sender) stop() {
	s.t.Helper()
	s.in.Close()
	for _, cmd := range []*exec.Cmd{s.cmd, s.server} {
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err := <-ended:
			if err != nil {
				s.t.Errorf("an end of the session: %v", err)
			}
		case <-time.After(time.Minute):
			s.t.Error("an end of the session does not end")
			return
		}
	}
}
