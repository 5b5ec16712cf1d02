//go:build lab

package routes

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// The tests run in a network namespace of their own, in which the speakers
// have addresses; each test's BIRD runs in one more, at the other end of a
// cable. The namespaces have no names, so they end with their processes.
//
//	test binary's namespace                      BIRD's namespace
//	  t<n>  10.77.n.2, .3  fd77:n::2, ::3  ====  up  10.77.n.1  fd77:n::1
//
// This program starts itself again for each kind of process:
const (
	roleVar     = "ROUTES_TEST_ROLE"
	roleTests   = "tests"   // in the new namespace
	roleBIRD    = "bird"    // prepares a new namespace, and becomes BIRD
	roleSpeaker = "speaker" // a speaker to be killed
)

func TestMain(m *testing.M) {
	limitRetry = 2 * time.Second
	var err error
	switch os.Getenv(roleVar) {
	case "":
		err = enterNamespace()
	case roleTests:
		flag.Parse()
		if err = errors.Join(prepareNamespace(), flag.Set("test.parallel", parallel)); err == nil {
			os.Exit(m.Run())
		}
	case roleBIRD:
		if err = prepareNamespace(); err == nil {
			err = syscall.Exec("/usr/sbin/bird", append([]string{"bird", "-f"}, os.Args[1:]...), nil)
		}
	case roleSpeaker:
		err = runSpeaker()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab of routes:", err)
		os.Exit(1)
	}
}

// again is this program in another role, killed when this process ends.
func again(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func enterNamespace() error {
	cmd := again(roleTests, os.Args[1:]...)
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(1) // it has said why
	}
	return err
}

func prepareNamespace() error {
	for _, key := range []string{"default/disable_ipv6", "lo/disable_ipv6", "default/accept_ra"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+key, []byte("0"), 0o644); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// speakerArgs are what a speaker of its own process begins with.
type speakerArgs struct {
	Config Config
	Resume []netip.Prefix
}

// runSpeaker obeys the lines of its input, "announce PREFIX" or "withdraw
// PREFIX", and closes at their end.
func runSpeaker() error {
	var args speakerArgs
	if err := json.Unmarshal([]byte(os.Args[1]), &args); err != nil {
		return err
	}
	s, err := New(ctx, args.Config, args.Resume, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	defer s.Close()
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		verb, text, _ := strings.Cut(lines.Text(), " ")
		prefix, err := netip.ParsePrefix(text)
		if err == nil {
			do := map[string]func(context.Context, []netip.Prefix) error{"announce": s.Announce, "withdraw": s.Withdraw}[verb]
			err = do(ctx, []netip.Prefix{prefix})
		}
		if err != nil {
			return err
		}
	}
	return lines.Err()
}
