//go:build lab

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestPath moves a guest there without UDP; back while the NAT of its site forgets
// its ports, a carrier is reset, UDP is blocked, and both sites get other
// addresses; and at last not at all, because the link is gone for longer than
// the operator allows.
func TestPath(t *testing.T) {
	t.Parallel()
	// Agents that are to follow an address do not listen on one.
	config := map[string]string{}
	for _, dc := range lab.DataCentres {
		config[dc] = `listen: ":7946"`
	}
	w := newWorldWith(t, lab.Options{AgentConfig: config}, "100mbit", "20ms")
	w.change(lab.LinkChange{NAT: &[]string{lab.RemoteDC}})
	for i, dc := range lab.DataCentres {
		w.nameSite(dc, lab.DataCentres[1-i])
	}
	v := w.vm(lab.VMOptions{Name: "walker", Memory: 192 << 20, Disks: []lab.DiskOptions{disk(t, "128MiB,format=qcow2")},
		Dirty: 2 << 20, Write: 512 << 10, WorkingSet: 32 << 20})

	w.change(lab.LinkChange{Block: &[]string{"udp"}})
	r := w.move(lab.LocalDC, v.Name, lab.RemoteDC)
	for _, c := range r.Carriers {
		if c.Transport != "tcp" {
			t.Errorf("where UDP is blocked, %d carriers run over %s", c.Most, c.Transport)
		}
	}
	w.change(lab.LinkChange{Block: &[]string{}})

	w.faults(v)
	w.healthy(lab.LocalDC, v)

	w.outlasted(v)
	w.unharmed(v)
}

// nameSite has an agent know another by a name in place of an address.
func (w *world) nameSite(at, other string) {
	w.t.Helper()
	id := strings.TrimSpace(w.wanmig(other, "id"))
	w.wanmig(at, "site", "remove", other)
	w.wanmig(at, "site", "add", other, other+":7946", "--id", id)
}

// faults moves a guest back from remote-dc over a path that does not stay.
func (w *world) faults(v *lab.VM) {
	slow, fast := int64(8e6), int64(100e6)
	w.change(lab.LinkChange{Rate: &slow})
	move := w.beginAt(lab.RemoteDC, v.Name, lab.LocalDC, "--fresh")
	w.await(lab.RemoteDC, move, "its disks", inDisks)
	for _, fault := range []struct {
		name string
		do   func()
	}{
		{"its NAT forgets its ports", func() {
			if err := w.Rebind(w.t.Context(), lab.RemoteDC); err != nil {
				w.t.Fatal(err)
			}
		}},
		{"a carrier is reset", func() { w.resetCarrier(lab.RemoteDC) }},
		{"UDP is blocked", func() { w.change(lab.LinkChange{Block: &[]string{"udp"}}) }},
		{"UDP is back and the source has another address", func() {
			w.change(lab.LinkChange{Block: &[]string{}})
			w.readdress(lab.RemoteDC)
		}},
		{"the destination has another address", func() { w.readdress(lab.LocalDC) }},
	} {
		began := time.Now()
		before := w.status(lab.RemoteDC, move)
		if before.Phase != migrate.PhaseSync {
			w.t.Fatalf("the move is at %s before %s: %+v", before.Phase, fault.name, before.Result)
		}
		fault.do()
		s := w.await(lab.RemoteDC, move, "going on after "+fault.name, func(s migrate.Status) bool {
			return s.Link.LostSince == nil && s.Link.Received > before.Link.Received+1<<10 && s.Link.Sent > before.Link.Sent+2<<20
		})
		w.t.Logf("%-50s on after %v, %d carriers", fault.name, time.Since(began).Round(time.Millisecond), len(s.Link.Carriers))
	}
	w.change(lab.LinkChange{Rate: &fast})
	s := w.await(lab.RemoteDC, move, "its end", final)
	if s.Phase != migrate.PhaseDone {
		w.t.Fatalf("the move ended %s with %q", s.Phase, s.Result.Error)
	}
	w.t.Logf("carriers %+v, %d of %d bytes were sent again", s.Result.Carriers, s.Result.Resent, s.Result.WireBytesSent)
}

func (w *world) readdress(site string) {
	w.t.Helper()
	if err := w.Readdress(w.t.Context(), site); err != nil {
		w.t.Fatal(err)
	}
}

// resetCarrier resets a TCP connection of a site's agent, on both sides, as a
// firewall that has forgotten it does.
func (w *world) resetCarrier(site string) {
	w.t.Helper()
	var port string
	for until := time.Now().Add(30 * time.Second); port == ""; time.Sleep(100 * time.Millisecond) {
		out, complaint, status := w.run(site, "ss", "-Htn", "state", "established", "dport = :7946")
		if status != 0 {
			w.t.Fatal(complaint)
		}
		if f := strings.Fields(out); len(f) > 2 {
			port = f[2][strings.LastIndex(f[2], ":")+1:]
		}
		if time.Now().After(until) {
			w.t.Fatal("the session has no carrier over TCP")
		}
	}
	// Resets themselves pass, or each side's rule would stop the other's.
	rules := fmt.Sprintf(`table inet e2e-reset {
	chain out { type filter hook output priority 0; tcp sport %s tcp dport 7946 tcp flags & rst == 0 reject with tcp reset; }
	chain in { type filter hook input priority 0; tcp sport 7946 tcp dport %s tcp flags & rst == 0 reject with tcp reset; }
}`, port, port)
	if _, complaint, status := w.run(site, "sh", "-c", `echo "$0" | nft -f -`, rules); status != 0 {
		w.t.Fatal(complaint)
	}
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, _, _ := w.run(site, "ss", "-Htn", "sport = :"+port)
		if strings.TrimSpace(out) == "" {
			break
		}
		if time.Now().After(until) {
			w.t.Fatalf("the connection was not reset: %s", out)
		}
	}
	if _, complaint, status := w.run(site, "nft", "delete", "table", "inet", "e2e-reset"); status != 0 {
		w.t.Fatal(complaint)
	}
}

// outlasted begins a move whose link is then gone for longer than allowed.
func (w *world) outlasted(v *lab.VM) {
	const allowed = "10s"
	slow := int64(20e6)
	w.change(lab.LinkChange{Rate: &slow})
	move := w.begin(v.Name, "--max-outage", allowed, "--fresh")
	w.await(lab.LocalDC, move, "memory", inMemory)
	w.cut(true)
	began := time.Now()
	s := w.await(lab.LocalDC, move, "its end", final)
	w.t.Logf("ended after %v: %s", time.Since(began).Round(time.Millisecond), s.Result.Error)
	if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, allowed) {
		w.t.Errorf("the move ended %s with %q: want an error that tells of the outage", s.Phase, s.Result.Error)
	}
	if took := time.Since(began); took < 9*time.Second || took > 40*time.Second {
		w.t.Errorf("a move that is allowed an outage of %s ended after %v", allowed, took)
	}
	w.cut(false)
}
