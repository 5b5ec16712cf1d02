//go:build bench

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
)

// TestDebianGuest boots a guest with a system of its own and moves it. Its web
// server and its database answer a client before and after, the guest finds its
// memory and disk as they were, and so does a comparison of both images.
func TestDebianGuest(t *testing.T) {
	w := newWorld(t, "100mbit", "50ms")
	disks := []lab.DiskOptions{disk(t, "3GiB"), disk(t, "64MiB,format=qcow2,bus=scsi")}
	v := w.vm(lab.VMOptions{Name: "db", Image: lab.Debian, Disks: disks, Dirty: 256 << 10, Write: 256 << 10, Progress: func(line string) { fmt.Println(line) }})
	fmt.Printf("\nDebian guest of 1 GiB, up after %.1f s\n", v.BootTime.Seconds())
	const accounts = "SELECT count(*), md5(string_agg(a::text, '' ORDER BY aid)) FROM pgbench_accounts a WHERE aid <= 20000"
	before := w.query(v, accounts)
	if !strings.HasPrefix(before, "20000 ") {
		t.Fatalf("the database holds %q", before)
	}
	// Two writes: one is long on disk when the guest moves, one may be only in its memory.
	w.query(v, "CREATE TABLE moves (n int); INSERT INTO moves VALUES (1); CHECKPOINT")
	w.servesPages(v)
	w.query(v, "INSERT INTO moves VALUES (2)")

	r := w.move(lab.LocalDC, v.Name, lab.RemoteDC, "--paused", "--keep-source", "--address", v.MAC+"="+v.Address.String())
	fmt.Printf("  moved in %.1f s, %.1f MiB sent for %.1f MiB of disks and %.1f MiB of memory\n", float64(r.TotalMS)/1000,
		float64(r.WireBytesSent)/(1<<20), float64(r.DiskBytes)/(1<<20), float64(r.MemoryBytes)/(1<<20))
	m := r.Reduction.Memory
	fmt.Printf("  of memory %.1f MiB are known, %.1f MiB are on disk, %.1f MiB were sent in %.1f MiB\n", float64(m.Reference.Bytes)/(1<<20),
		float64(m.Disk.Bytes)/(1<<20), float64(m.Data.Bytes)/(1<<20), float64(m.Data.Wire)/(1<<20))
	if m.Disk.Bytes < 64<<20 {
		t.Errorf("only %d KiB of memory were found on disk, of a guest that caches its files", m.Disk.Bytes>>10)
	}
	for i, path := range v.Disks {
		w.same(disks[i].Format, w.path(lab.LocalDC, path), w.path(lab.RemoteDC, path))
		w.thin(w.path(lab.LocalDC, path), w.path(lab.RemoteDC, path))
	}
	if _, complaint, status := w.run(lab.RemoteDC, "virsh", "resume", v.Name); status != 0 {
		t.Fatal(complaint)
	}
	w.healthy(lab.RemoteDC, v)
	w.servesPages(v)
	if after := w.query(v, accounts); after != before {
		t.Errorf("the database held %q, and holds %q", before, after)
	}
	if got := w.query(v, "SELECT sum(n) FROM moves"); got != "3" {
		t.Errorf("what was written before the move adds up to %q, want 3", got)
	}
	w.query(v, "INSERT INTO moves VALUES (3)")

	if err := v.PowerOff(t.Context(), lab.RemoteDC); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(5 * time.Minute); w.state(lab.RemoteDC, v.Name) != "shut off"; time.Sleep(time.Second) {
		if time.Now().After(until) {
			t.Fatalf("powering off, the guest is %s after 5 minutes", w.state(lab.RemoteDC, v.Name))
		}
	}
	// The journal has nothing left to do when the system has unmounted its root.
	if out, err := exec.Command("e2fsck", "-f", "-n", w.path(lab.RemoteDC, v.Disks[0])).CombinedOutput(); err != nil {
		t.Errorf("file system after power-off: %v: %s", err, out)
	}
}

// TestDebianInstallInterrupted stops the installation of an image while packages are unpacked into it.
func TestDebianInstallInterrupted(t *testing.T) {
	cache := t.TempDir()
	im, err := lab.OpenImages(cache, program(t, "wanlab-guest"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Minute)
	defer stop()
	installing := false
	_, err = im.Debian(ctx, lab.Debian, func(line string) {
		if strings.Contains(line, "installing essential packages") {
			installing = true
			time.AfterFunc(2*time.Second, stop)
		}
	})
	if !installing || !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted while it installs: %v, it ended with %v", installing, err)
	}
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		if argv, err := os.ReadFile(path); err == nil && bytes.Contains(argv, []byte(cache)) {
			t.Errorf("%s is left: %q", path, argv)
		}
	}
	// The kernel unmounts a bit later what nobody sees any more.
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		loops, err := exec.Command("losetup", "--list", "--noheadings", "--output", "BACK-FILE").CombinedOutput()
		if err != nil {
			t.Fatalf("losetup: %v: %s", err, loops)
		}
		if !bytes.Contains(loops, []byte(cache)) {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("loop devices are left:\n%s", loops)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(cache)) {
		t.Errorf("mounts are left: %v\n%s", err, mounts)
	}
	if left, _ := filepath.Glob(cache + "/debian/*"); len(left) != 1 || filepath.Base(left[0]) != "lock" {
		t.Errorf("the cache has %q, want its lock", left)
	}
}

// servesPages checks that a guest answers pings and that its web server has its page for a client in users.
func (w *world) servesPages(v *lab.VM) {
	w.t.Helper()
	if out, complaint, status := w.run(lab.Users, "ping", "-c", "1", "-W", "5", v.Address.String()); status != 0 {
		w.t.Errorf("ping: %s%s", out, complaint)
	}
	page := string(w.ask(v, "8080", []byte("GET / HTTP/1.0\r\n\r\n")))
	if !strings.HasPrefix(page, "HTTP/1.1 200 OK\r\n") || !strings.Contains(page, "Welcome to nginx") {
		w.t.Errorf("the web server answers %q", page)
	}
}

// ask has a client in users send something to a port of a guest, and returns what comes until the guest closes the connection.
func (w *world) ask(v *lab.VM, port string, question []byte) []byte {
	w.t.Helper()
	return w.askFrom(lab.Users, v.Address.String(), port, question)
}

// askFrom is the same for a client in any site.
func (w *world) askFrom(site, address, port string, question []byte) []byte {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	cmd, err := w.Command(ctx, site, "busybox", "nc", address, port)
	if err != nil {
		w.t.Fatal(err)
	}
	cmd.Stdin = bytes.NewReader(question)
	answer, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("ask port %s of %s: %v after %q", port, address, err, answer)
	}
	return answer
}

// query has a guest's database answer a client in users, and returns the first row of the answer.
func (w *world) query(v *lab.VM, sql string) string {
	w.t.Helper()
	row, err := firstRow(w.ask(v, "5432", questions(sql)))
	if err != nil {
		w.t.Fatalf("ask the database %q: %v", sql, err)
	}
	return row
}

// questions are the messages of a client of PostgreSQL that is not asked for a
// password: startup, a simple query and the end (protocol 3.0, message formats).
func questions(sql string) []byte {
	message := func(kind string, content []byte) []byte {
		return append(binary.BigEndian.AppendUint32([]byte(kind), uint32(4+len(content))), content...)
	}
	b := message("", append([]byte{0, 3, 0, 0}, "user\x00postgres\x00database\x00bench\x00\x00"...))
	b = append(b, message("Q", []byte(sql+"\x00"))...)
	return append(b, message("X", nil)...)
}

// firstRow finds the first row in a server's messages, its columns separated by spaces, or nothing if there is none.
func firstRow(reply []byte) (row string, err error) {
	found, completed := false, false
	for len(reply) > 0 {
		if len(reply) < 5 || uint64(len(reply)) < 1+uint64(binary.BigEndian.Uint32(reply[1:])) || binary.BigEndian.Uint32(reply[1:]) < 4 {
			return "", errors.New("the answer ends in a message")
		}
		kind, end := reply[0], 1+binary.BigEndian.Uint32(reply[1:])
		content := reply[5:end]
		reply = reply[end:]
		switch {
		case kind == 'E':
			return "", fmt.Errorf("it refuses: %q", content)
		case kind == 'C':
			completed = true
		case kind == 'D' && !found:
			found = true
			if row, err = columns(content); err != nil {
				return "", err
			}
		}
	}
	if !completed {
		return "", errors.New("no answer")
	}
	return row, nil
}

func columns(content []byte) (string, error) {
	short := errors.New("a row ends in a column")
	if len(content) < 2 {
		return "", short
	}
	var all []string
	n := binary.BigEndian.Uint16(content)
	for content = content[2:]; n > 0; n-- {
		if len(content) < 4 {
			return "", short
		}
		size := max(int32(binary.BigEndian.Uint32(content)), 0) // -1 is NULL
		content = content[4:]
		if int64(len(content)) < int64(size) {
			return "", short
		}
		all = append(all, string(content[:size]))
		content = content[size:]
	}
	return strings.Join(all, " "), nil
}
