//go:build lab

package e2e

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/lab"
)

// prover is a lab whose agents stop where they are told to, and a guest that goes from
// one fault to the next, wherever the one before has left it.
type prover struct {
	lab      *lab.Lab
	v        *lab.VM
	at       string // where the guest is
	agents   map[string]*agent.Client
	hosts    map[string]*hypervisor.Host
	bin      string // folder of the program that agents are started from
	upgrades int    // of agents so far
	table    *table

	stop    context.CancelFunc // of watch
	watched sync.WaitGroup
	mu      sync.Mutex
	doubles []time.Time // when the guest was seen to run at both sites
}

// newProver makes that lab. Both data centres can lose their power.
func newProver(t *testing.T, tb *table, name string) *prover {
	t.Helper()
	p := &prover{at: lab.LocalDC, agents: map[string]*agent.Client{}, hosts: map[string]*hypervisor.Host{}, bin: t.TempDir(), table: tb}
	p.install(t, "faults/wanmig")
	w := newWorldWith(t, lab.Options{Wanmig: filepath.Join(p.bin, "wanmig")}, "400mbit", "10ms")
	p.lab = w.Lab
	for _, dc := range lab.DataCentres {
		if err := w.GiveDisk(t.Context(), dc, 512<<20); err != nil {
			t.Fatal(err)
		}
		p.agents[dc] = agent.NewClient(w.Sites[dc].AgentSocket)
		p.hosts[dc] = hypervisor.New(w.Sites[dc].LibvirtSocket, slog.New(slog.DiscardHandler))
	}
	p.v = w.vm(lab.VMOptions{Name: name, Memory: 128 << 20, WorkingSet: 24 << 20, Write: 512 << 10, Disks: []lab.DiskOptions{disk(t, "24MiB")}})
	w.run(p.at, "virsh", "autostart", name) // a host that boots would start it by itself
	syscall.Sync()                          // what the guest is made of has stood there for long when power fails
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.watched.Go(func() { p.watch(ctx) })
	t.Cleanup(func() { p.end(t) })
	return p
}

// end removes the lab.
func (p *prover) end(t *testing.T) {
	p.stop()
	p.watched.Wait()
	for _, h := range p.hosts {
		h.Close()
	}
	if err := p.lab.Down(context.Background()); err != nil {
		t.Error(err)
	}
}

// install puts a program where agents are started from. Those that run stay what they are.
func (p *prover) install(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(program(t, name))
	if err == nil {
		err = os.WriteFile(filepath.Join(p.bin, "new"), b, 0o755)
	}
	if err == nil {
		err = os.Rename(filepath.Join(p.bin, "new"), filepath.Join(p.bin, "wanmig"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// watch looks at both sites all the time for a guest that runs twice.
func (p *prover) watch(ctx context.Context) {
	runs := func(site string) bool {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		state, err := p.hosts[site].State(ctx, p.v.UUID)
		return err == nil && state == hypervisor.Running
	}
	for ctx.Err() == nil {
		// Before and after: between two looks it may have gone from one to the other.
		if runs(lab.LocalDC) && runs(lab.RemoteDC) && runs(lab.LocalDC) {
			p.mu.Lock()
			p.doubles = append(p.doubles, time.Now())
			p.mu.Unlock()
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// single fails the test when the guest ran at both sites, by what libvirt said or by
// who answered: what answers from one site and then from the other has moved once.
func (a *attempt) single(seen lab.ProbeResult) {
	a.t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.doubles) > 0 {
		a.t.Errorf("the guest ran at both sites at %v", a.doubles)
		a.doubles = nil
	}
	if len(seen.Switches) > 1+a.further {
		a.t.Errorf("the guest answered from both sites in turn: %+v", seen.Switches)
	}
}

// seesDoubles has the guest run twice, and checks that this would have been noticed.
func (p *prover) seesDoubles(t *testing.T) {
	w := &world{p.lab, t}
	here, there := p.at, other(p.at)
	w.run(there, "wanmig", "copies", "remove", p.v.Name) // or there are none
	xml, complaint, status := w.run(here, "virsh", "dumpxml", "--migratable", p.v.Name)
	if status != 0 {
		t.Fatal(complaint)
	}
	for _, d := range p.v.Disks {
		if out, err := exec.Command("cp", "--sparse=always", w.path(here, d), w.path(there, d)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if err := os.WriteFile(w.path(there, "/run/double.xml"), []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, complaint, status := w.run(there, "virsh", "create", "/run/double.xml"); status != 0 {
		t.Fatal(complaint)
	}
	defer w.run(there, "virsh", "destroy", p.v.Name)
	for until := time.Now().Add(5 * time.Second); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		p.mu.Lock()
		seen := len(p.doubles)
		p.mu.Unlock()
		if seen > 0 {
			return
		}
	}
	t.Error("nobody has noticed a guest that runs twice")
}
