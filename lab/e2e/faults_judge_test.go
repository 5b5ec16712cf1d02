//go:build lab

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/lab/guest/api"
	"github.com/wanmig/wanmig/migrate"
)

// recoverWithin is how long what a fault has left may take, from its end on.
const recoverWithin = 10 * time.Second

// outcome is what came of a fault.
type outcome struct {
	what string        // stays, moves, or what an operator said
	at   string        // where the guest is
	took time.Duration // from the fault's end until both agents were done, or the move went on, and the guest answered
}

func (o outcome) String() string {
	return fmt.Sprintf("%s, at %s, after %d ms", o.what, o.at, o.took.Milliseconds())
}

// account is what both agents say of a move.
type account struct {
	source, destination migrate.Status
	known               bool // at the destination
}

func (a *attempt) account() (acc account, err error) {
	ctx, cancel := context.WithTimeout(a.t.Context(), 5*time.Second)
	defer cancel()
	if acc.source, err = a.agents[a.from].Move(ctx, a.move); err != nil {
		return acc, fmt.Errorf("agent of the source: %w", err)
	}
	acc.destination, err = a.agents[a.to].Move(ctx, a.move)
	var refusal *agent.APIError
	if errors.As(err, &refusal) && refusal.Status == http.StatusNotFound {
		return acc, nil // it has not come so far
	}
	acc.known = true
	if err != nil {
		err = fmt.Errorf("agent of the destination: %w", err)
	}
	return acc, err
}

// over reports that neither agent has anything left to do.
func (acc account) over() bool {
	return final(acc.source) && (!acc.known || final(acc.destination))
}

// inDoubt reports that a person has to decide: the destination has accepted the guest,
// and can't tell whether it has run it.
func (acc account) inDoubt() bool {
	return acc.source.Phase == migrate.PhaseInDoubt && acc.known && acc.destination.Phase == migrate.PhaseInDoubt
}

func (acc account) String() string {
	say := func(s migrate.Status) string {
		if s.Result == nil {
			return string(s.Phase)
		}
		return fmt.Sprintf("%s (%s)", s.Phase, s.Result.Error)
	}
	if !acc.known {
		return "source " + say(acc.source) + ", destination knows nothing"
	}
	return "source " + say(acc.source) + ", destination " + say(acc.destination)
}

// judge waits for the end of the move after a fault that ended at a time, and checks
// that there is one guest, whole, and nothing else of it.
func (a *attempt) judge(ended time.Time) outcome {
	a.t.Helper()
	o := outcome{what: "stays", at: a.from}
	decided := false
	if a.harm.passes && in("prepare", "disks", "memory")(a.step) {
		// The move goes on: its own time is not that of the fault.
		a.until("the link is back", func() bool {
			acc, err := a.account()
			return err == nil && (acc.source.Link.LostSince == nil || acc.over())
		})
		a.report(a.from)
		o.took = time.Since(ended)
	}
	a.until("the move is over", func() bool {
		acc, err := a.account()
		if err == nil && acc.inDoubt() && !decided {
			decided = true
			o.what = a.decide(acc)
			ended = time.Now()
		}
		return err == nil && acc.over()
	})
	acc, err := a.account()
	if err != nil {
		a.t.Fatal(err)
	}
	if acc.source.Phase == migrate.PhaseDone {
		o.at = a.to
		if o.what == "stays" {
			o.what = "moves"
		}
	}
	if acc.known && acc.source.Phase != acc.destination.Phase {
		a.t.Fatalf("the agents do not agree: %v", acc)
	}
	if ran := a.step.ran || a.step.column == "running"; ran && o.at != a.to || a.step.aborts && o.at != a.from {
		a.t.Fatalf("the guest, which had run at the destination: %v, is the other's: %v", ran, acc)
	}
	if a.harm.kills != "" && a.site(a.harm.kills) == o.at {
		o.what += ", started again"
		a.revived(&o, ended)
	} else {
		a.answers(&o, ended)
	}
	if o.took > recoverWithin {
		a.t.Errorf("it took %v after the fault's end: %v", o.took, acc)
	}
	a.alone(o.at)
	return o
}

// answers waits until the guest answers where it should be, as the one it was, and has
// it verify everything.
func (a *attempt) answers(o *outcome, ended time.Time) {
	a.t.Helper()
	r := a.report(o.at)
	if o.took == 0 {
		o.took = max(0, time.Since(ended))
	}
	if r.BootID != a.before.BootID {
		a.t.Fatalf("the guest at %s has booted anew", o.at)
	}
	for i, d := range r.Disks {
		if d.Acknowledged < a.before.Disks[i].Acknowledged {
			a.t.Errorf("disk %s went back from block %d to %d", d.Device, a.before.Disks[i].Acknowledged, d.Acknowledged)
		}
	}
	a.healthy(o.at, a.v)
}

// report asks the guest until it answers. It may be booting.
func (a *attempt) report(site string) *api.Report {
	a.t.Helper()
	for until := time.Now().Add(90 * time.Second); ; {
		ctx, cancel := context.WithTimeout(a.t.Context(), 2*time.Second)
		r, err := a.v.Report(ctx, site)
		cancel()
		if err == nil {
			return r
		}
		if time.Now().After(until) {
			serial, _, _ := a.run(site, "tail", "-n", "20", a.v.SerialLog())
			a.t.Fatalf("the guest does not answer at %s, where it is %s: %v\n%s", site, a.state(site, a.v.Name), err, serial)
		}
	}
}

// revived starts the guest whose QEMU, or host, the fault has killed, from its disks. All
// that they had acknowledged must be there.
func (a *attempt) revived(o *outcome, ended time.Time) {
	a.t.Helper()
	o.took = max(0, time.Since(ended))
	a.until("the guest that was killed is known to be, or boots", func() bool {
		state, err := a.hosts[o.at].State(a.t.Context(), a.v.UUID)
		if err != nil || !state.Active() {
			if _, complaint, status := a.run(o.at, "virsh", "start", a.v.Name); status != 0 {
				a.t.Fatalf("start the guest at %s, where it is %q, %v: %s", o.at, state, err, complaint)
			}
			return true
		}
		ctx, cancel := context.WithTimeout(a.t.Context(), time.Second)
		defer cancel()
		r, err := a.v.Report(ctx, o.at)
		return err == nil && r.BootID != a.before.BootID
	})
	r := a.report(o.at)
	if r.BootID == a.before.BootID {
		a.t.Errorf("the guest at %s was to be killed, and has not been", o.at)
	}
	for i, d := range r.Disks {
		if d.Found < a.before.Disks[i].Acknowledged {
			a.t.Errorf("disk %s at %s has the blocks up to %d, and had acknowledged %d", d.Device, o.at, d.Found, a.before.Disks[i].Acknowledged)
		}
	}
	a.healthy(o.at, a.v)
}

// alone checks that nothing of the guest is at the other site but copies that it lists,
// and nothing of the move at either.
func (a *attempt) alone(at string) {
	a.t.Helper()
	ctx := a.t.Context()
	var left []string
	for until := time.Now().Add(recoverWithin); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		left = nil
		state, err := a.hosts[other(at)].State(ctx, a.v.UUID)
		if !errors.Is(err, hypervisor.ErrNoDomain) {
			left = append(left, fmt.Sprintf("the domain at %s, %s, %v", other(at), state, err))
		}
		for _, site := range []string{at, other(at)} {
			copies, err := a.agents[site].Copies(ctx)
			if err != nil {
				a.t.Fatal(err)
			}
			known := map[string]bool{}
			for _, c := range copies {
				known[path.Base(c.Path)] = true
			}
			if site == at {
				for _, d := range a.v.Disks {
					known[path.Base(d)] = true
				}
			}
			for _, name := range a.images(site) {
				if !known[name] {
					left = append(left, name+" at "+site)
				}
			}
			left = append(left, a.open(site)...)
			sockets, _ := os.ReadDir(a.path(site, "/run/libvirt/wanmig"))
			for _, s := range sockets {
				left = append(left, s.Name()+" at "+site)
			}
		}
		if len(left) == 0 {
			return
		}
	}
	a.t.Fatalf("left: %s", strings.Join(left, "; "))
}

// open lists the moves that an agent which starts at a site would go on with: agents may
// take for over what their journal does not.
func (a *attempt) open(site string) (open []string) {
	a.t.Helper()
	b, err := os.ReadFile(a.path(site, "/var/lib/wanmig/journal.db"))
	if err != nil {
		a.t.Fatal(err)
	}
	as := filepath.Join(a.t.TempDir(), "journal.db") // the agent has its own locked
	if err := os.WriteFile(as, b, 0o600); err != nil {
		a.t.Fatal(err)
	}
	j, err := handoff.OpenJournal(as)
	if err != nil {
		a.t.Fatal(err)
	}
	defer j.Close()
	all, err := j.All()
	if err != nil {
		a.t.Fatal(err)
	}
	for _, e := range all {
		if !e.State.Final() {
			open = append(open, fmt.Sprintf("move %s at %s, %s in the journal", e.Move, site, e.State))
		}
	}
	return open
}

// decide is what an operator does about a move that is in doubt: the guest is the
// destination's if it has run there, which nobody but the test knows.
func (a *attempt) decide(acc account) string {
	a.t.Helper()
	if !a.step.doubtful || !a.harm.forgets {
		a.t.Fatalf("the move is in doubt: %v", acc)
	}
	if a.step.ran {
		a.wanmig(a.to, "recover", a.move, "--run-here", "--yes")
		return "in doubt, run there"
	}
	a.wanmig(a.to, "recover", a.move, "--abandon-here", "--yes")
	return "in doubt, abandoned there"
}
