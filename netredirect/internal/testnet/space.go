//go:build lab || bench

// Package testnet makes networks for tests, which alone import it: network namespaces that are hosts, and cables between
// them.
//
//	client, server := testnet.New(t, "client"), testnet.New(t, "server")
//	testnet.Join(client, "eth0", server, "eth0")
//	server.Sh("ip addr add 192.0.2.1/24 dev eth0")
//
// A space's name is for messages alone. The kernel knows the namespace by none, so that tests which run at once can't
// meet, and removes it with the last process and file in it: also a test that panics or is killed leaves nothing to the
// next.
package testnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A Space is a network namespace. Its methods may be called at the same time.
type Space struct {
	t    testing.TB
	name string
	ns   *os.File
}

// begin is what a new namespace lacks. It may have had IPv6 switched off by the
// settings of the host.
const begin = `for i in default lo; do echo 0 > /proc/sys/net/ipv6/conf/$i/disable_ipv6; done; ip link set lo up`

// init keeps the main thread to the main goroutine: it can't end, and would stay
// in the last namespace that it has entered.
func init() { runtime.LockOSThread() }

// New makes a namespace of which only lo is up, and which goes with the test.
func New(t testing.TB, name string) *Space {
	t.Helper()
	s := open(t, name, func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	s.Sh(begin)
	return s
}

// Here is the namespace of the test's own process.
func Here(t testing.TB) *Space {
	t.Helper()
	return open(t, "the test's namespace", func() error { return nil })
}

func open(t testing.TB, name string, enter func() error) *Space {
	t.Helper()
	s := &Space{t: t, name: name}
	err := onThread(enter, func() (err error) {
		s.ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatalf("make network namespace %s, which needs root: %v", name, err)
	}
	t.Cleanup(func() { s.ns.Close() })
	return s
}

// onThread runs f on a thread that enter has moved to another namespace, and
// that ends afterwards.
func onThread(enter, f func() error) error {
	result := make(chan error, 1)
	go func() {
		defer close(result)
		runtime.LockOSThread() // and never unlocked
		err := enter()
		if err == nil {
			err = f()
		}
		result <- err
	}()
	err, ok := <-result
	if !ok {
		return errors.New("it has ended its goroutine, as t.Fatal does")
	}
	return err
}

func (s *Space) String() string { return s.name }

// Run runs f in the space, and returns its error. Goroutines that f starts are
// not in the space; sockets and processes are.
func (s *Space) Run(f func() error) error {
	return onThread(func() error { return unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET) }, f)
}

// Must runs f in the space, and ends the test if it fails.
func (s *Space) Must(f func() error) {
	s.t.Helper()
	if err := s.Run(f); err != nil {
		s.t.Fatalf("in %s: %v", s.name, err)
	}
}

// Sh runs a script in the space, ends the test if any of its commands fails, and
// returns what it prints.
func (s *Space) Sh(script string) string {
	s.t.Helper()
	out, err := s.Try(script)
	if err != nil {
		s.t.Fatalf("in %s: %s: %v: %s", s.name, script, err, out)
	}
	return out
}

// Try runs a script that may fail. A program that is not there still ends the
// test.
func (s *Space) Try(script string) (string, error) {
	s.t.Helper()
	var out []byte
	err := s.Run(func() (err error) {
		out, err = exec.CommandContext(s.t.Context(), "sh", "-euc", script).CombinedOutput()
		return err
	})
	const notExecutable, notFound = 126, 127 // what sh returns
	exit, ran := errors.AsType[*exec.ExitError](err)
	if err != nil && (!ran || exit.ExitCode() == notExecutable || exit.ExitCode() == notFound) {
		s.t.Fatalf("in %s: %s: %v: %s", s.name, script, err, out)
	}
	return string(out), err
}

// Start starts a program in the space. It is killed by kill, and at the latest
// when the test ends or the test's process does.
func (s *Space) Start(cmd *exec.Cmd) (kill func()) {
	s.t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // as the thread ends that starts it, and so waits
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		err := s.Run(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			started <- nil
			_ = cmd.Wait() // it was killed
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		s.t.Fatalf("in %s: start %s: %v", s.name, cmd, err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
	})
	s.t.Cleanup(kill)
	return kill
}

// Join joins two spaces by a cable, a veth pair whose ends are up.
func Join(a *Space, aName string, b *Space, bName string) {
	a.t.Helper()
	a.Sh(fmt.Sprintf("ip link add name %s type veth peer name %s netns /proc/%d/fd/%d; ip link set dev %[1]s up", aName, bName, os.Getpid(), b.ns.Fd()))
	b.Sh("ip link set dev " + bName + " up")
}
