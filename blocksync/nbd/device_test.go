package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

const memBlock = 4096 // granularity of a memDevice's holes

// memDevice is a disk in memory, with holes. It notes what is done to it.
type memDevice struct {
	sizes     *blockSizes
	multiConn bool
	// before, if set, runs before each operation, which fails with its error.
	before func(ctx context.Context, cmd command) error

	mu        sync.Mutex
	data      []byte
	allocated []bool
	log       []string
}

func newMemDevice(size int) *memDevice {
	return &memDevice{data: make([]byte, size), allocated: make([]bool, (size+memBlock-1)/memBlock)}
}

func (d *memDevice) start(ctx context.Context, cmd command, format string, args ...any) error {
	if d.before != nil {
		if err := d.before(ctx, cmd); err != nil {
			return err
		}
	}
	d.mu.Lock()
	d.log = append(d.log, fmt.Sprintf(format, args...))
	return nil
}

func (d *memDevice) operations() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.log...)
}

func (d *memDevice) isAllocated(block int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.allocated[block]
}

func (d *memDevice) Size() int64     { return int64(len(d.data)) }
func (d *memDevice) MultiConn() bool { return d.multiConn }

func (d *memDevice) BlockSizes() (min, preferred, max uint32) {
	s := defaultBlockSizes
	if d.sizes != nil {
		s = *d.sizes
	}
	return s.min, s.preferred, s.max
}

func (d *memDevice) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.start(ctx, cmdRead, "read %d+%d", off, len(p)); err != nil {
		return err
	}
	defer d.mu.Unlock()
	copy(p, d.data[off:off+int64(len(p))])
	return nil
}

func (d *memDevice) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if err := d.start(ctx, cmdWrite, "write %d+%d fua=%v", off, len(p), fua); err != nil {
		return err
	}
	defer d.mu.Unlock()
	copy(d.data[off:off+int64(len(p))], p)
	d.allocate(off, int64(len(p)))
	return nil
}

func (d *memDevice) allocate(off, n int64) {
	for b := off / memBlock; b*memBlock < off+n; b++ {
		d.allocated[b] = true
	}
}

func (d *memDevice) clear(off, n int64, hole bool) {
	clear(d.data[off : off+n])
	if !hole {
		d.allocate(off, n)
		return
	}
	for b := (off + memBlock - 1) / memBlock; (b+1)*memBlock <= off+n; b++ {
		d.allocated[b] = false
	}
}

func (d *memDevice) Zero(ctx context.Context, off, n int64, f ZeroFlags) error {
	if err := d.start(ctx, cmdWriteZeroes, "zero %d+%d fua=%v nohole=%v", off, n, f.FUA, f.NoHole); err != nil {
		return err
	}
	defer d.mu.Unlock()
	d.clear(off, n, !f.NoHole)
	return nil
}

func (d *memDevice) Trim(ctx context.Context, off, n int64, fua bool) error {
	if err := d.start(ctx, cmdTrim, "trim %d+%d fua=%v", off, n, fua); err != nil {
		return err
	}
	defer d.mu.Unlock()
	d.clear(off, n, true)
	return nil
}

func (d *memDevice) Flush(ctx context.Context) error {
	if err := d.start(ctx, cmdFlush, "flush"); err != nil {
		return err
	}
	d.mu.Unlock()
	return nil
}

func (d *memDevice) BlockStatus(ctx context.Context, off, n int64) ([]Extent, error) {
	if err := d.start(ctx, cmdBlockStatus, "status %d+%d", off, n); err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	var extents []Extent
	for at := off; at < off+n; {
		next := min((at/memBlock+1)*memBlock, off+n)
		hole := !d.allocated[at/memBlock]
		extents = append(extents, Extent{Offset: at, Length: next - at, Hole: hole, Zero: hole})
		at = next
	}
	return extents, nil
}

// fileDevice is a disk in a file.
type fileDevice struct {
	f    *os.File
	size int64
}

func openFile(t testing.TB, path string) *fileDevice {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return &fileDevice{f: f, size: info.Size()}
}

func (d *fileDevice) Size() int64 { return d.size }

// MultiConn is true: all connections share the file's page cache.
func (d *fileDevice) MultiConn() bool { return true }

func (d *fileDevice) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d *fileDevice) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	_, err := d.f.WriteAt(p, off)
	return d.settle(ctx, err, fua)
}

func (d *fileDevice) Zero(ctx context.Context, off, n int64, f ZeroFlags) error {
	const keepSize, punchHole, zeroRange = 1, 2, 16
	mode := uint32(keepSize | punchHole)
	if f.NoHole {
		mode = keepSize | zeroRange
	}
	return d.settle(ctx, syscall.Fallocate(int(d.f.Fd()), mode, off, n), f.FUA)
}

func (d *fileDevice) Trim(ctx context.Context, off, n int64, fua bool) error {
	return d.Zero(ctx, off, n, ZeroFlags{FUA: fua})
}

func (d *fileDevice) settle(ctx context.Context, err error, fua bool) error {
	if err != nil || !fua {
		return err
	}
	return d.Flush(ctx)
}

func (d *fileDevice) Flush(context.Context) error { return d.f.Sync() }

func (d *fileDevice) BlockStatus(_ context.Context, off, n int64) ([]Extent, error) {
	const seekData, seekHole = 3, 4
	var extents []Extent
	for at := off; at < off+n; {
		data, err := d.f.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) {
			data = d.size
		} else if err != nil {
			return nil, err
		}
		if data > at {
			end := min(data, off+n)
			extents = append(extents, Extent{Offset: at, Length: end - at, Hole: true, Zero: true})
			at = end
			continue
		}
		hole, err := d.f.Seek(at, seekHole)
		if err != nil {
			return nil, err
		}
		end := min(hole, off+n)
		extents = append(extents, Extent{Offset: at, Length: end - at})
		at = end
	}
	return extents, nil
}

// nullDevice answers at once: for benchmarks, and to be embedded.
type nullDevice struct{ size int64 }

func (d nullDevice) Size() int64                                       { return d.size }
func (nullDevice) ReadAt(context.Context, []byte, int64) error         { return nil }
func (nullDevice) WriteAt(context.Context, []byte, int64, bool) error  { return nil }
func (nullDevice) Zero(context.Context, int64, int64, ZeroFlags) error { return nil }
func (nullDevice) Trim(context.Context, int64, int64, bool) error      { return nil }
func (nullDevice) Flush(context.Context) error                         { return nil }

// serve runs a server of exports on a unix socket until the test ends, and checks that
// nothing keeps it from ending.
func serve(t testing.TB, exports map[string]Export) (*Server, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir's names can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Exports: exports}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, path
}

// connect opens an export of the server at path.
func connect(t testing.TB, path, export string) *Client {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewClient(context.Background(), conn, export)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// pair gives the two ends of a unix stream connection.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = conn.(*net.UnixConn)
		t.Cleanup(func() { conn.Close() })
	}
	return ends[0], ends[1]
}
