//go:build lab || bench

// Package e2e moves real guests between two real libvirtd with the real
// command and agents, across the lab's WAN.
package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// child is what this program can be started as, by its first argument.
var child = map[string]func(args []string) error{}

func TestMain(m *testing.M) {
	lab.RunChild()
	if len(os.Args) > 1 && child[os.Args[1]] != nil {
		if err := child[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// world is a lab that a test has to itself: two data centres with agents.
type world struct {
	*lab.Lab
	t *testing.T
}

// newWorld makes a lab and removes it, with everything in it, after the test.
func newWorld(t *testing.T, rate, rtt string) *world {
	t.Helper()
	return newWorldWith(t, lab.Options{}, rate, rtt)
}

func newWorldWith(t *testing.T, o lab.Options, rate, rtt string) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("lab tests make network namespaces: run them as root")
	}
	link := lab.DefaultLink()
	var err error
	if link.Rate, err = lab.ParseRate(rate); err != nil {
		t.Fatal(err)
	}
	if link.RTT, err = lab.ParseRTT(rtt); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/var/tmp", "wl-")
	if err != nil {
		t.Fatal(err)
	}
	o.Dir, o.Link = dir, link
	if o.Wanmig == "" {
		o.Wanmig = program(t, "wanmig")
	}
	l, err := lab.Up(t.Context(), o)
	if err != nil {
		os.RemoveAll(dir)
		t.Fatal(err)
	}
	w := &world{l, t}
	t.Cleanup(func() {
		if t.Failed() {
			w.logs()
		}
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return w
}

// program is one that `make build` has built.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	return path
}

// logs shows the ends of the agents' logs.
func (w *world) logs() {
	for _, dc := range w.DataCentres() {
		b, _ := os.ReadFile(filepath.Join(w.Sites[dc].Dir, "log", "agent.log"))
		lines := strings.Split(string(b), "\n")
		w.t.Logf("agent at %s:\n%s", dc, strings.Join(lines[max(0, len(lines)-25):], "\n"))
	}
	for _, site := range append([]string{lab.Users}, w.DataCentres()...) {
		net, _, _ := w.run(site, "sh", "-c", "ip rule; ip neigh; ip route; ip neigh show proxy; nft list tables")
		w.t.Logf("network of %s:\n%s", site, net)
	}
}

// disk reads a disk as `wanlab vm --disk` does.
func disk(t *testing.T, s string) lab.DiskOptions {
	t.Helper()
	d, err := lab.ParseDisk(s, "raw")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// vm boots a guest.
func (w *world) vm(o lab.VMOptions) *lab.VM {
	w.t.Helper()
	o.Guest = program(w.t, "wanlab-guest")
	v, err := w.CreateVM(w.t.Context(), o)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// run runs a command in a site and returns what it printed and its status.
func (w *world) run(site, name string, args ...string) (stdout, stderr string, status int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	cmd, err := w.Command(ctx, site, name, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("%s at %s: %v", name, site, err)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// wanmig runs the command at a site, which must succeed.
func (w *world) wanmig(site string, args ...string) string {
	w.t.Helper()
	out, complaint, status := w.run(site, "wanmig", args...)
	if status != 0 {
		w.t.Fatalf("wanmig %s at %s: status %d\n%s%s", strings.Join(args, " "), site, status, out, complaint)
	}
	return out
}

// move moves a guest and returns the result that --json prints.
func (w *world) move(site, vm, to string, args ...string) migrate.Result {
	w.t.Helper()
	out := w.wanmig(site, append([]string{"move", vm, "--to", to, "--json"}, args...)...)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var r migrate.Result
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil {
		w.t.Fatalf("the last line of --json: %v: %s", err, out)
	}
	if r.Result != "done" || r.Attempt > 1 {
		w.t.Fatalf("move ended as %+v", r)
	}
	return r
}

// begin starts a move and leaves it to the agent.
func (w *world) begin(vm string, args ...string) (move string) {
	w.t.Helper()
	return w.beginAt(lab.LocalDC, vm, lab.RemoteDC, args...)
}

func (w *world) beginAt(site, vm, to string, args ...string) (move string) {
	w.t.Helper()
	return strings.TrimSpace(w.wanmig(site, append([]string{"move", vm, "--to", to, "--detach", "--retries", "0"}, args...)...))
}

// status reads a move from the agent of a site.
func (w *world) status(site, move string) (s migrate.Status) {
	w.t.Helper()
	out := w.wanmig(site, "status", move, "--json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		w.t.Fatalf("status: %v: %s", err, out)
	}
	return s
}

// await waits until a move's status is as wanted.
func (w *world) await(site, move, what string, is func(migrate.Status) bool) migrate.Status {
	w.t.Helper()
	var s migrate.Status
	for until := time.Now().Add(2 * time.Minute); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if s = w.status(site, move); is(s) {
			return s
		}
		if s.Phase.Final() && s.Result != nil {
			break
		}
	}
	w.t.Fatalf("move %s at %s did not come to %s: it is at %s, result %+v", move, site, what, s.Phase, s.Result)
	return s
}

func final(s migrate.Status) bool { return s.Phase.Final() && s.Result != nil }

// state is what libvirt at a site says of a guest.
func (w *world) state(site, vm string) string {
	w.t.Helper()
	out, _, status := w.run(site, "virsh", "-q", "domstate", vm)
	if status != 0 {
		return "absent"
	}
	return strings.TrimSpace(out)
}

// qemu is the process of a guest at a site, as the host sees it.
func (w *world) qemu(site, vm string) int {
	w.t.Helper()
	out, complaint, status := w.run(site, "sh", "-c", `cat "/run/libvirt/qemu/$0.pid"`, vm)
	if status != 0 {
		w.t.Fatalf("process of %q at %s: %s", vm, site, complaint)
	}
	var inside int
	fmt.Sscan(out, &inside)
	return w.hostPid(site, inside)
}

// hostPid finds the host's number of a process of a site's PID namespace.
func (w *world) hostPid(site string, inside int) int {
	w.t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", w.Sites[site].Pid))
	if err != nil {
		w.t.Fatal(err)
	}
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		if link, err := os.Readlink(dir + "/ns/pid"); err != nil || link != ns {
			continue
		}
		b, _ := os.ReadFile(dir + "/status")
		for line := range strings.SplitSeq(string(b), "\n") {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" && f[len(f)-1] == fmt.Sprint(inside) {
				var pid int
				fmt.Sscan(filepath.Base(dir), &pid)
				return pid
			}
		}
	}
	w.t.Fatalf("no process %d in %s", inside, site)
	return 0
}

// signal sends a signal to a daemon of a site.
func (w *world) signal(site, daemon string, sig syscall.Signal) {
	w.t.Helper()
	all, err := w.Sites[site].Daemons(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	if err := syscall.Kill(w.hostPid(site, all[daemon].Pid), sig); err != nil {
		w.t.Fatalf("signal %s at %s: %v", daemon, site, err)
	}
}

// path is where a site's file is on the host.
func (w *world) path(site, path string) string { return filepath.Join(w.Sites[site].Dir, path) }

// images lists the disk images at a site.
func (w *world) images(site string) []string {
	w.t.Helper()
	entries, err := os.ReadDir(w.path(site, "/var/lib/libvirt/images"))
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// same compares two images' content and how much storage they take.
func (w *world) same(format, source, destination string) {
	w.t.Helper()
	// -U: the destination's QEMU has its image open, and is paused.
	out, err := exec.Command("qemu-img", "compare", "-U", "-p", "-f", probe(w.t, source), "-F", format, source, destination).CombinedOutput()
	if err != nil {
		w.t.Fatalf("images differ: %v: %s", err, lastLine(out))
	}
}

// thin checks that a disk takes no more storage than allowed: 5 % more, and
// what a file system rounds a small file up to.
func (w *world) thin(source, destination string) {
	w.t.Helper()
	from, to := allocated(w.t, source), allocated(w.t, destination)
	if limit := from + from/20 + 1<<20; to > limit {
		w.t.Errorf("%s takes %d bytes, %s takes %d: more than 5 %% above", source, from, destination, to)
	}
}

// probe tells an image's format; the tests' own images are not hostile.
func probe(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("qemu-img", "info", "-U", "--output=json", path).Output()
	var info struct{ Format string }
	if err == nil {
		err = json.Unmarshal(out, &info)
	}
	if err != nil {
		t.Fatalf("qemu-img info %s: %v", path, err)
	}
	return info.Format
}

// allocated is the storage of an image and of what it stands on.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	out, err := exec.Command("qemu-img", "info", "-U", "--backing-chain", "--output=json", path).Output()
	var chain []struct {
		Size int64 `json:"actual-size"`
	}
	if err == nil {
		err = json.Unmarshal(out, &chain)
	}
	if err != nil {
		t.Fatalf("qemu-img info %s: %v", path, err)
	}
	var n int64
	for _, i := range chain {
		n += i.Size
	}
	return n
}

func lastLine(b []byte) string {
	lines := strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' || r == '\r' })
	return lines[len(lines)-1]
}

// healthy has the guest verify all of its memory and disks.
func (w *world) healthy(site string, v *lab.VM) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	check, err := v.Verify(ctx, site)
	if err != nil {
		w.t.Fatalf("guest at %s: %v", site, err)
	}
	if check.Bad() > 0 || check.Report.Errors() > 0 {
		w.t.Fatalf("guest at %s found errors: %+v", site, check)
	}
	if check.Pages == 0 || check.Files == 0 {
		w.t.Fatalf("guest at %s verified nothing: %+v", site, check)
	}
}

func mib(n int64) *int64 { n <<= 20; return &n }
