package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// sshCommand runs in the guest's shell: it prints a numbered line each 100 ms, or as fast as the guest can start sleep, and
// all that it reads, until its input ends.
const sshCommand = `n=0
while sleep 0.1; do n=$((n+1)); echo "line $n"; done &
while read -r x; do echo "echo $x"; done
kill $!`

const (
	sshInterval = 100 * time.Millisecond
	// sshTimeout bounds the start: under TCG, the key exchange takes a busy guest many seconds.
	sshTimeout = time.Minute
	// sshConnectTimeout is how long the client waits for the server's first words.
	sshConnectTimeout = 30 * time.Second
)

// SSHSession is OpenSSH's client in a site with a session on the guest, in which numbered lines go both ways.
type SSHSession struct {
	stop  context.CancelFunc // ends the session
	kill  context.CancelFunc // ends the client
	done  chan struct{}
	ready chan struct{} // closed with the first line

	mu    sync.Mutex
	meter sshMeter
}

// SSHResult is what an SSHSession saw. Times are exact to about 100 ms.
type SSHResult struct {
	Lines      int64   `json:"lines"`  // that the guest printed by itself
	Sent       int64   `json:"sent"`   // lines
	Echoed     int64   `json:"echoed"` // of them
	Breaks     int64   `json:"breaks"` // lines of either kind that did not follow the one before, or were something else
	LongestGap Silence `json:"longest_gap"`
	Broken     string  `json:"broken,omitempty"` // how the session ended, unless by Stop and with all echoed
}

// Err is nil if all lines came in order, over a session that lived until Stop.
func (r SSHResult) Err() error {
	switch {
	case r.Broken != "":
		return fmt.Errorf("the session broke with %d of %d lines echoed: %s", r.Echoed, r.Sent, r.Broken)
	case r.Breaks != 0:
		return fmt.Errorf("%d of %d lines did not follow the one before", r.Breaks, r.Lines+r.Echoed)
	}
	return nil
}

func (r SSHResult) String() string {
	return fmt.Sprintf("%d lines printed, %d of %d echoed, %d out of order%s; %v",
		r.Lines, r.Echoed, r.Sent, r.Breaks, describeBroken(r.Broken), r.LongestGap)
}

// StartSSH logs in to the guest, which must have been made with SSH, from inside a site.
func (v *VM) StartSSH(ctx context.Context, site string, to netip.Addr) (*SSHSession, error) {
	s, err := v.startSSH(ctx, site, to)
	if err != nil {
		return nil, fmt.Errorf("ssh to VM %q: %w", v.Name, err)
	}
	ended := "no answer"
	select {
	case <-s.ready:
		return s, nil
	case <-s.done:
		ended = s.Stop().Broken
	case <-time.After(sshTimeout):
	case <-ctx.Done():
		ended = context.Cause(ctx).Error()
	}
	s.kill()
	s.Stop()
	return nil, fmt.Errorf("ssh to VM %q: no session: %s", v.Name, ended)
}

func (v *VM) startSSH(ctx context.Context, site string, to netip.Addr) (*SSHSession, error) {
	key := filepath.Join(v.sshDir(), "client")
	if _, err := os.Stat(key); errors.Is(err, os.ErrNotExist) {
		return nil, errors.New("it runs no ssh server: make it with wanlab vm --ssh")
	} else if err != nil {
		return nil, err
	}
	alive, kill := context.WithCancel(context.WithoutCancel(ctx))
	client, err := v.lab.Command(alive, site, "ssh", "-F", "none", "-T", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", fmt.Sprintf("ConnectTimeout=%.0f", sshConnectTimeout.Seconds()),
		"-o", "IdentitiesOnly=yes", "-o", "IdentityFile="+sshPath(key), "-o", "StrictHostKeyChecking=yes", "-o", "HostKeyAlias="+sshHost,
		"-o", "UserKnownHostsFile="+sshPath(filepath.Join(v.sshDir(), "known_hosts")), "-o", "GlobalKnownHostsFile=none",
		"-l", "root", to.String(), sshCommand)
	if err != nil {
		kill()
		return nil, err
	}
	// An interrupt from the terminal is for the caller, who then stops the session.
	client.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	client.WaitDelay = time.Second
	said := &firstBytes{}
	client.Stderr = said
	in, err := client.StdinPipe()
	if err != nil {
		kill()
		return nil, err
	}
	out, err := client.StdoutPipe()
	if err != nil {
		kill()
		return nil, err
	}
	if err := client.Start(); err != nil {
		kill()
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	s := &SSHSession{stop: stop, kill: kill, done: make(chan struct{}), ready: make(chan struct{}),
		meter: sshMeter{gaps: silenceMeter{began: time.Now()}}}
	go func() {
		defer close(s.done)
		defer kill()
		var sender sync.WaitGroup
		sender.Go(func() { s.send(ctx, in) })
		s.receive(out)
		err := client.Wait()
		stopped := ctx.Err() != nil
		stop()
		sender.Wait()
		s.ended(err, stopped, said.String())
	}()
	return s, nil
}

// sshPath writes a path for an option of ssh, which would else split it at spaces and expand percent signs.
func sshPath(path string) string { return `"` + strings.ReplaceAll(path, "%", "%%") + `"` }

// send ends the session's input when it ends, upon which the guest ends the session.
func (s *SSHSession) send(ctx context.Context, in io.WriteCloser) {
	defer in.Close()
	tick := time.NewTicker(sshInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		s.meter.result.Sent++
		n := s.meter.result.Sent
		s.mu.Unlock()
		if _, err := fmt.Fprintln(in, n); err != nil {
			return // the client has ended, and will say why
		}
	}
}

func (s *SSHSession) receive(out io.Reader) {
	lines := bufio.NewScanner(out)
	for first := true; lines.Scan(); first = false {
		s.mu.Lock()
		s.meter.line(lines.Text(), time.Now())
		s.mu.Unlock()
		if first {
			close(s.ready)
		}
	}
	if err := lines.Err(); err != nil {
		s.broke(err.Error())
		s.kill()
	}
}

// ended judges the end of the client.
func (s *SSHSession) ended(err error, stopped bool, said string) {
	s.mu.Lock()
	complete := s.meter.result.Echoed == s.meter.result.Sent
	s.mu.Unlock()
	switch {
	case err != nil:
		s.broke(strings.TrimSpace(fmt.Sprintf("%v: %s", err, said)))
	case !stopped:
		s.broke("the guest ended it")
	case !complete:
		s.broke("it ended without the rest")
	}
}

// broke keeps the first reason: those that follow come from it.
func (s *SSHSession) broke(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.meter.result.Broken == "" {
		s.meter.result.Broken = why
		s.meter.gaps.lost(time.Now())
	}
}

// Done is closed when the session has ended, by Stop or by itself.
func (s *SSHSession) Done() <-chan struct{} { return s.done }

// Stop ends the input of the session and waits for the rest of its output.
func (s *SSHSession) Stop() SSHResult {
	s.stop()
	select {
	case <-s.done:
	case <-time.After(drainTime):
		s.broke(fmt.Sprintf("no end within %v of that of its input", drainTime))
		s.kill()
		<-s.done
	}
	return s.meter.total()
}

// sshMeter compares the lines of an SSHSession with what they must be.
type sshMeter struct {
	printed, echoed int64 // numbers of the last lines
	gaps            silenceMeter
	result          SSHResult
}

func (m *sshMeter) line(text string, at time.Time) {
	m.gaps.heard(at)
	kind, number, _ := strings.Cut(text, " ")
	n, err := strconv.ParseInt(number, 10, 64)
	plain := err == nil && number == strconv.FormatInt(n, 10)
	var last *int64
	switch {
	case plain && kind == "line":
		m.result.Lines++
		last = &m.printed
	case plain && kind == "echo" && n <= m.result.Sent:
		m.result.Echoed++
		last = &m.echoed
	default:
		m.result.Breaks++
		return
	}
	if n != *last+1 {
		m.result.Breaks++
	}
	*last = n
}

func (m *sshMeter) total() SSHResult {
	m.result.LongestGap = m.gaps.longest
	return m.result
}

// firstBytes keeps the start of what is written to it.
type firstBytes struct{ text []byte }

func (f *firstBytes) Write(p []byte) (int, error) {
	f.text = append(f.text, p[:min(len(p), 1<<10-len(f.text))]...)
	return len(p), nil
}

// String is the text in one line.
func (f *firstBytes) String() string { return strings.Join(strings.Fields(string(f.text)), " ") }
