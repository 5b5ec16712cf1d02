//go:build bench

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
)

// TestDebianSideBySide migrates one guest back and forth, over the same link in
// the same run: with virsh, and with wanmig with more and more of the guest at
// the destination. The limits are parts of what virsh took.
func TestDebianSideBySide(t *testing.T) {
	w := newWorld(t, "100mbit", "50ms")
	v := w.vm(lab.VMOptions{Name: "db", Image: lab.Debian, WorkingSet: 1 << 20, Progress: func(line string) { fmt.Println(line) }})
	time.Sleep(15 * time.Second) // what starts with the system and ends again

	type limited struct {
		row
		timeLimit, bytesLimit float64 // of virsh's; 0 is none
	}
	var rows []limited
	migrate := func(what, tool, from, to string, timeLimit, bytesLimit float64, args ...string) {
		t.Helper()
		before := w.accounts(from, v)
		load := loadAverage(t)
		r := w.measure(v, tool, from, to, args...)
		r.tool = what
		rows = append(rows, limited{r, timeLimit, bytesLimit})
		fmt.Printf("  %s: %.1f s, the machine's load before: %s\n", what, r.took.Seconds(), load)
		if after := w.accounts(to, v); after != before {
			t.Errorf("%s: the database held %q, and holds %q", what, before, after)
		}
		w.servesPage(to, v)
		w.healthy(to, v)
	}
	migrate("virsh --copy-storage-all", "virsh", lab.LocalDC, lab.RemoteDC, 0, 0)
	for _, path := range v.Disks { // virsh leaves them
		if err := os.Remove(w.path(lab.LocalDC, path)); err != nil {
			t.Fatal(err)
		}
	}
	migrate("wanmig, nothing alike", "wanmig", lab.RemoteDC, lab.LocalDC, 1./4, 0.27)
	w.seedDebian(lab.RemoteDC)
	migrate("wanmig, another Debian as a seed", "wanmig", lab.LocalDC, lab.RemoteDC, 1./12, 0.04, "--keep-source", "--keep-memory")
	w.work(lab.RemoteDC, v, time.Minute)
	migrate("wanmig, back after a minute of work", "wanmig", lab.RemoteDC, lab.LocalDC, 1./20, 0.02, "--keep-source")

	peer := rows[0].row
	fmt.Printf("\nDebian guest of 1 GiB with nginx and PostgreSQL, disk of 3 GiB, 100 Mbit/s, 50 ms:\n")
	fmt.Printf("  %-36s %9s %7s %13s %11s %7s %10s\n", "", "time", "ratio", "bytes sent", "received", "ratio", "downtime")
	for _, r := range rows {
		took, bytes := r.took.Seconds()/peer.took.Seconds(), float64(r.bytes())/float64(peer.bytes())
		fmt.Printf("  %-36s %7.1f s %7.3f %9.1f MiB %7.1f MiB %7.3f %7d ms\n", r.tool, r.took.Seconds(), took,
			float64(r.sent)/(1<<20), float64(r.received)/(1<<20), bytes, r.downtime.Milliseconds())
		if r.timeLimit > 0 && took > r.timeLimit {
			t.Errorf("%s: the time is %.3f of virsh's, want at most %.3f", r.tool, took, r.timeLimit)
		}
		if r.bytesLimit > 0 && bytes > r.bytesLimit {
			t.Errorf("%s: the bytes are %.3f of virsh's, want at most %.3f", r.tool, bytes, r.bytesLimit)
		}
	}

	// All that was carried shows in the images of a guest that does not run.
	w.move(lab.LocalDC, v.Name, lab.RemoteDC, "--paused", "--keep-source")
	for _, path := range v.Disks {
		w.same("raw", w.path(lab.LocalDC, path), w.path(lab.RemoteDC, path))
	}
	if _, complaint, status := w.run(lab.RemoteDC, "virsh", "resume", v.Name); status != 0 {
		t.Fatal(complaint)
	}
	w.healthy(lab.RemoteDC, v)
}

func loadAverage(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))[0]
}

// seedDebian makes the other image of Debian a seed of a site, and waits until
// it is indexed.
func (w *world) seedDebian(site string) {
	w.t.Helper()
	images, err := lab.OpenImages(os.Getenv("WANLAB_CACHE"), program(w.t, "wanlab-guest"))
	if err != nil {
		w.t.Fatal(err)
	}
	second, err := images.Debian(w.t.Context(), lab.DebianSecond, func(line string) { fmt.Println(line) })
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.SetAgentConfig(w.t.Context(), site, "seeds: ["+second.Disk+"]"); err != nil {
		w.t.Fatal(err)
	}
	begun := time.Now()
	var seed struct {
		State   string
		Pages   int64
		Problem string
	}
	for seed.State != "ready" {
		if time.Since(begun) > 3*time.Minute || seed.Problem != "" {
			w.t.Fatalf("the seed is not indexed: %+v", seed)
		}
		time.Sleep(time.Second)
		if err := json.Unmarshal([]byte(w.wanmig(site, "seeds", "--json")), &seed); err != nil {
			w.t.Fatal(err)
		}
	}
	fmt.Printf("  seed of %d pages indexed in %.0f s\n", seed.Pages, time.Since(begun).Seconds())
}

// work has clients beside a guest use its database and its web server.
func (w *world) work(site string, v *lab.VM, long time.Duration) {
	w.t.Helper()
	n := 0
	for until := time.Now().Add(long); time.Now().Before(until); n++ {
		account, teller, branch, delta := n*7919%400_000+1, n*31%40+1, n%4+1, n%1000-500
		w.queryAt(site, v, fmt.Sprintf("BEGIN; UPDATE pgbench_accounts SET abalance = abalance + %[4]d WHERE aid = %[1]d;"+
			"SELECT abalance FROM pgbench_accounts WHERE aid = %[1]d;"+
			"UPDATE pgbench_tellers SET tbalance = tbalance + %[4]d WHERE tid = %[2]d;"+
			"UPDATE pgbench_branches SET bbalance = bbalance + %[4]d WHERE bid = %[3]d;"+
			"INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (%[2]d, %[3]d, %[1]d, %[4]d, now()); END",
			account, teller, branch, delta))
		w.servesPage(site, v)
	}
	fmt.Printf("  %d transactions and as many pages served\n", n)
	if n < 60 {
		w.t.Errorf("in %v the guest did no more than %d transactions", long, n)
	}
}

// accounts is a checksum of what the guest's database holds.
func (w *world) accounts(site string, v *lab.VM) string {
	w.t.Helper()
	sum := w.queryAt(site, v, "SELECT count(*), md5(string_agg(a::text, '' ORDER BY aid)), (SELECT count(*) FROM pgbench_history) FROM pgbench_accounts a WHERE aid <= 20000")
	if !strings.HasPrefix(sum, "20000 ") {
		w.t.Fatalf("the database holds %q", sum)
	}
	return sum
}

func (w *world) queryAt(site string, v *lab.VM, sql string) string {
	w.t.Helper()
	row, err := firstRow(w.askFrom(site, w.beside(site, v), "5432", questions(sql)))
	if err != nil {
		w.t.Fatalf("ask the database %q: %v", sql, err)
	}
	return row
}

func (w *world) servesPage(site string, v *lab.VM) {
	w.t.Helper()
	page := string(w.askFrom(site, w.beside(site, v), "8080", []byte("GET / HTTP/1.0\r\n\r\n")))
	if !strings.HasPrefix(page, "HTTP/1.1 200 OK\r\n") || !strings.Contains(page, "Welcome to nginx") {
		w.t.Errorf("the web server answers %q", page)
	}
}

// beside is the address of a guest on the bridge of the site where it is: the
// one that it has wherever it was migrated, and with whatever.
func (w *world) beside(site string, v *lab.VM) string {
	return v.LinkLocal.String() + "%" + w.Sites[site].Bridge
}
