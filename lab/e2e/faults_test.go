//go:build lab

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// The sides of a move.
const (
	source      = "source"
	destination = "destination"
)

// step is a point of a move at which an agent stands still and a fault comes.
type step struct {
	name     string
	column   string // of the table
	side     string // whose agent stands there
	point    string
	dirty    int64 // MiB of memory that the guest dirties in a second, so that it comes there
	aborts   bool  // of a move that fails: the destination can't write
	doubtful bool  // the destination has accepted the guest and not recorded that it runs
	ran      bool  // and it has run there
}

var steps = []step{
	{name: "begun", column: "prepare", side: source, point: "owner-recorded"},
	{name: "disks about to be made", column: "prepare", side: destination, point: "receiver-recorded"},
	{name: "prepared", column: "prepare", side: destination, point: "prepared"},
	{name: "disks in bulk", column: "disks", side: destination, point: "disk-write"},
	{name: "first pass of memory", column: "memory", side: source, point: "first-pass"},
	{name: "later pass of memory", column: "memory", side: source, point: "later-pass", dirty: 24},
	{name: "guest stopped", column: "stopped", side: source, point: "stopped"},
	{name: "all sent", column: "stopped", side: source, point: "tailed"},
	{name: "before offered is recorded", column: "stopped", side: source, point: "offered-recording"},
	{name: "offered recorded", column: "offered", side: source, point: "offered-recorded"},
	{name: "offer sent", column: "offered", side: source, point: "offer-sent"},
	{name: "before accepted is recorded", column: "offered", side: destination, point: "accepted-recording"},
	{name: "accepted recorded", column: "accepted", side: destination, point: "accepted-recorded", doubtful: true},
	{name: "before Finish", column: "accepted", side: destination, point: "finish", doubtful: true},
	{name: "after Finish", column: "accepted", side: destination, point: "finished", doubtful: true, ran: true},
	{name: "before running is recorded", column: "accepted", side: destination, point: "running-recording", doubtful: true, ran: true},
	{name: "running recorded", column: "running", side: destination, point: "running-recorded"},
	{name: "running told", column: "running", side: destination, point: "told"},
	{name: "before Confirm", column: "running", side: source, point: "confirm"},
	{name: "after Confirm", column: "running", side: source, point: "confirmed"},
	{name: "before released is recorded", column: "running", side: source, point: "released-recording"},
	{name: "released recorded", column: "running", side: source, point: "released-recorded"},
	{name: "before aborted is recorded", column: "aborted", side: destination, point: "aborted-recording", aborts: true},
	{name: "aborted recorded", column: "aborted", side: destination, point: "aborted-recorded", aborts: true},
	{name: "discarded", column: "aborted", side: destination, point: "discarded", aborts: true},
	{name: "before the guest goes on", column: "aborted", side: source, point: "resume", aborts: true},
	{name: "before returned is recorded", column: "aborted", side: source, point: "returned-recording", aborts: true},
	{name: "returned recorded", column: "aborted", side: source, point: "returned-recorded", aborts: true},
}

// parts of a move, in their order.
var parts = []string{"prepare", "disks", "memory", "stopped", "offered", "accepted", "running", "aborted"}

// harm is a fault. do does it while an agent stands at the step, lets that go on, and
// returns when the fault has ended.
type harm struct {
	name    string
	do      func(a *attempt) (ended time.Time)
	kills   string // whose QEMU: with a guest that runs in it that guest ends
	forgets bool   // the destination does not know what became of a guest that it accepted
	arms    string // what the agent does at the step; empty: stop
	clock   string // by how much its clock is off
	outage  time.Duration
	fresh   bool            // older copies at the destination don't count
	at      func(step) bool // where it can happen; nil: everywhere
	soak    bool            // too long for every test run
	passes  bool            // a move that has not come to the stop goes on
}

var harms = []harm{
	{name: "source agent killed", do: killed(source, lab.Agent)},
	{name: "destination agent killed", do: killed(destination, lab.Agent), forgets: true},
	{name: "source QEMU killed", do: qemuKilled(source), kills: source, at: func(s step) bool { return s.point != "confirmed" && !strings.HasPrefix(s.point, "released") }},
	{name: "destination QEMU killed", do: qemuKilled(destination), kills: destination, forgets: true,
		at: func(s step) bool {
			return s.column != "aborted" && s.point != "owner-recorded" && s.point != "receiver-recorded"
		}},
	{name: "source libvirtd killed", do: killed(source, lab.Libvirtd)},
	{name: "destination libvirtd killed", do: killed(destination, lab.Libvirtd), forgets: true},
	{name: "source libvirtd away for longer than a move's end waits", do: killedFor(150*time.Second, source, lab.Libvirtd), soak: true,
		at: func(s step) bool { return s.point == "resume" || s.point == "confirm" }},
	{name: "another guest takes the name at the source", do: replaced, at: func(s step) bool { return s.point == "confirm" }},
	{name: "source loses power", do: power(source), kills: source},
	{name: "destination loses power", do: power(destination), kills: destination, forgets: true},
	{name: "link cut for 1 s", passes: true, do: cutFrom(time.Second, source, destination)},
	{name: "nothing from the source for 1 s", passes: true, do: cutFrom(time.Second, source)},
	{name: "nothing from the destination for 1 s", passes: true, do: cutFrom(time.Second, destination)},
	{name: "link cut until somebody does something", do: cutForLong, outage: migrate.LeastOutage, soak: true},
	{name: "link cut for 30 s", passes: true, do: cutFrom(30*time.Second, source, destination), soak: true, at: in("disks", "memory", "offered")},
	{name: "record not written", do: nothing, arms: full, at: func(s step) bool { return strings.HasSuffix(s.point, "-recording") }},
	{name: "record written, but said not to be", do: nothing, arms: full, at: func(s step) bool { return strings.HasSuffix(s.point, "-recorded") }},
	{name: "destination can't write", do: nothing, arms: bad, at: in("disks")},
	{name: "destination disk full, under its journal too", do: fillDisk, fresh: true, at: in("disks")},
	{name: "moved once more, by both sites", passes: true, do: moveAgain, arms: wait, at: func(s step) bool { return s.point != "stopped" }},
	{name: "source agent upgraded", do: upgraded(source)},
	{name: "destination agent upgraded", do: upgraded(destination)},
	{name: "clock a day off", passes: true, do: nothing, clock: "24h", at: in("prepare", "offered")},
	{name: "clock a day slow", passes: true, do: nothing, clock: "-24h", at: in("prepare", "offered")},
}

// in is where a step is of one of these parts of a move.
func in(some ...string) func(step) bool {
	return func(s step) bool { return slices.Contains(some, s.column) }
}

// nothing is done: the step itself is what fails, or the clock.
func nothing(a *attempt) time.Time {
	a.goOn()
	return time.Now()
}

// cutForLong cuts the link until the move has given up or somebody is asked.
func cutForLong(a *attempt) time.Time {
	a.t.Helper()
	a.cut(true)
	a.goOn()
	a.until("the source gives up, or is in doubt", func() bool {
		s, err := a.agents[a.from].Move(a.t.Context(), a.move)
		return err == nil && (final(s) || s.Phase == migrate.PhaseInDoubt)
	})
	a.cut(false)
	return time.Now()
}

// fillDisk takes all space at the destination, until the move has ended.
func fillDisk(a *attempt) time.Time {
	a.t.Helper()
	filler := a.path(a.to, "/var/filler")
	f, err := os.Create(filler)
	if err != nil {
		a.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		a.t.Fatal(err)
	}
	a.goOn()
	s := a.await(a.from, a.move, "its end", final)
	if s.Phase != migrate.PhaseRolledBack || !strings.Contains(s.Result.Error, "space") {
		a.t.Errorf("without space the move ended %s: %+v", s.Phase, s.Result)
	}
	if err := os.Remove(filler); err != nil {
		a.t.Fatal(err)
	}
	return time.Now()
}

// moveAgain orders the guest to be moved at both sites while it is being moved. Where the
// destination has told that it runs there, its order is one for a move back, which comes
// after this move; the guest is brought here again then.
func moveAgain(a *attempt) time.Time {
	a.t.Helper()
	runs := a.step.side == source && a.step.column == "running"
	back := ""
	for _, ask := range [][2]string{{a.from, a.to}, {a.to, a.from}} {
		st, err := a.agents[ask[0]].StartMove(a.t.Context(), migrate.Request{VM: a.v.Name, To: ask[1], Redirect: "none"})
		if err == nil && runs && ask[0] == a.to {
			back = st.Move
			continue
		}
		if err == nil {
			a.t.Fatalf("while %s is under way %s begins to move the guest by %s", a.move, ask[0], st.Move)
		}
		if !strings.Contains(err.Error(), a.move) && !strings.Contains(err.Error(), "no VM") {
			a.t.Errorf("the second move at %s is refused without the ID of the first, %s: %v", ask[0], a.move, err)
		}
	}
	a.goOn()
	if back != "" {
		s := a.await(a.to, back, "the end of the move back", final)
		a.t.Logf("the move back ends %s: %s", s.Phase, s.Result.Error)
		if s.Phase == migrate.PhaseDone {
			a.world.move(a.from, a.v.Name, a.to, "--redirect", "none")
			a.further = 2
		}
	}
	return time.Now()
}

// upgraded ends an agent as a package manager does, and starts another version.
func upgraded(side string) func(*attempt) time.Time {
	return func(a *attempt) time.Time {
		a.t.Helper()
		ctx, site := a.t.Context(), a.site(side)
		a.signal(site, lab.Agent, syscall.SIGTERM)
		a.goOn()
		a.until("the agent ends", func() bool {
			all, err := a.Sites[site].Daemons(ctx)
			return err == nil && !all[lab.Agent].Running
		})
		a.upgrades++
		next := a.upgrades%2 == 1
		if a.install(a.t, "faults/wanmig"); next {
			a.install(a.t, "faults/wanmig-next")
		}
		if err := a.Sites[site].StartAgent(ctx); err != nil {
			a.t.Fatal(err)
		}
		if info, err := a.agents[site].Info(ctx); err != nil || strings.HasSuffix(info.Version, "-next") != next {
			a.t.Errorf("the agent at %s is of version %q: %v", site, info.Version, err)
		}
		return time.Now()
	}
}

// killed kills a daemon of a side, lets the agent at the step go on, and starts the
// daemon again.
func killed(side, daemon string) func(*attempt) time.Time {
	return killedFor(100*time.Millisecond, side, daemon)
}

// killedFor kills a daemon, and starts it again when it has been away.
func killedFor(away time.Duration, side, daemon string) func(*attempt) time.Time {
	return func(a *attempt) time.Time {
		a.t.Helper()
		s := a.Sites[a.site(side)]
		kill, start := s.KillAgent, s.StartAgent
		if daemon == lab.Libvirtd {
			kill, start = s.KillLibvirtd, s.StartLibvirtd
		}
		if err := kill(a.t.Context()); err != nil {
			a.t.Fatal(err)
		}
		a.goOn()
		time.Sleep(away)
		if err := start(a.t.Context()); err != nil {
			a.t.Fatal(err)
		}
		return time.Now()
	}
}

// replaced has an operator remove the guest that stands at the source, while no agent runs
// there, and define another of its name.
func replaced(a *attempt) time.Time {
	a.t.Helper()
	s := a.Sites[a.from]
	if err := s.KillAgent(a.t.Context()); err != nil {
		a.t.Fatal(err)
	}
	other := fmt.Sprintf("<domain type='qemu'><name>%s</name><memory unit='MiB'>16</memory><os><type>hvm</type></os></domain>", a.v.Name)
	xml := a.path(a.from, "/var/lib/wanmig/another.xml")
	if err := os.WriteFile(xml, []byte(other), 0o600); err != nil {
		a.t.Fatal(err)
	}
	defer os.Remove(xml)
	for _, do := range [][]string{{"destroy", a.v.Name}, {"define", "/var/lib/wanmig/another.xml"}} {
		if _, complaint, status := a.run(a.from, "virsh", do...); status != 0 {
			a.t.Fatalf("virsh %s: %s", do[0], complaint)
		}
	}
	a.t.Cleanup(func() {
		if _, complaint, status := a.run(a.from, "virsh", "undefine", a.v.Name); status != 0 {
			a.t.Errorf("the other guest is not there any more: %s", complaint)
		}
		a.run(a.from, "sync", "-f", "/etc/libvirt/qemu") // the host may lose power in the next test
	})
	if err := s.StartAgent(a.t.Context()); err != nil {
		a.t.Fatal(err)
	}
	return time.Now()
}

func qemuKilled(side string) func(*attempt) time.Time {
	return func(a *attempt) time.Time {
		a.t.Helper()
		if err := syscall.Kill(a.qemu(a.site(side), a.v.Name), syscall.SIGKILL); err != nil {
			a.t.Fatal(err)
		}
		a.goOn()
		return time.Now()
	}
}

// power has a host lose its power, and come back.
func power(side string) func(*attempt) time.Time {
	return func(a *attempt) time.Time {
		a.t.Helper()
		if err := a.PowerOff(a.t.Context(), a.site(side)); err != nil {
			a.t.Fatal(err)
		}
		a.goOn()
		time.Sleep(100 * time.Millisecond)
		began := time.Now()
		if err := a.Boot(a.t.Context(), a.site(side)); err != nil {
			a.t.Fatal(err)
		}
		a.t.Logf("booted in %d ms", time.Since(began).Milliseconds())
		return time.Now()
	}
}

// cutFrom has what sides send vanish for a time.
func cutFrom(d time.Duration, sides ...string) func(*attempt) time.Time {
	return func(a *attempt) time.Time {
		a.t.Helper()
		var from []string
		for _, side := range sides {
			from = append(from, a.site(side))
		}
		a.change(lab.LinkChange{Cut: &from})
		a.goOn()
		time.Sleep(d)
		a.cut(false)
		return time.Now()
	}
}

// TestFaults lets a guest meet one fault after the other, each at an exact step of a
// move. Whatever happens it must run at one host, whole, and be done with soon.
func TestFaults(t *testing.T) {
	unfit := func(name string) bool {
		b, err := os.ReadFile(program(t, name))
		return err != nil || bytes.Contains(b, []byte(faults.Folder)) == (name == "wanmig")
	}
	if unfit("wanmig") || unfit("faults/wanmig") {
		t.Fatal("the released program stops at points of tests, or the tests' own does not: run make build faults")
	}
	tb := &table{cells: map[[2]string][]outcome{}}
	t.Run("all", func(t *testing.T) {
		for n := range provers {
			t.Run(fmt.Sprint(n+1), func(t *testing.T) { t.Parallel(); prove(t, tb, n) })
		}
	})
	t.Logf("%d faults\n%v", tb.count(), tb)
}

const (
	provers = 2 // labs side by side
	// every is how many steps of a move a fault passes by for each that it takes in a test
	// run; the soak takes all.
	every = 10
)

// prove has a prover meet its part of the faults.
func prove(t *testing.T, tb *table, number int) {
	var p *prover
	for i, h := range harms {
		if i%provers != number || h.soak && !soaking {
			continue
		}
		var at []step
		for _, s := range steps {
			if h.at == nil || h.at(s) {
				at = append(at, s)
			}
		}
		for n, s := range at {
			lostOne := h.name == "source agent upgraded" && s.point == "stopped" // a guest, once
			if !soaking && !lostOne && (n+i)%every != 0 && (len(at) > every || n > 0) {
				continue
			}
			if p == nil {
				p = newProver(t, tb, fmt.Sprintf("prover%d", number+1))
			}
			if !t.Run(h.name+"/"+s.name, func(t *testing.T) { p.meet(t, s, h) }) {
				tb.add(h.name, s.column, outcome{what: "FAILED"})
				(&world{p.lab, t}).logs()
				p.end(t) // what it has come to is not what the next fault should meet
				p = nil
			}
		}
	}
	if p != nil {
		t.Run("images are the same", p.compare)
	}
	if p != nil && number == 0 {
		t.Run("source disk can't be read", p.unreadable)
		t.Run("a guest that runs twice is noticed", p.seesDoubles)
	}
}

// table collects outcomes by fault and step.
type table struct {
	mu    sync.Mutex
	cells map[[2]string][]outcome
	rows  []string
}

func (tb *table) add(row, column string, o outcome) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	if !slices.Contains(tb.rows, row) {
		tb.rows = append(tb.rows, row)
	}
	tb.cells[[2]string{row, column}] = append(tb.cells[[2]string{row, column}], o)
}

func (tb *table) count() (n int) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	for _, c := range tb.cells {
		n += len(c)
	}
	return n
}

// String is the table in Markdown: of each fault at each part of a move what came of
// it and how often, and the median and the longest time that it took in seconds.
func (tb *table) String() string {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "| fault | %s |\n|---|%s\n", strings.Join(parts, " | "), strings.Repeat("---|", len(parts)))
	for _, row := range tb.rows {
		fmt.Fprintf(&b, "| %s |", row)
		for _, column := range parts {
			fmt.Fprintf(&b, " %s |", summary(tb.cells[[2]string{row, column}]))
		}
		b.WriteString("\n")
	}
	return b.String()
}

func summary(list []outcome) string {
	if len(list) == 0 {
		return ""
	}
	kinds := map[string]int{}
	var took []time.Duration
	for _, o := range list {
		kinds[o.what]++
		took = append(took, o.took)
	}
	slices.Sort(took)
	var what []string
	for kind, n := range kinds {
		what = append(what, fmt.Sprintf("%s %d", kind, n))
	}
	slices.Sort(what)
	return fmt.Sprintf("%s; %.1f, %.1f", strings.Join(what, ", "), took[len(took)/2].Seconds(), took[len(took)-1].Seconds())
}
