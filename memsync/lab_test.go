//go:build lab

package memsync

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// counting is a boot sector that counts, for ever, in every 512th byte of the
// memory from 0x10000 to 0x90000. QEMU before 9.0 misses writes under TCG unless
// the guest drops its translations (commit 03bfc2188f there), so it does.
var counting = []byte{
	0xfa,       // cli
	0x31, 0xc0, // xor ax, ax
	0x40,             // outer: inc ax
	0xbb, 0x00, 0x10, // mov bx, 0x1000
	0x8e, 0xc3, // segment: mov es, bx
	0x31, 0xff, // xor di, di
	0x26, 0x0f, 0x01, 0x3d, // store: invlpg es:[di]
	0x26, 0x89, 0x05, // mov es:[di], ax
	0x81, 0xc7, 0x00, 0x02, // add di, 0x200
	0x75, 0xf3, // jnz store
	0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
	0x81, 0xfb, 0x00, 0x90, // cmp bx, 0x9000
	0x75, 0xe5, // jne segment
	0xeb, 0xdf, // jmp outer
}

const counter0 = 0x10000

// qemu is a running QEMU and its monitor.
type qemu struct {
	t   testing.TB
	dir string
	in  *bufio.Reader
	out net.Conn
	log bytes.Buffer
	id  int // of the last command
}

func startQEMU(t testing.TB, machine string, args ...string) *qemu {
	t.Helper()
	q := &qemu{t: t, dir: t.TempDir()}
	disk := filepath.Join(q.dir, "disk")
	sector := make([]byte, 1<<20)
	copy(sector, counting)
	sector[510], sector[511] = 0x55, 0xaa
	if err := os.WriteFile(disk, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	monitor := filepath.Join(q.dir, "qmp")
	cmd := exec.Command("qemu-system-x86_64", append([]string{
		"-machine", machine, "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none",
		"-drive", "if=none,id=disk,format=raw,readonly=on,file=" + disk,
		"-device", "virtio-blk-pci,drive=disk,bootindex=1",
		"-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-uuid", "6f1c1b8e-6d0b-4a51-9f3a-3f2b9a1c7d10",
		"-device", "virtio-balloon-pci", "-device", "virtio-rng-pci",
		"-qmp", "unix:" + monitor + ",server=on,wait=off"}, args...)...)
	cmd.Stdout, cmd.Stderr = &q.log, &q.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU said: %s", q.log.String())
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var err error
		if q.out, err = net.Dial("unix", monitor); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { q.out.Close() })
	q.out.SetDeadline(time.Now().Add(3 * time.Minute))
	q.in = bufio.NewReader(q.out)
	q.do("qmp_capabilities", nil, nil)
	return q
}

// do executes a command of the monitor.
func (q *qemu) do(command string, args, result any) {
	q.t.Helper()
	q.id++
	request := map[string]any{"execute": command, "id": q.id}
	if args != nil {
		request["arguments"] = args
	}
	b, err := json.Marshal(request)
	if err != nil {
		q.t.Fatal(err)
	}
	if _, err := q.out.Write(b); err != nil {
		q.t.Fatal(err)
	}
	for {
		line, err := q.in.ReadBytes('\n')
		if err != nil {
			q.t.Fatalf("%s: %v", command, err)
		}
		var reply struct {
			ID     int
			Error  json.RawMessage
			Return json.RawMessage
		}
		if err := json.Unmarshal(line, &reply); err != nil {
			q.t.Fatal(err)
		}
		switch {
		case reply.ID != q.id: // a greeting or an event
		case reply.Error != nil:
			q.t.Fatalf("%s: %s", command, reply.Error)
		default:
			if result != nil {
				if err := json.Unmarshal(reply.Return, result); err != nil {
					q.t.Fatal(err)
				}
			}
			return
		}
	}
}

func (q *qemu) enable(capabilities ...string) {
	q.t.Helper()
	for _, c := range capabilities {
		q.do("migrate-set-capabilities", map[string]any{
			"capabilities": []any{map[string]any{"capability": c, "state": true}}}, nil)
	}
}

// await polls a status until it is one of the wanted ones.
func (q *qemu) await(command string, want ...string) {
	q.t.Helper()
	var got struct{ Status string }
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		q.do(command, nil, &got)
		if slices.Contains(want, got.Status) {
			return
		}
		if got.Status == "failed" || time.Now().After(deadline) {
			q.t.Fatalf("%s is %q, want %q", command, got.Status, want)
		}
	}
}

// memory returns the guest's memory where it counts.
func (q *qemu) memory() []byte {
	q.t.Helper()
	file := filepath.Join(q.dir, "memory")
	q.do("pmemsave", map[string]any{"val": counter0, "size": 512 << 10, "filename": file}, nil)
	b, err := os.ReadFile(file)
	if err != nil {
		q.t.Fatal(err)
	}
	return b
}

// migrate starts a migration that goes on until rounds lets it end.
func (q *qemu) migrate(uri string) {
	q.t.Helper()
	q.do("migrate-set-parameters", map[string]any{"max-bandwidth": 8 << 20, "downtime-limit": 10}, nil)
	q.do("migrate", map[string]any{"uri": uri}, nil)
}

// rounds waits for some rounds of pre-copy and lets the migration end.
func (q *qemu) rounds() {
	q.t.Helper()
	for deadline := time.Now().Add(time.Minute); q.migration().RAM.Syncs < 4; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			q.t.Fatal("pre-copy makes no rounds")
		}
	}
	q.do("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30, "downtime-limit": 5000}, nil)
}

// migration is QEMU's own account of a migration.
type migration struct {
	RAM struct {
		Syncs int `json:"dirty-sync-count"`
	}
	XBZRLE struct{ Pages int } `json:"xbzrle-cache"`
	Zlib   struct{ Pages int } `json:"compression"`
}

func (q *qemu) migration() (m migration) {
	q.t.Helper()
	q.do("query-migrate", nil, &m)
	return m
}

// recorder keeps what passes a connection.
type recorder struct {
	io.ReadWriteCloser
	read, written []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.ReadWriteCloser.Read(p)
	r.read = append(r.read, p[:n]...)
	return n, err
}

func (r *recorder) Write(p []byte) (int, error) {
	n, err := r.ReadWriteCloser.Write(p)
	r.written = append(r.written, p[:n]...)
	return n, err
}

// counts waits until the guest's count goes on.
func (q *qemu) counts() {
	q.t.Helper()
	first := q.memory()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if now := q.memory(); now[0]|now[1] != 0 && !bytes.Equal(now, first) {
			return
		}
		if time.Now().After(deadline) {
			q.t.Fatal("the guest does not count")
		}
	}
}

// TestLive moves a guest that writes memory between two QEMUs:
//
//	QEMU --unix-- Source --channels-- Dest --unix-- QEMU
func TestLive(t *testing.T) {
	for _, c := range []struct {
		name         string
		machine      string
		capabilities []string
		opaque       bool
		ownShut      bool // QEMU is released before the destination has loaded
	}{
		{name: "return path", machine: "pc", capabilities: []string{"return-path"}, ownShut: true},
		{name: "q35", machine: "q35", capabilities: []string{"return-path", "xbzrle"}, ownShut: true},
		{name: "postcopy allowed", machine: "pc", capabilities: []string{"return-path", "postcopy-ram"}, ownShut: true},
		{name: "no return path", machine: "pc", ownShut: true},
		{name: "no description", machine: "pc,suppress-vmdesc=on", capabilities: []string{"return-path"}},
		{name: "neither", machine: "pc,suppress-vmdesc=on"},
		{name: "dirty bitmaps", machine: "pc", capabilities: []string{"return-path", "dirty-bitmaps"}, opaque: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := startQEMU(t, c.machine)
			incoming := filepath.Join(t.TempDir(), "in")
			to := startQEMU(t, c.machine, "-S", "-incoming", "unix:"+incoming)
			from.enable(c.capabilities...)
			to.enable(c.capabilities...)
			to.await("query-status", "inmigrate")
			from.counts()

			outgoing := filepath.Join(t.TempDir(), "out")
			l, err := net.Listen("unix", outgoing)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			from.migrate("unix:" + outgoing)
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			sent, taken := &recorder{ReadWriteCloser: conn}, &recorder{}

			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			frames, returns := newChannel(), newChannel()
			gate := make(chan struct{})
			tails := 0
			source := NewSource(SourceConfig{QEMU: sent, Frames: frames, Return: returns, OnTail: func() { tails++ }})
			dest := NewDest(DestConfig{Frames: frames, Return: returns,
				Dial: func(ctx context.Context) (c io.ReadWriteCloser, err error) {
					var d net.Dialer
					taken.ReadWriteCloser, err = d.DialContext(ctx, "unix", incoming)
					return taken, err
				},
				Gate: func(ctx context.Context) error {
					select {
					case <-gate:
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				}})
			var wg sync.WaitGroup
			defer wg.Wait()
			var srcErr, destErr error
			wg.Go(func() { srcErr = source.Run(ctx); frames.closeSend() })
			wg.Go(func() { destErr = dest.Run(ctx); returns.closeSend() })

			if !c.ownShut {
				close(gate)
			}
			from.rounds()
			from.await("query-migrate", "completed")
			if c.ownShut {
				to.await("query-status", "inmigrate")
				close(gate)
			}
			wg.Wait()
			if srcErr != nil || destErr != nil {
				t.Fatalf("source: %v, destination: %v", srcErr, destErr)
			}
			to.await("query-status", "paused")
			to.await("query-migrate", "completed")
			if !bytes.Equal(sent.read, taken.written) {
				t.Errorf("QEMU sent %d bytes, QEMU took %d others", len(sent.read), len(taken.written))
			}
			to.do("cont", nil, nil)
			to.await("query-status", "running")
			to.counts()

			st := source.Stats()
			t.Logf("%+v", st)
			if st.Opaque != c.opaque || (tails == 1) == c.opaque {
				t.Errorf("opaque %v, OnTail called %d times", st.Opaque, tails)
			}
			if !c.opaque && (st.RAMBytes < 256<<20 || st.UnseenPages != 0 || st.Parts < 2 || st.TailBytes == 0) {
				t.Errorf("stats %+v", st)
			}
		})
	}
}

// A migration cancelled at the source is no stream.
func TestCancelled(t *testing.T) {
	from := startQEMU(t, "pc")
	from.counts()
	outgoing := filepath.Join(t.TempDir(), "out")
	l, err := net.Listen("unix", outgoing)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	from.do("migrate-set-parameters", map[string]any{"max-bandwidth": 100_000}, nil)
	from.do("migrate", map[string]any{"uri": "unix:" + outgoing}, nil)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	first := make(chan struct{})
	var once sync.Once
	source := NewSource(SourceConfig{QEMU: conn, Return: drop{}, Frames: sendFunc(func(_ context.Context, f []byte) error {
		if f[0] == frameEnd {
			t.Error("an end frame was sent")
		}
		once.Do(func() { close(first) })
		return nil
	})})
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx) }()
	<-first
	from.do("migrate_cancel", nil, nil)
	if err := <-done; err == nil || ctx.Err() != nil {
		t.Errorf("Run: %v", err)
	} else {
		t.Log(err)
	}
	from.await("query-migrate", "cancelled")
	from.await("query-status", "running")
}

// captured is a stream that QEMU wrote to a file.
func captured(t testing.TB, machine string, capabilities ...string) ([]byte, migration) {
	t.Helper()
	q := startQEMU(t, machine)
	q.enable(capabilities...)
	q.counts()
	file := filepath.Join(q.dir, "stream")
	q.migrate("exec:cat > " + file)
	q.rounds()
	q.await("query-migrate", "completed")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b, q.migration()
}

// What QEMU writes under any of its capabilities comes out the same.
func TestCaptured(t *testing.T) {
	for _, c := range []struct {
		name, machine, capability string
		opaque                    bool
		has                       func(m migration) bool
	}{
		{name: "pc", machine: "pc"},
		{name: "q35", machine: "q35"},
		{name: "xbzrle", machine: "pc", capability: "xbzrle", has: func(m migration) bool { return m.XBZRLE.Pages > 0 }},
		{name: "zlib", machine: "pc", capability: "compress", has: func(m migration) bool { return m.Zlib.Pages > 0 }},
		{name: "uuid", machine: "pc", capability: "validate-uuid"},
		{name: "no description", machine: "pc,suppress-vmdesc=on"},
		{name: "dirty bitmaps", machine: "pc", capability: "dirty-bitmaps", opaque: true},
		{name: "ignore shared", machine: "pc", capability: "x-ignore-shared", opaque: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var capabilities []string
			if c.capability != "" {
				capabilities = append(capabilities, c.capability)
			}
			data, account := captured(t, c.machine, capabilities...)
			got := carry(data)
			got.check(t, data)
			if sha256.Sum256(got.out) != sha256.Sum256(data) || got.src != nil {
				t.Errorf("other bytes came out, source: %v", got.src)
			}
			st := got.source.Stats()
			t.Logf("%d bytes: %+v", len(data), st)
			if st.Opaque != c.opaque || (got.tails == 1) == c.opaque {
				t.Errorf("opaque %v, OnTail called %d times", st.Opaque, got.tails)
			}
			if !c.opaque && (st.UnseenPages != 0 || st.RAMBytes < 256<<20) {
				t.Errorf("stats %+v", st)
			}
			if c.has != nil && !c.has(account) {
				t.Errorf("QEMU sent nothing by %s, the stream tests nothing: %+v", c.capability, account)
			}
		})
	}
}
