//go:build lab

package nbd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// These tests hold server and client against QEMU's and libnbd's tools, over unix sockets.
// They need qemu-utils and libnbd-bin, and no privileges.

const labSize = 64 << 20

// run runs a tool and gives what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// patterned makes a raw image with data at its ends and here and there, and holes between.
func patterned(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(labSize); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 1<<20)
	for _, off := range []int64{0, 3 << 20, 4 << 20, 20<<20 + 4096, 40<<20 + 12345, labSize - 1<<20} {
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

func blank(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, labSize); err != nil {
		t.Fatal(err)
	}
}

// allocatedBytes gives what a file takes on its file system.
func allocatedBytes(t *testing.T, path string) int64 {
	t.Helper()
	var blocks int64
	if _, err := fmt.Sscan(run(t, "stat", "-c", "%b", path), &blocks); err != nil {
		t.Fatal(err)
	}
	return blocks * 512
}

func uri(socket, export string) string { return "nbd+unix:///" + export + "?socket=" + socket }

func TestLabInfo(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.raw")
	patterned(t, image)
	device := openFile(t, image)
	_, socket := serve(t, map[string]Export{
		"disk": {Device: device},
		"cd":   {Device: device, ReadOnly: true},
		"null": {Device: nullDevice{size: 1 << 40}},
	})
	type export struct {
		Name      string   `json:"export-name"`
		Contexts  []string `json:"contexts"`
		ReadOnly  bool     `json:"is_read_only"`
		MultiConn bool     `json:"can_multi_conn"`
		DF        bool     `json:"can_df"`
		FUA       bool     `json:"can_fua"`
		Flush     bool     `json:"can_flush"`
		Trim      bool     `json:"can_trim"`
		Zero      bool     `json:"can_zero"`
		FastZero  bool     `json:"can_fast_zero"`
		Min       int64    `json:"block_size_minimum"`
		Preferred int64    `json:"block_size_preferred"`
		Max       int64    `json:"block_size_maximum"`
		Size      int64    `json:"export-size"`
	}
	var info struct {
		Structured bool     `json:"structured"`
		Exports    []export `json:"exports"`
	}
	out := run(t, "nbdinfo", "--json", "--list", uri(socket, ""))
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
	if !info.Structured || len(info.Exports) != 3 {
		t.Fatalf("nbdinfo sees\n%s", out)
	}
	cd, disk, null := info.Exports[0], info.Exports[1], info.Exports[2]
	if disk.Name != "disk" || disk.ReadOnly || !disk.MultiConn || !disk.DF || !disk.FUA || !disk.Flush || !disk.Trim || !disk.Zero ||
		disk.FastZero || disk.Min != 1 || disk.Preferred != 4096 || disk.Max != maxData || disk.Size != labSize ||
		fmt.Sprint(disk.Contexts) != "["+contextAllocation+"]" {
		t.Errorf("disk: %+v", disk)
	}
	if cd.Name != "cd" || !cd.ReadOnly || cd.Trim || cd.Zero {
		t.Errorf("cd: %+v", cd)
	}
	if null.Name != "null" || null.MultiConn || len(null.Contexts) != 0 || null.Size != 1<<40 {
		t.Errorf("null: %+v", null)
	}

	// What nbdinfo maps must be what qemu-img maps in the file itself.
	type extent struct {
		Offset int64 `json:"offset"`
		Length int64 `json:"length"`
		Type   int   `json:"type"`
	}
	var got []extent
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--map", "--json", uri(socket, "disk"))), &got); err != nil {
		t.Fatal(err)
	}
	var direct []struct {
		Start, Length int64
		Zero          bool
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", image)), &direct); err != nil {
		t.Fatal(err)
	}
	var want []extent
	for _, e := range direct {
		kind := 0
		if e.Zero {
			kind = stateHole | stateZero
		}
		want = append(want, extent{e.Start, e.Length, kind})
	}
	if len(want) < 9 || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("nbdinfo maps %v, qemu-img %v", got, want)
	}
}

func TestLabCopy(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.raw")
	patterned(t, image)
	compare := func(t *testing.T, other string) {
		t.Helper()
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, other)
	}
	t.Run("nbdcopy from server", func(t *testing.T) {
		_, socket := serve(t, map[string]Export{"disk": {Device: openFile(t, image), ReadOnly: true}})
		copied := filepath.Join(dir, "from.raw")
		run(t, "nbdcopy", uri(socket, "disk"), copied)
		compare(t, copied)
	})
	t.Run("nbdcopy to server", func(t *testing.T) {
		copied := filepath.Join(dir, "to.raw")
		blank(t, copied)
		_, socket := serve(t, map[string]Export{"disk": {Device: openFile(t, copied)}})
		run(t, "nbdcopy", "--flush", image, uri(socket, "disk"))
		compare(t, copied)
	})
	t.Run("nbdcopy between two servers", func(t *testing.T) {
		copied := filepath.Join(dir, "between.raw")
		blank(t, copied)
		_, from := serve(t, map[string]Export{"a": {Device: openFile(t, image)}})
		_, to := serve(t, map[string]Export{"b": {Device: openFile(t, copied)}})
		run(t, "nbdcopy", uri(from, "a"), uri(to, "b"))
		compare(t, copied)
	})
	t.Run("qemu-img convert and compare", func(t *testing.T) {
		copied := filepath.Join(dir, "convert.raw")
		blank(t, copied)
		_, socket := serve(t, map[string]Export{"disk": {Device: openFile(t, copied)}})
		run(t, "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", image, uri(socket, "disk"))
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri(socket, "disk"))
		compare(t, copied)
		if got, want := allocatedBytes(t, copied), allocatedBytes(t, image); got > want+1<<20 {
			t.Errorf("the copy takes %d bytes, its source %d", got, want)
		}
	})
	t.Run("a difference is seen", func(t *testing.T) {
		other := filepath.Join(dir, "other.raw")
		blank(t, other)
		_, socket := serve(t, map[string]Export{"disk": {Device: openFile(t, other)}})
		if err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri(socket, "disk")).Run(); err == nil {
			t.Error("qemu-img compare finds a blank disk equal to one that is not")
		}
	})
}

func TestLabIO(t *testing.T) {
	device := newMemDevice(labSize)
	_, socket := serve(t, map[string]Export{"disk": {Device: device}, "cd": {Device: newMemDevice(4096), ReadOnly: true}})
	out := run(t, "qemu-io", "-t", "writeback", "-d", "unmap", "-f", "raw", "-c", "write -P 0x5a 4k 1M", "-c", "read -P 0x5a 4k 1M", "-c", "read -P 0 0 4k",
		"-c", "write -z 64k 64k", "-c", "read -P 0 64k 64k", "-c", "write -z -u 128k 64k", "-c", "write -f -P 0x77 8M 512",
		"-c", "read -P 0x77 8M 512", "-c", "discard 512k 64k", "-c", "flush", uri(socket, "disk"))
	if strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
	want := []string{
		"write 4096+1048576 fua=false", "read 4096+1048576", "read 0+4096",
		"zero 65536+65536 fua=false nohole=true", "read 65536+65536", "zero 131072+65536 fua=false nohole=false",
		"write 8388608+512 fua=true", "read 8388608+512", "trim 524288+65536 fua=false", "flush",
	}
	got := device.operations()
	if len(got) < len(want) || fmt.Sprint(got[:len(want)]) != fmt.Sprint(want) {
		t.Errorf("device saw %q, want %q", got, want)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri(socket, "cd")).CombinedOutput(); err == nil {
		t.Errorf("qemu-io writes to a read-only export:\n%s", out)
	}
}

// TestLabMirror lets QEMU's blockdev-mirror write a disk through the server, as in a move.
func TestLabMirror(t *testing.T) {
	dir := t.TempDir()
	image, target := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "target.raw")
	patterned(t, image)
	blank(t, target)
	_, socket := serve(t, map[string]Export{"drive-virtio-disk0": {Device: openFile(t, target)}})

	cmd := exec.Command("qemu-storage-daemon", "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp",
		"--blockdev", fmt.Sprintf(`{"driver":"file","filename":%q,"node-name":"storage","discard":"unmap"}`, image),
		"--blockdev", `{"driver":"raw","file":"storage","node-name":"disk"}`)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	watchdog := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer watchdog.Stop()
	say := func(format string, args ...any) { fmt.Fprintf(in, format+"\n", args...) }
	say(`{"execute":"qmp_capabilities"}`)
	say(`{"execute":"blockdev-add","arguments":{"driver":"nbd","node-name":"mirror","export":"drive-virtio-disk0",`+
		`"server":{"type":"unix","path":%q}}}`, socket)
	say(`{"execute":"blockdev-mirror","arguments":{"job-id":"job","device":"disk","target":"mirror","sync":"full"}}`)
	var event struct {
		Event string
		Error *struct{ Desc string }
		Data  struct{ Error string }
	}
	completed := false
	for answers := json.NewDecoder(out); ; {
		event.Event, event.Error, event.Data.Error = "", nil, ""
		if err := answers.Decode(&event); err != nil {
			break
		}
		switch {
		case event.Error != nil:
			t.Error(event.Error.Desc)
			cmd.Process.Kill()
		case event.Event == "BLOCK_JOB_READY":
			say(`{"execute":"block-job-complete","arguments":{"device":"job"}}`)
		case event.Event == "BLOCK_JOB_COMPLETED":
			completed = event.Data.Error == ""
			say(`{"execute":"quit"}`)
		}
	}
	if !completed {
		t.Fatalf("the mirror did not complete: %s", event.Data.Error)
	}
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, target)
	if got, want := allocatedBytes(t, target), allocatedBytes(t, image); got > want+1<<20 {
		t.Errorf("the target takes %d bytes, its source %d", got, want)
	}
}

// listening tells whether a program listens on a unix socket, without connecting:
// a qemu-storage-daemon that is told to end while a connection that said nothing
// goes away may never end.
func listening(t *testing.T, socket string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/net/unix") // proc_pid_net(5)
	if err != nil {
		t.Fatal(err)
	}
	const acceptsConnections = "00010000"
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 8 && f[3] == acceptsConnections && f[7] == socket {
			return true
		}
	}
	return false
}

// startTool starts a server of QEMU's in the background and waits for its socket.
func startTool(t *testing.T, socket string, name string, args ...string) (stop func()) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			cmd.Process.Kill()
			<-ended
			t.Errorf("%s does not end by itself:\n%s", name, &out)
		}
	}
	t.Cleanup(stop)
	for {
		if listening(t, socket) {
			return stop
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("%s: %v\n%s", name, err, &out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestLabClient copies an image into QEMU's server, hole by hole and datum by datum, as the
// destination agent does, and looks at what is there afterwards.
func TestLabClient(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		for _, options := range [][]string{nil, {"--discard=unmap"}, {"--discard=unmap", "--detect-zeroes=unmap"}} {
			t.Run(fmt.Sprint(format, options), func(t *testing.T) { testLabClient(t, format, options) })
		}
	}
}

func testLabClient(t *testing.T, format string, options []string) {
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	image, target, socket := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "target"), filepath.Join(dir, "s")
	patterned(t, image)
	run(t, "qemu-img", "create", "-q", "-f", format, target, fmt.Sprint(labSize))
	stop := startTool(t, socket, "qemu-nbd", append([]string{"-t", "-f", format, "-k", socket, "-x", "disk"}, append(options, target)...)...)

	source := openFile(t, image)
	c := connect(t, socket, "disk")
	if c.Size() != labSize || c.ReadOnly() || !c.structured || !c.HasBlockStatus() {
		t.Fatalf("%d bytes, read-only %v, structured %v, block status %v", c.Size(), c.ReadOnly(), c.structured, c.HasBlockStatus())
	}
	extents, err := source.BlockStatus(ctxb, 0, labSize)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, labSize)
	for _, e := range extents {
		if e.Zero {
			err = c.Zero(ctxb, e.Offset, e.Length, ZeroFlags{})
		} else if err = source.ReadAt(ctxb, p[:e.Length], e.Offset); err == nil {
			err = c.WriteAt(ctxb, p[:e.Length], e.Offset, false)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// A hole that was data before is a hole again, as far as the server goes along.
	for _, err := range []error{
		c.WriteAt(ctxb, bytes.Repeat([]byte{1}, 1<<20), 10<<20, true), c.Zero(ctxb, 10<<20, 1<<20, ZeroFlags{FUA: true}),
		c.Trim(ctxb, 12<<20, 1<<20, false), c.Flush(ctxb),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// QEMU reports what the client reads, in data and holes.
	if err := c.ReadAt(ctxb, p, 0); err != nil {
		t.Fatal(err)
	}
	original, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, original) {
		t.Error("what is read back differs")
	}
	holes := int64(0)
	for at := int64(0); at < labSize; {
		status, err := c.BlockStatus(ctxb, at, labSize-at)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range status {
			if e.Zero {
				holes += e.Length
			}
			at += e.Length
		}
	}
	if holes < labSize-8<<20 {
		t.Errorf("only %d bytes of %d are reported as zeros", holes, labSize)
	}
	c.Close()
	stop()
	run(t, "qemu-img", "compare", "-f", "raw", "-F", format, image, target)
	got, want := allocatedBytes(t, target), allocatedBytes(t, image)
	t.Logf("%s %v: %d KiB allocated, source %d KiB", format, options, got>>10, want>>10)
	want += 512 << 10 // of qcow2's metadata and clusters
	if format == "qcow2" && options == nil {
		want += 1 << 20 // what was data once stays allocated: see TestLabThinness
	}
	if got > want {
		t.Errorf("the target takes %d bytes, its source %d", got, want)
	}
}

// TestLabThinness holds what zeroing costs in a destination QEMU. libvirt opens a file with
// discard=unmap below, whatever the domain says, and the format above it with the domain's
// own setting, by default ignore.
func TestLabThinness(t *testing.T) {
	const piece = 4 << 20
	for _, c := range []struct {
		format, discard string
		noHole          bool
		fresh, over     int64 // allocated by zeroing what was never written, and what was
	}{
		{"raw", "ignore", false, 0, -piece},
		{"raw", "ignore", true, piece, 0},
		{"raw", "unmap", false, 0, -piece},
		{"raw", "unmap", true, piece, 0},
		{"qcow2", "ignore", false, 0, 0},
		{"qcow2", "ignore", true, 0, 0},
		{"qcow2", "unmap", false, 0, -piece},
		{"qcow2", "unmap", true, 0, 0},
	} {
		t.Run(fmt.Sprintf("%s discard=%s no-hole=%v", c.format, c.discard, c.noHole), func(t *testing.T) {
			dir, err := os.MkdirTemp("", "nbd")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			image, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
			run(t, "qemu-img", "create", "-q", "-f", c.format, image, fmt.Sprint(labSize))
			startTool(t, socket, "qemu-storage-daemon",
				"--blockdev", fmt.Sprintf(`{"driver":"file","filename":%q,"node-name":"storage","auto-read-only":true,"discard":"unmap"}`, image),
				"--blockdev", fmt.Sprintf(`{"driver":%q,"file":"storage","node-name":"format","discard":%q}`, c.format, c.discard),
				"--nbd-server", "addr.type=unix,addr.path="+socket,
				"--export", "type=nbd,id=disk,node-name=format,name=disk,writable=on")
			client := connect(t, socket, "disk")
			if err := client.WriteAt(ctxb, bytes.Repeat([]byte{7}, piece), 0, false); err != nil {
				t.Fatal(err)
			}
			change := func(off int64) int64 {
				if err := client.Flush(ctxb); err != nil {
					t.Fatal(err)
				}
				before := allocatedBytes(t, image)
				if err := client.Zero(ctxb, off, piece, ZeroFlags{FUA: true, NoHole: c.noHole}); err != nil {
					t.Fatal(err)
				}
				if err := client.ReadAt(ctxb, make([]byte, piece), off); err != nil {
					t.Fatal(err)
				}
				return allocatedBytes(t, image) - before
			}
			near := func(got, want int64) bool { return max(got-want, want-got) <= 256<<10 } // metadata
			if fresh := change(16 << 20); !near(fresh, c.fresh) {
				t.Errorf("zeroing what was never written allocates %d, want %d", fresh, c.fresh)
			}
			if over := change(0); !near(over, c.over) {
				t.Errorf("zeroing what was written allocates %d, want %d", over, c.over)
			}
		})
	}
}
