//go:build lab || bench

package testnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// Main is the TestMain of a package whose goroutines open sockets by themselves,
// and so need all of the process in a namespace of its own: it starts the
// process again in one, which a script prepares, and runs the tests there.
func Main(m *testing.M, script string) {
	const inside = "WANMIG_TESTNET_INSIDE"
	if os.Getenv(inside) != "" {
		if out, err := exec.Command("sh", "-euc", begin+"\n"+script).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "prepare the tests' network namespace: %v: %s\n", err, out)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Env = append(os.Environ(), inside+"=1")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := child.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(max(exit.ExitCode(), 1)) // it has said why
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "run the tests in a network namespace, which needs root: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}
