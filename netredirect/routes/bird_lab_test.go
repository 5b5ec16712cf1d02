//go:build lab

package routes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

var cables atomic.Int32

// cable is a network of one router and two hosts, which are this namespace.
type cable struct {
	t  *testing.T
	n  int32
	rt *router
}

// router is a BIRD.
type router struct {
	t    *testing.T
	dir  string
	kill func() // ends BIRD at once, and with it the cable
}

func newCable(t *testing.T) *cable {
	t.Helper()
	c := &cable{t: t, n: cables.Add(1)}
	return c
}

func (c *cable) v4(host int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("10.77.%d.%d", c.n, host))
}

func (c *cable) v6(host int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("fd77:%d::%d", c.n, host))
}

// start starts BIRD with protocols, a part of its configuration in which R4, R6,
// H4, H6, S4 and S6 stand for the addresses of the router and the two hosts, and
// plugs the cable in.
func (c *cable) start(protocols string) *router {
	c.t.Helper()
	r := &router{t: c.t, dir: c.t.TempDir()}
	r.configure(c, protocols)
	log, err := os.Create(r.file("log"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	c.t.Cleanup(func() {
		if c.t.Failed() {
			c.t.Logf("BIRD:\n%s", r.log())
		}
	})
	space := testnet.New(c.t, "router")
	space.Sh(noAdvertisements)
	bird := exec.Command("/usr/sbin/bird", "-f", "-c", r.file("conf"), "-s", r.file("ctl"))
	bird.Stderr = log
	kill := space.Start(bird)
	eventually(c.t, "BIRD answers", func() error {
		_, err := r.try("show status")
		return err
	})
	unplug := c.plug(space)
	r.kill = func() {
		kill()
		unplug()
	}
	c.rt = r
	return r
}

func (r *router) file(name string) string { return filepath.Join(r.dir, name) }

func (r *router) log() string {
	r.t.Helper()
	text, err := os.ReadFile(r.file("log"))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

func (r *router) configure(c *cable, protocols string) {
	c.t.Helper()
	addresses := strings.NewReplacer(
		"R4", c.v4(1).String(), "H4", c.v4(2).String(), "S4", c.v4(3).String(),
		"R6", c.v6(1).String(), "H6", c.v6(2).String(), "S6", c.v6(3).String())
	config := "log stderr all;\nrouter id R4;\nprotocol device { scan time 1; }\nprotocol direct { ipv4; ipv6; }\n" + protocols
	if err := os.WriteFile(r.file("conf"), []byte(addresses.Replace(config)), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// plug connects this namespace and the router's.
func (c *cable) plug(router *testnet.Space) (unplug func()) {
	c.t.Helper()
	here, name := testnet.Here(c.t), fmt.Sprintf("t%d", c.n)
	testnet.Join(here, name, router, "up")
	for _, end := range []struct {
		at    *testnet.Space
		name  string
		hosts []int
	}{{router, "up", []int{1}}, {here, name, []int{2, 3}}} {
		for _, host := range end.hosts {
			end.at.Sh(fmt.Sprintf("ip addr add %v/24 dev %s; ip addr add %v/64 dev %[2]s nodad", c.v4(host), end.name, c.v6(host)))
		}
	}
	return func() { here.Sh("ip link del " + name) }
}

func (r *router) try(command string) (string, error) {
	out, err := exec.Command("/usr/sbin/birdc", append([]string{"-s", r.file("ctl")}, strings.Fields(command)...)...).CombinedOutput()
	return string(out), err
}

func (r *router) birdc(command string) string {
	r.t.Helper()
	out, err := r.try(command)
	if err != nil {
		r.t.Fatalf("birdc %s: %v\n%s", command, err, out)
	}
	return out
}

// noRoute is what birdc says, and fails with, when there is none.
const noRoute = "Network not found"

// route is what BIRD has of a prefix.
func (r *router) route(p netip.Prefix) string {
	r.t.Helper()
	out, err := r.try("show route table master" + version(p) + " " + p.String() + " all")
	if err != nil && !strings.Contains(out, noRoute) {
		r.t.Fatalf("birdc: %v\n%s", err, out)
	}
	return out
}

func version(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "4"
	}
	return "6"
}

// has waits until BIRD's route to the prefix says all that is wanted.
func (r *router) has(p netip.Prefix, wanted ...string) {
	r.t.Helper()
	eventually(r.t, "route to "+p.String(), func() error {
		out := r.route(p)
		if strings.Contains(out, noRoute) {
			return errors.New(noRoute)
		}
		for _, w := range wanted {
			if !strings.Contains(out, w) {
				return fmt.Errorf("no %q in:\n%s", w, out)
			}
		}
		return nil
	})
}

// lacks waits until BIRD has no route to the prefix.
func (r *router) lacks(p netip.Prefix) {
	r.t.Helper()
	eventually(r.t, "no route to "+p.String(), func() error {
		if out := r.route(p); !strings.Contains(out, noRoute) {
			return fmt.Errorf("still:\n%s", out)
		}
		return nil
	})
}

// eventually fails the test if something does not become true in time.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// speak starts a speaker that ends with the test.
func speak(t *testing.T, config Config, resume ...netip.Prefix) *Speaker {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	s, err := New(context.Background(), config, resume, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// process is a speaker in a process of its own, which ends with its input.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	input io.WriteCloser
}

func speakElsewhere(t *testing.T, args speakerArgs) *process {
	t.Helper()
	text, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command("/proc/self/exe")}
	p.cmd.Env = append(os.Environ(), speakerVar+"="+string(text))
	p.cmd.Stderr = t.Output()
	if p.input, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

// tell has the speaker "announce" or "withdraw".
func (p *process) tell(verb string, prefixes ...netip.Prefix) {
	p.t.Helper()
	for _, prefix := range prefixes {
		if _, err := fmt.Fprintln(p.input, verb, prefix); err != nil {
			p.t.Fatal(err)
		}
	}
}

// kill ends the process at once.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// end lets it close its speaker.
func (p *process) end() {
	p.t.Helper()
	p.input.Close()
	if err := p.cmd.Wait(); err != nil {
		p.t.Error("speaker:", err)
	}
}

// state waits until the only peer's state is as wanted.
func state(t *testing.T, s *Speaker, up bool, problem string) {
	t.Helper()
	eventually(t, "state of the peer", func() error {
		p := s.Peers()[0]
		if p.Up != up || !strings.Contains(p.Problem, problem) || (problem == "" && p.Problem != "") {
			return fmt.Errorf("%+v, want up %v, problem %q", p, up, problem)
		}
		return nil
	})
}
