//go:build lab

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/lab/guest/api"
	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
)

// attempt is a move that a fault meets.
type attempt struct {
	*world // of the fault's own test
	*prover
	step     step
	harm     harm
	from, to string
	move     string
	further  int // moves that were made besides
	before   *api.Report
	goOn     func() // lets the agent go on that stands at the step, if it is still there
}

// meet moves the guest, does harm to the move at a step of it, and judges what comes
// of that.
func (p *prover) meet(t *testing.T, s step, h harm) {
	a := &attempt{world: &world{p.lab, t}, prover: p, step: s, harm: h, from: p.at, to: other(p.at)}
	for _, dc := range lab.DataCentres {
		os.RemoveAll(a.points(dc))
	}
	var err error
	if a.before, err = p.v.Load(t.Context(), a.from, lab.LoadChange{Dirty: mib(s.dirty)}); err != nil {
		t.Fatal(err)
	}
	probe, err := p.v.StartProbe(t.Context(), 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	a.begin()
	ended := h.do(a)
	a.goOn()
	o := a.judge(ended)
	seen, err := probe.Stop()
	if err != nil {
		t.Error(err)
	}
	a.single(seen)
	p.at = o.at
	p.table.add(h.name, s.column, o)
	t.Logf("%s: %v", a.move, o)
}

// What an agent does at a point, see faults/doc.go.
const (
	stop = "stop"
	wait = "wait"
	full = "fail no space left on device"
	bad  = "fail input/output error"
)

// begin begins the move and returns when it stands at the step.
func (a *attempt) begin() {
	a.t.Helper()
	what, pid := a.harm.arms, a.agentPid(a.site(a.step.side))
	if what == "" {
		what = stop
	}
	a.arm(a.step.side, a.step.point, what)
	if a.harm.clock != "" {
		a.arm(a.step.side, "clock", a.harm.clock)
	}
	if a.step.aborts {
		a.arm(destination, "disk-write", bad)
	}
	st, err := a.agents[a.from].StartMove(a.t.Context(), migrate.Request{VM: a.v.Name, To: a.to, Redirect: netredirect.None,
		MaxOutage: a.harm.outage, Fresh: a.harm.fresh})
	if err != nil {
		a.t.Fatal(err)
	}
	a.move = st.Move
	reached := filepath.Join(a.points(a.site(a.step.side)), a.step.point+".reached")
	a.goOn = sync.OnceFunc(func() {
		// An error means that it has been killed.
		_, _ = os.Remove(reached), syscall.Kill(pid, syscall.SIGCONT)
	})
	a.until("the move comes to "+a.step.name, func() bool { _, err := os.Stat(reached); return err == nil })
	if what == stop {
		a.until("the agent stands", func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			_, state, _ := strings.Cut(string(b), ") ")
			return err == nil && strings.HasPrefix(state, "T")
		})
	}
}

// until waits until something is so.
func (a *attempt) until(what string, is func() bool) {
	a.t.Helper()
	for until := time.Now().Add(time.Minute); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(until) {
			acc, err := a.account()
			a.t.Fatalf("waited in vain until %s: %v, %v", what, acc, err)
		}
	}
}

// site is where a side of the move is.
func (a *attempt) site(side string) string {
	if side == destination {
		return a.to
	}
	return a.from
}

func other(site string) string {
	if site == lab.LocalDC {
		return lab.RemoteDC
	}
	return lab.LocalDC
}

// points is a site's folder of points at which its agent is waited for.
func (a *attempt) points(site string) string { return a.path(site, faults.Folder) }

// arm has the agent of a side do something when it comes to a point.
func (a *attempt) arm(side, point, what string) {
	a.t.Helper()
	dir := a.points(a.site(side))
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, point), []byte(what), 0o600)
	}
	if err != nil {
		a.t.Fatal(err)
	}
}

// agentPid is a site's agent as a process of the host.
func (a *attempt) agentPid(site string) int {
	a.t.Helper()
	all, err := a.Sites[site].Daemons(a.t.Context())
	if err != nil || all[lab.Agent].Pid == 0 {
		a.t.Fatalf("the agent at %s does not run: %+v, %v", site, all[lab.Agent], err)
	}
	return a.hostPid(site, all[lab.Agent].Pid)
}
