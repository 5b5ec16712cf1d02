//go:build lab

package routes

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// The tests run in a network namespace of their own, in which the speakers
// have addresses; each test's BIRD runs in one more, at the other end of a
// cable.
//
//	test binary's namespace                      BIRD's namespace
//	  t<n>  10.77.n.2, .3  fd77:n::2, ::3  ====  up  10.77.n.1  fd77:n::1

// noAdvertisements has a namespace's devices get no addresses by themselves.
const noAdvertisements = "echo 0 > /proc/sys/net/ipv6/conf/default/accept_ra"

// speakerVar has, in the environment of this program as it starts itself again,
// the arguments of a speaker to be killed.
const speakerVar = "ROUTES_TEST_SPEAKER"

func TestMain(m *testing.M) {
	limitRetry = 2 * time.Second
	flag.Parse()
	err := flag.Set("test.parallel", parallel)
	if args := os.Getenv(speakerVar); args != "" {
		if err = runSpeaker(args); err == nil {
			return
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab of routes:", err)
		os.Exit(1)
	}
	testnet.Main(m, noAdvertisements)
}

// speakerArgs are what a speaker of its own process begins with.
type speakerArgs struct {
	Config Config
	Resume []netip.Prefix
}

// runSpeaker obeys the lines of its input, "announce PREFIX" or "withdraw
// PREFIX", and closes at their end.
func runSpeaker(text string) error {
	var args speakerArgs
	if err := json.Unmarshal([]byte(text), &args); err != nil {
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
