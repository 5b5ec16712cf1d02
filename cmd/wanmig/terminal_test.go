package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// heldMove is an agent whose move goes on until the test releases it.
const heldMove = `POST /v1/moves 201
{"move":"m1","role":"source","vm":"web","peer":"remote-dc","phase":"check","started":"2026-01-02T03:04:05Z"}

POST /v1/moves/m1/cancel 202

GET /v1/moves/m1/watch 200
{"move":"m1","role":"source","vm":"web","peer":"remote-dc","phase":"sync","started":"2026-01-02T03:04:05Z","disks":[{"target":"vda","size":4194304,"done":1048576}]}
!hold
`

const movedAtLast = heldMove + `{"move":"m1","vm":"web","peer":"remote-dc","phase":"done","result":{"result":"done","move":"m1","vm":"web","to":"remote-dc"}}`

const cancelledAtLast = heldMove + `{"move":"m1","vm":"web","peer":"remote-dc","phase":"rolled-back","result":{"result":"rolled-back","move":"m1","vm":"web","to":"remote-dc","error":"cancelled"}}`

// TestSignalsDetach ends a watching command that has no terminal: the move
// goes on and the command says how to come back to it.
func TestSignalsDetach(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			_, socket := serveCanned(t, movedAtLast)
			cmd := command(socket, "move", "web", "--to", "remote-dc", "--json")
			var stdout bytes.Buffer
			stderr := newScreen()
			cmd.Stdout, cmd.Stderr = &stdout, stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			stderr.waitFor(t, "web sync:")
			cmd.Process.Signal(sig)
			wantExit(t, cmd, exitDetached)
			stderr.waitFor(t, "Detached: move m1 goes on.")
			if got := stdout.String(); !strings.HasPrefix(got, `{"result":"detached","move":"m1","vm":"web"`) || strings.Count(got, "\n") != 1 {
				t.Errorf("stdout is %q", got)
			}
		})
	}
}

// TestCtrlCAsks types on a terminal that the command runs in.
func TestCtrlCAsks(t *testing.T) {
	const question = "[y = cancel, d = detach and let it go on, Enter = keep watching] "

	t.Run("detach", func(t *testing.T) {
		_, socket := serveCanned(t, movedAtLast)
		term := inTerminal(t, command(socket, "move", "web", "--to", "remote-dc"))
		term.waitFor(t, "1.0 of 4.0 MiB")
		term.keys("\x03")
		term.waitFor(t, question)
		term.keys("what?\n")
		term.waitFor(t, "[y, d or Enter] ")
		term.keys("d\n")
		wantExit(t, term.cmd, exitDetached)
		term.waitFor(t, "Detached: move m1 goes on.")
	})

	t.Run("Ctrl-C again", func(t *testing.T) {
		_, socket := serveCanned(t, movedAtLast)
		term := inTerminal(t, command(socket, "move", "web", "--to", "remote-dc"))
		term.waitFor(t, "web → remote-dc  sync")
		term.keys("\x03")
		term.waitFor(t, question)
		term.keys("\x03")
		wantExit(t, term.cmd, exitDetached)
	})

	t.Run("keep watching, then cancel", func(t *testing.T) {
		agent, socket := serveCanned(t, cancelledAtLast)
		term := inTerminal(t, command(socket, "move", "web", "--to", "remote-dc"))
		term.waitFor(t, "web → remote-dc  sync")
		term.keys("\x03")
		term.waitFor(t, question)
		term.keys("\n")
		term.waitForAfter(t, question, "web → remote-dc  sync")
		term.keys("\x03")
		term.waitForAfter(t, "keep watching] ", question)
		term.keys("y\n")
		if err := agent.waitFor("POST /v1/moves/m1/cancel"); err != nil {
			t.Fatal(err)
		}
		term.waitFor(t, "Cancelling: the guest stays at the source.")
		agent.release()
		wantExit(t, term.cmd, exitFailed)
		term.waitFor(t, "wanmig: move m1 of web: rolled-back: cancelled")
	})

	t.Run("the move ends meanwhile", func(t *testing.T) {
		agent, socket := serveCanned(t, movedAtLast)
		term := inTerminal(t, command(socket, "move", "web", "--to", "remote-dc"))
		term.waitFor(t, "web → remote-dc  sync")
		term.keys("\x03")
		term.waitFor(t, question)
		agent.release()
		wantExit(t, term.cmd, exitDone)
		term.waitFor(t, "web runs at remote-dc.")
	})
}

// TestCutAsks cuts a tunnel that is in use, on a terminal.
func TestCutAsks(t *testing.T) {
	const question = "Cut the tunnel? 12 connections of web will break. [y/n] "
	var flows []string
	for i := range 12 {
		flows = append(flows, fmt.Sprintf(`{"proto":"tcp","from":"203.0.113.5:%d","to":"192.0.2.10:22","bytes":60}`, 40000+i))
	}
	text := `POST /v1/redirects/web/cut 409
{"error":"12 connections use the tunnel, and would break: --force cuts them"}

POST /v1/redirects/web/cut 204

GET /v1/redirects/web 200
{"move":"m1","vm":"web","state":"standing","flows":[` + strings.Join(flows, ",") + "]}"

	t.Run("yes", func(t *testing.T) {
		_, socket := serveCanned(t, text)
		term := inTerminal(t, command(socket, "redirect", "cut", "web"))
		term.waitFor(t, "tcp 203.0.113.5:40009 -> 192.0.2.10:22, 60 B\r\n  and 2 more\r\n"+question)
		term.keys("y\n")
		wantExit(t, term.cmd, exitDone)
		term.waitFor(t, "The tunnel of web is removed.")
	})

	for what, keys := range map[string]string{"no": "n\n", "nothing": "\n", "what": "yesterday\n", "end": "\x04"} {
		t.Run(what, func(t *testing.T) {
			_, socket := serveCanned(t, text)
			term := inTerminal(t, command(socket, "redirect", "cut", "web"))
			term.waitFor(t, question)
			term.keys(keys)
			wantExit(t, term.cmd, exitRefused)
			term.waitFor(t, "wanmig: nothing was cut")
		})
	}
}

// TestSmallTerminal runs the command in a terminal without a size, as a serial
// console may be: lines take the place of bars.
func TestSmallTerminal(t *testing.T) {
	agent, socket := serveCanned(t, movedAtLast)
	term := openTerminal(t, command(socket, "move", "web", "--to", "remote-dc"), unix.Winsize{})
	term.waitFor(t, "web sync: ")
	agent.release()
	wantExit(t, term.cmd, exitDone)
	term.waitFor(t, "web runs at remote-dc.")
}

// screen collects what a command prints.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func newScreen() *screen { return &screen{more: make(chan struct{}, 1)} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.more <- struct{}{}:
	default:
	}
	return s.text.Write(p)
}

func (s *screen) waitFor(t *testing.T, want string) {
	t.Helper()
	s.waitForAfter(t, "", want)
}

// waitForAfter waits until want is printed later than the first printed mark.
func (s *screen) waitForAfter(t *testing.T, mark, want string) {
	t.Helper()
	deadline := time.After(time.Minute)
	from := -1
	for {
		s.mu.Lock()
		text := s.text.String()
		s.mu.Unlock()
		if from < 0 {
			from = strings.Index(text, mark) + len(mark)
			if mark == "" {
				from = 0
			}
		}
		if strings.Contains(text[from:], want) {
			return
		}
		select {
		case <-s.more:
		case <-deadline:
			t.Fatalf("%q was not printed, but:\n%s", want, text)
		}
	}
}

// terminal is a pseudo terminal with a command in it.
type terminal struct {
	*screen
	cmd    *exec.Cmd
	master *os.File
}

func inTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	return openTerminal(t, cmd, unix.Winsize{Row: 24, Col: 100})
}

func openTerminal(t *testing.T, cmd *exec.Cmd, size unix.Winsize) *terminal {
	t.Helper()
	master, slave, err := openPTY(size)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	term := &terminal{newScreen(), cmd, master}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		// The copy ends with EIO when the command has ended.
		io.Copy(term.screen, master)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-read
		master.Close()
	})
	return term
}

func openPTY(size unix.Winsize) (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	raw, err := master.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var number int
	var failed error
	if err := raw.Control(func(fd uintptr) {
		number, failed = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		failed = errors.Join(failed, unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &size))
	}); err != nil || failed != nil {
		return nil, nil, errors.Join(err, failed)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	return master, slave, err
}

func (t *terminal) keys(s string) { t.master.WriteString(s) }

func wantExit(t *testing.T, cmd *exec.Cmd, want int) {
	t.Helper()
	ended := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer ended.Stop()
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != want {
		t.Errorf("exit code %d, want %d", got, want)
	}
}
