//go:build lab

package blocksync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/wanmig/wanmig/blocksync/nbd"
)

// A QEMU mirrors a disk with a file system on it, while it is written to, through
// an outbox and a target into another QEMU's new disk:
//
//	source QEMU ── mirror job ──> nbd.Server, Outbox ──> Target, nbd.Client ──> destination QEMU
//	     ^
//	     └── a guest's writes
func TestMirror(t *testing.T) {
	tree := filepath.Join(runtime.GOROOT(), "src")
	for _, tt := range []struct{ source, destination string }{
		{"raw", "raw"},
		{"qcow2", "qcow2"},
		{"raw", "qcow2"},
	} {
		t.Run(tt.source+" to "+tt.destination, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }

			const size = 768 << 20
			run(t, "truncate", "-s", fmt.Sprint(size), path("fs"))
			run(t, "mke2fs", "-q", "-t", "ext4", "-d", tree, path("fs"))
			run(t, "qemu-img", "convert", "-f", "raw", "-O", tt.source, path("fs"), path("source"))
			run(t, "qemu-img", "create", "-q", "-f", tt.destination, path("destination"), fmt.Sprint(size))

			source := startQEMU(t, path("source-qemu"), path("source"), tt.source, path("guest.sock"))
			startQEMU(t, path("destination-qemu"), path("destination"), tt.destination, path("destination.sock"))
			device := connect(t, ctx, path("destination.sock"))
			guest := connect(t, ctx, path("guest.sock"))

			x := newTransfer(t, device, newBudget(t, 8<<20, 64<<20))
			listener, err := net.Listen("unix", path("outbox.sock"))
			if err != nil {
				t.Fatal(err)
			}
			server := &nbd.Server{Exports: map[string]nbd.Export{"drive": {Device: x.outbox}}}
			x.start(ctx)
			x.ended.Go(func() {
				if err := server.Serve(ctx, listener); err != nil {
					t.Error(err)
				}
			})

			source.call(t, "blockdev-add", map[string]any{
				"driver": "nbd", "node-name": "target", "export": "drive",
				"server": map[string]any{"type": "unix", "path": path("outbox.sock")},
			})
			source.call(t, "blockdev-mirror", map[string]any{
				"job-id": "mirror", "device": "disk", "target": "target", "sync": "full",
			})
			writing, stop := context.WithCancel(ctx)
			defer stop()
			written := make(chan int)
			go func() { written <- write(t, writing, guest, size) }()
			source.wait(t, "BLOCK_JOB_READY")
			stop()
			n := <-written
			source.call(t, "block-job-cancel", map[string]any{"device": "mirror"})
			source.wait(t, "BLOCK_JOB_COMPLETED")
			source.call(t, "blockdev-del", map[string]any{"node-name": "target"})
			server.Close()
			if err := x.finish(); err != nil {
				t.Fatal(err)
			}
			if err := x.settled(); err != nil {
				t.Error(err)
			}
			s := x.outbox.Stats()
			t.Logf("%d guest writes; source %+v; target %+v", n, s, x.target.Stats())
			if n == 0 {
				t.Error("the guest wrote nothing while the mirror ran")
			}

			guest.Close()
			device.Close()
			run(t, "qemu-img", "compare", "-U", "-f", tt.source, "-F", tt.destination, path("source"), path("destination"))
			from, to := allocated(t, path("source")), allocated(t, path("destination"))
			t.Logf("allocated: source %d, destination %d (%+.1f %%)", from, to, 100*float64(to-from)/float64(from))
			if to > from+from/20 {
				t.Errorf("destination allocates %d bytes, source %d", to, from)
			}
		})
	}
}

// A destination that runs out of space says so at the source.
func TestMirrorWithoutSpace(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	image := filepath.Join(dir, "disk")
	run(t, "truncate", "-s", "64M", image)
	startQEMU(t, filepath.Join(t.TempDir(), "qemu"), image, "raw", filepath.Join(dir, "nbd.sock"))
	x := newTransfer(t, connect(t, ctx, filepath.Join(dir, "nbd.sock")), newBudget(t, 1<<20, 0))
	x.start(ctx)
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(rand.Uint32())
	}
	var err error
	for off := int64(0); off < 64<<20 && err == nil; off += int64(len(p)) {
		err = x.outbox.WriteAt(ctx, p, off, false)
	}
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("write: %v", err)
	}
	x.ended.Wait()
	if !errors.Is(x.targetErr, syscall.ENOSPC) {
		t.Errorf("target: %v", x.targetErr)
	}
	t.Logf("operator at the source reads: %v", x.sendErr)
}

// write is a guest: it writes and discards blocks of the first quarter until ctx
// ends, and returns how often.
func write(t *testing.T, ctx context.Context, guest *nbd.Client, size int64) (n int) {
	r := rand.New(rand.NewPCG(3, 3))
	p := make([]byte, 16<<10)
	for ctx.Err() == nil {
		off := r.Int64N(size/4/page-4) * page
		var err error
		if n++; n%8 == 0 {
			err = guest.Zero(t.Context(), off, int64(len(p)), nbd.ZeroFlags{})
		} else {
			for i := range p {
				p[i] = byte(r.Uint32N(64))
			}
			err = guest.WriteAt(t.Context(), p, off, false)
		}
		if err != nil {
			t.Error(err)
			return n
		}
	}
	return n
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	run(t, "sync", path)
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// qemu is a storage daemon with a disk, exported at an NBD socket, and its QMP
// monitor.
type qemu struct {
	monitor net.Conn
	replies *json.Decoder
	events  []string
}

func startQEMU(t *testing.T, name, image, format, export string) *qemu {
	t.Helper()
	monitor := name + ".qmp"
	daemon := exec.Command("qemu-storage-daemon",
		"--chardev", "socket,id=qmp,path="+monitor+",server=on,wait=off",
		"--monitor", "chardev=qmp",
		"--blockdev", "driver=file,node-name=file,filename="+image,
		"--blockdev", "driver="+format+",node-name=disk,file=file",
		"--nbd-server", "addr.type=unix,addr.path="+export,
		"--export", "type=nbd,id=nbd,node-name=disk,name=disk,writable=on")
	daemon.Stderr = os.Stderr
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		daemon.Process.Signal(syscall.SIGTERM)
		daemon.Wait()
	})
	conn := dial(t, monitor)
	t.Cleanup(func() { conn.Close() })
	q := &qemu{monitor: conn, replies: json.NewDecoder(conn)}
	q.next(t) // greeting
	q.call(t, "qmp_capabilities", nil)
	return q
}

// dial waits for a socket that a daemon makes when it is ready.
func dial(t *testing.T, socket string) net.Conn {
	t.Helper()
	for range 500 {
		if conn, err := net.Dial("unix", socket); err == nil {
			return conn
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not listen", socket)
	return nil
}

type message struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

func (q *qemu) next(t *testing.T) message {
	t.Helper()
	q.monitor.SetReadDeadline(time.Now().Add(4 * time.Minute))
	var m message
	if err := q.replies.Decode(&m); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		t.Fatalf("monitor: %v", err)
	}
	return m
}

func (q *qemu) call(t *testing.T, command string, arguments map[string]any) {
	t.Helper()
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(q.monitor).Encode(request); err != nil {
		t.Fatal(err)
	}
	for {
		switch m := q.next(t); {
		case m.Error != nil:
			t.Fatalf("%s: %s", command, m.Error.Desc)
		case m.Event != "":
			q.note(t, m)
		default:
			return
		}
	}
}

func (q *qemu) note(t *testing.T, m message) {
	t.Helper()
	if m.Event == "BLOCK_JOB_ERROR" {
		t.Fatalf("%s: %s", m.Event, m.Data)
	}
	q.events = append(q.events, m.Event)
}

// wait returns when an event has come; it is forgotten then.
func (q *qemu) wait(t *testing.T, event string) {
	t.Helper()
	for {
		for i, e := range q.events {
			if e == event {
				q.events = q.events[i+1:]
				return
			}
		}
		q.note(t, q.next(t))
	}
}

func connect(t *testing.T, ctx context.Context, socket string) *nbd.Client {
	t.Helper()
	c, err := nbd.NewClient(ctx, dial(t, socket), "disk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
