package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"pgregory.net/rapid"
)

var ctxb = context.Background()

// TestRandomOperations compares a device behind client and server with a plain slice.
func TestRandomOperations(t *testing.T) {
	const size = 40 * memBlock
	rapid.Check(t, func(rt *rapid.T) {
		device := newMemDevice(size)
		device.sizes = &blockSizes{
			min:       rapid.SampledFrom([]uint32{1, 512, 4096}).Draw(rt, "min"),
			preferred: 4096,
			max:       rapid.SampledFrom([]uint32{4096, 8192, maxData}).Draw(rt, "max"),
		}
		a, b := pair(t)
		s := &Server{Exports: map[string]Export{"d": {Device: device}}}
		var served sync.WaitGroup
		served.Go(func() { s.serveConn(ctxb, a) })
		defer served.Wait()
		c, err := NewClient(ctxb, b, "d")
		if err != nil {
			rt.Fatal(err)
		}
		defer c.Close()

		model := make([]byte, size)
		block := int64(device.sizes.min)
		span := func(rt *rapid.T) (off, n int64) {
			off = rapid.Int64Range(0, size/block).Draw(rt, "off") * block
			return off, rapid.Int64Range(0, (size-off)/block).Draw(rt, "n") * block
		}
		ok := func(rt *rapid.T, err error) {
			if err != nil {
				rt.Fatal(err)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off, n := span(rt)
				p := bytes.Repeat([]byte{rapid.Byte().Draw(rt, "byte")}, int(n))
				ok(rt, c.WriteAt(ctxb, p, off, rapid.Bool().Draw(rt, "fua")))
				copy(model[off:], p)
			},
			"zero": func(rt *rapid.T) {
				off, n := span(rt)
				ok(rt, c.Zero(ctxb, off, n, ZeroFlags{FUA: rapid.Bool().Draw(rt, "fua"), NoHole: rapid.Bool().Draw(rt, "nohole")}))
				clear(model[off : off+n])
			},
			"trim": func(rt *rapid.T) {
				off, n := span(rt)
				ok(rt, c.Trim(ctxb, off, n, rapid.Bool().Draw(rt, "fua")))
				clear(model[off : off+n]) // what memDevice makes of it
			},
			"flush": func(rt *rapid.T) { ok(rt, c.Flush(ctxb)) },
			"read": func(rt *rapid.T) {
				off, n := span(rt)
				p := bytes.Repeat([]byte{0xee}, int(n))
				ok(rt, c.ReadAt(ctxb, p, off))
				if !bytes.Equal(p, model[off:off+n]) {
					rt.Fatalf("%d bytes at %d differ from what was written", n, off)
				}
			},
			"status": func(rt *rapid.T) {
				off, n := span(rt)
				for at := off; at < off+n; {
					extents, err := c.BlockStatus(ctxb, at, off+n-at)
					ok(rt, err)
					if len(extents) == 0 {
						rt.Fatal("no extents")
					}
					for _, e := range extents {
						if e.Offset != at || e.Length <= 0 || at+e.Length > off+n {
							rt.Fatalf("extent %+v at %d, up to %d", e, at, off+n)
						}
						if e.Zero && len(bytes.Trim(model[at:at+e.Length], "\x00")) != 0 {
							rt.Fatalf("extent %+v is not zero", e)
						}
						for b := (at + memBlock - 1) / memBlock; (b+1)*memBlock <= at+e.Length; b++ {
							if device.isAllocated(b) == e.Hole {
								rt.Fatalf("extent %+v, but block %d allocated is %v", e, b, !e.Hole)
							}
						}
						at += e.Length
					}
				}
			},
		})
	})
}

func TestExportedInformation(t *testing.T) {
	device := newMemDevice(8 << 20)
	device.sizes = &blockSizes{min: 512, preferred: 65536, max: 1 << 20}
	device.multiConn = true
	_, path := serve(t, map[string]Export{
		"disk": {Device: device},
		"cd":   {Device: nullDevice{size: 1 << 40}, ReadOnly: true},
	})
	disk, cd := connect(t, path, "disk"), connect(t, path, "cd")
	if disk.Size() != 8<<20 || disk.ReadOnly() || !disk.MultiConn() || !disk.HasBlockStatus() || disk.sizes != *device.sizes {
		t.Errorf("disk: %d bytes, read-only %v, multi-conn %v, block status %v, sizes %v",
			disk.Size(), disk.ReadOnly(), disk.MultiConn(), disk.HasBlockStatus(), disk.sizes)
	}
	if cd.Size() != 1<<40 || !cd.ReadOnly() || cd.MultiConn() || cd.HasBlockStatus() || cd.sizes != defaultBlockSizes {
		t.Errorf("cd: %d bytes, read-only %v, multi-conn %v, block status %v, sizes %v",
			cd.Size(), cd.ReadOnly(), cd.MultiConn(), cd.HasBlockStatus(), cd.sizes)
	}

	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = NewClient(ctxb, conn, "floppy")
	if !errors.Is(err, ErrUnknownExport) || !strings.Contains(err.Error(), `"floppy"`) {
		t.Errorf("unknown export: %v", err)
	}
}

func TestRangesAndSplitting(t *testing.T) {
	device := newMemDevice(64 << 10)
	device.sizes = &blockSizes{min: 512, preferred: 4096, max: 4096}
	_, path := serve(t, map[string]Export{
		"disk": {Device: device},
		"cd":   {Device: newMemDevice(64 << 10), ReadOnly: true},
	})
	c, cd := connect(t, path, "disk"), connect(t, path, "cd")
	for name, r := range map[string]struct {
		err  error
		want syscall.Errno
	}{
		"unaligned offset": {c.WriteAt(ctxb, make([]byte, 512), 1, false), syscall.EINVAL},
		"unaligned length": {c.ReadAt(ctxb, make([]byte, 511), 0), syscall.EINVAL},
		"unaligned zero":   {c.Zero(ctxb, 0, 5, ZeroFlags{}), syscall.EINVAL},
		"beyond the end":   {c.WriteAt(ctxb, make([]byte, 1024), 64<<10-512, false), syscall.EINVAL},
		"negative offset":  {c.ReadAt(ctxb, make([]byte, 512), -512), syscall.EINVAL},
		"overflow":         {c.Trim(ctxb, 512, 1<<63-512, false), syscall.EINVAL},
		"read-only write":  {cd.WriteAt(ctxb, make([]byte, 512), 0, false), syscall.EPERM},
		"read-only zero":   {cd.Zero(ctxb, 0, 512, ZeroFlags{}), syscall.EPERM},
		"read-only trim":   {cd.Trim(ctxb, 0, 512, false), syscall.EPERM},
	} {
		if !errors.Is(r.err, r.want) {
			t.Errorf("%s: %v, want %v", name, r.err, r.want)
		}
	}
	if got := device.operations(); len(got) != 0 {
		t.Errorf("refused operations reach the device: %v", got)
	}

	data := make([]byte, 10<<10)
	for _, err := range []error{
		c.WriteAt(ctxb, data, 512, true), c.ReadAt(ctxb, data, 0), c.ReadAt(ctxb, nil, 0),
		c.Zero(ctxb, 0, 9<<10, ZeroFlags{FUA: true}), c.Zero(ctxb, 0, 512, ZeroFlags{NoHole: true}),
		c.Trim(ctxb, 512, 512, true), c.Flush(ctxb),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []string{
		"write 512+4096 fua=true", "write 4608+4096 fua=true", "write 8704+2048 fua=true",
		"read 0+4096", "read 4096+4096", "read 8192+2048",
		"zero 0+4096 fua=true nohole=false", "zero 4096+4096 fua=true nohole=false", "zero 8192+1024 fua=true nohole=false",
		"zero 0+512 fua=false nohole=true", "trim 512+512 fua=true", "flush",
	}
	if got := device.operations(); !reflect.DeepEqual(got, want) {
		t.Errorf("device saw %q, want %q", got, want)
	}
}

// TestServerRefusals sends what the client's methods never would.
func TestServerRefusals(t *testing.T) {
	device := newMemDevice(64 << 10)
	device.sizes = &blockSizes{min: 512, preferred: 4096, max: 8192}
	_, path := serve(t, map[string]Export{
		"disk": {Device: device},
		"cd":   {Device: newMemDevice(64 << 10), ReadOnly: true},
		"null": {Device: nullDevice{size: 1 << 20}},
	})
	disk, cd, null := connect(t, path, "disk"), connect(t, path, "cd"), connect(t, path, "null")
	payload := make([]byte, 16<<10)
	for name, r := range map[string]struct {
		c    *Client
		q    call
		want syscall.Errno
	}{
		"unknown command":         {disk, call{cmd: 99}, syscall.EINVAL},
		"unknown flag":            {disk, call{cmd: cmdTrim, flags: 1 << 9, length: 512}, syscall.EINVAL},
		"fast zero":               {disk, call{cmd: cmdWriteZeroes, flags: 1 << 4, length: 512}, syscall.EINVAL},
		"no-hole on a write":      {disk, call{cmd: cmdWrite, flags: cmdFlagNoHole, length: 512, data: payload[:512]}, syscall.EINVAL},
		"empty read":              {disk, call{cmd: cmdRead}, syscall.EINVAL},
		"read beyond the end":     {disk, call{cmd: cmdRead, offset: 64 << 10, length: 512}, syscall.EINVAL},
		"read far beyond the end": {disk, call{cmd: cmdRead, offset: -512, length: 512}, syscall.EINVAL},
		"write beyond the end":    {disk, call{cmd: cmdWrite, offset: 64<<10 - 512, length: 1024, data: payload[:1024]}, syscall.ENOSPC},
		"zero beyond the end":     {disk, call{cmd: cmdWriteZeroes, length: 1<<32 - 512}, syscall.ENOSPC},
		"trim beyond the end":     {disk, call{cmd: cmdTrim, length: 1<<32 - 512}, syscall.EINVAL},
		"unaligned":               {disk, call{cmd: cmdWrite, length: 513, data: payload[:513]}, syscall.EINVAL},
		"above the maximum":       {disk, call{cmd: cmdWrite, length: 16 << 10, data: payload}, syscall.EINVAL},
		"read above the maximum":  {disk, call{cmd: cmdRead, length: 16 << 10}, syscall.EINVAL},
		"flush of a range":        {disk, call{cmd: cmdFlush, length: 512}, syscall.EINVAL},
		"read-only write":         {cd, call{cmd: cmdWrite, length: 512, data: payload[:512]}, syscall.EPERM},
		"read-only zero":          {cd, call{cmd: cmdWriteZeroes, length: 512}, syscall.EPERM},
		"read-only trim":          {cd, call{cmd: cmdTrim, length: 512}, syscall.EPERM},
		"status not agreed":       {null, call{cmd: cmdBlockStatus, length: 512}, syscall.EINVAL},
	} {
		if _, err := r.c.do(ctxb, &r.q); !errors.Is(err, r.want) {
			t.Errorf("%s: %v, want %v", name, err, r.want)
		}
	}
	if got := device.operations(); len(got) != 0 {
		t.Errorf("refused requests reach the device: %v", got)
	}
	if _, err := disk.do(ctxb, &call{cmd: cmdCache, length: 512}); err != nil {
		t.Errorf("cache: %v", err)
	}
	one, err := disk.do(ctxb, &call{cmd: cmdBlockStatus, flags: cmdFlagReqOne, length: 64 << 10})
	if err != nil || len(one) != 1 || one[0].Length != 64<<10 || !one[0].Hole {
		t.Errorf("status of one extent: %v, %v", one, err)
	}
	// The connections survived all that.
	for _, c := range []*Client{disk, cd, null} {
		if err := c.ReadAt(ctxb, make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	}
}

func TestDeviceErrors(t *testing.T) {
	device := newMemDevice(64 << 10)
	device.before = func(_ context.Context, cmd command) error {
		return fmt.Errorf("outbox of disk 7, %v: %w", cmd, syscall.ENOSPC)
	}
	_, path := serve(t, map[string]Export{"disk": {Device: device}})
	c := connect(t, path, "disk")
	p := make([]byte, 512)
	_, statusErr := c.BlockStatus(ctxb, 0, 512)
	for what, err := range map[string]error{
		"read": c.ReadAt(ctxb, p, 0), "write": c.WriteAt(ctxb, p, 0, false), "zero": c.Zero(ctxb, 0, 512, ZeroFlags{}),
		"trim": c.Trim(ctxb, 0, 512, false), "flush": c.Flush(ctxb), "block status": statusErr,
	} {
		if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "outbox of disk 7, "+what) ||
			!strings.Contains(err.Error(), `nbd export "disk": `+what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestConcurrentCalls has many calls in flight; each goroutine owns a part of the disk.
func TestConcurrentCalls(t *testing.T) {
	const workers, part = 24, 64 << 10
	device := newMemDevice(workers * part)
	_, path := serve(t, map[string]Export{"disk": {Device: device}})
	c := connect(t, path, "disk")
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(w)))
			model, p := make([]byte, part), make([]byte, part)
			for range 60 {
				off := r.IntN(part)
				n := r.IntN(part-off) + 1
				var err error
				if r.IntN(2) == 0 {
					for i := range n {
						model[off+i] = byte(r.Uint32())
					}
					err = c.WriteAt(ctxb, model[off:off+n], int64(w*part+off), false)
				} else {
					err = c.ReadAt(ctxb, p[:n], int64(w*part+off))
					if err == nil && !bytes.Equal(p[:n], model[off:off+n]) {
						err = fmt.Errorf("worker %d reads something else than it wrote", w)
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestInFlightBounds offers a server more than it may take on at once.
func TestInFlightBounds(t *testing.T) {
	for name, c := range map[string]struct{ requests, length, most int }{
		"requests": {40, 4096, maxInFlight},
		"bytes":    {3, maxData, maxInFlightBytes / maxData},
	} {
		t.Run(name, func(t *testing.T) {
			var now, peak atomic.Int64
			entered, release := make(chan struct{}, c.requests), make(chan struct{})
			device := newMemDevice(maxData)
			device.before = func(context.Context, command) error {
				n := now.Add(1)
				for old := peak.Load(); n > old && !peak.CompareAndSwap(old, n); old = peak.Load() {
				}
				entered <- struct{}{}
				<-release
				now.Add(-1)
				return nil
			}
			_, path := serve(t, map[string]Export{"disk": {Device: device}})
			client := connect(t, path, "disk")
			p := make([]byte, c.length)
			var wg sync.WaitGroup
			for range c.requests {
				wg.Go(func() {
					if err := client.WriteAt(ctxb, p, 0, false); err != nil {
						t.Error(err)
					}
				})
			}
			for range c.most {
				<-entered
			}
			close(release)
			wg.Wait()
			if peak.Load() != int64(c.most) {
				t.Errorf("%d requests at once, want %d", peak.Load(), c.most)
			}
		})
	}
}

// gate makes a device's operations of one kind wait.
func gate(d *memDevice, gated command) (entered, release chan struct{}) {
	entered, release = make(chan struct{}, 100), make(chan struct{})
	d.before = func(ctx context.Context, cmd command) error {
		if cmd != gated {
			return nil
		}
		entered <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return entered, release
}

func TestCancelledCallLeavesConnection(t *testing.T) {
	device := newMemDevice(64 << 10)
	entered, release := gate(device, cmdRead)
	_, path := serve(t, map[string]Export{"disk": {Device: device}})
	c := connect(t, path, "disk")
	ctx, cancel := context.WithCancel(ctxb)
	result := make(chan error)
	p := bytes.Repeat([]byte{0xee}, 4096)
	go func() { result <- c.ReadAt(ctx, p, 0) }()
	<-entered
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled read: %v", err)
	}
	if err := c.WriteAt(ctxb, []byte("still here"), 0, false); err != nil {
		t.Fatalf("write after a cancelled read: %v", err)
	}
	close(release)
	q := make([]byte, 10)
	if err := c.ReadAt(ctxb, q, 0); err != nil || string(q) != "still here" {
		t.Fatalf("read after a cancelled read: %q, %v", q, err)
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{0xee}, 4096)) {
		t.Error("the buffer of a cancelled read was written to")
	}
	if err := c.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("flush with an ended context: %v", err)
	}
}

// TestCancelledHalfway cancels a read whose data has begun to come, and a write that is half
// sent: both cost the connection, and return.
func TestCancelledHalfway(t *testing.T) {
	stalled := func(t *testing.T) (*Client, net.Conn) {
		server, conn := pair(t)
		opened := make(chan *Client)
		go func() {
			c, err := NewClient(ctxb, conn, "disk")
			if err != nil {
				t.Error(err)
			}
			opened <- c
		}()
		oldServer{flags: flagHasFlags}.greet(t, server)
		c := <-opened
		t.Cleanup(func() { c.Close() })
		return c, server
	}
	check := func(t *testing.T, c *Client, err error) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled call: %v", err)
		}
		err = c.ReadAt(ctxb, make([]byte, 1), 0)
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `nbd export "disk"`) {
			t.Errorf("call on a lost connection: %v", err)
		}
	}
	t.Run("read", func(t *testing.T) {
		c, server := stalled(t)
		ctx, cancel := context.WithCancel(ctxb)
		result := make(chan error)
		p := make([]byte, 4096)
		go func() { result <- c.ReadAt(ctx, p, 0) }()
		var header [requestSize]byte
		if _, err := io.ReadFull(server, header[:]); err != nil {
			t.Fatal(err)
		}
		req, err := parseRequest(&header)
		if err != nil {
			t.Fatal(err)
		}
		server.Write(append(appendSimpleReply(nil, 0, req.cookie), make([]byte, 100)...))
		for filling := false; !filling; { // until the client has begun
			c.mu.Lock()
			filling = c.pending[req.cookie].filling
			c.mu.Unlock()
		}
		cancel()
		check(t, c, <-result)
	})
	t.Run("write", func(t *testing.T) {
		c, server := stalled(t)
		ctx, cancel := context.WithCancel(ctxb)
		result := make(chan error)
		go func() { result <- c.WriteAt(ctx, make([]byte, 16<<20), 0, false) }()
		if _, err := io.ReadFull(server, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		cancel()
		check(t, c, <-result)
	})
}

func TestLostConnection(t *testing.T) {
	device := newMemDevice(64 << 10)
	entered, _ := gate(device, cmdWrite)
	l, err := net.Listen("unix", "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctxb)
	served := make(chan error)
	s := &Server{Exports: map[string]Export{"disk": {Device: device}}}
	go func() { served <- s.Serve(ctx, l) }()
	c := connect(t, l.Addr().String(), "disk")
	results := make(chan error)
	for range 8 {
		go func() { results <- c.WriteAt(ctxb, make([]byte, 512), 0, false) }()
	}
	for range 8 {
		<-entered
	}
	cancel() // also ends what the device is doing
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Errorf("Serve: %v", err)
	}
	for range 8 {
		// The device's answer to the cancellation may still get through.
		err := <-results
		if err == nil || !strings.Contains(err.Error(), `nbd export "disk": write 512 bytes at 0: `) ||
			!errors.Is(err, syscall.ESHUTDOWN) && !strings.Contains(err.Error(), "connection lost") {
			t.Errorf("call in flight: %v", err)
		}
	}
	if err := c.Flush(ctxb); err == nil || !strings.Contains(err.Error(), `nbd export "disk": flush: connection lost`) {
		t.Errorf("later call: %v", err)
	}
	if got := device.operations(); len(got) != 0 {
		t.Errorf("cancelled operations were done: %v", got)
	}
}

func TestServerClose(t *testing.T) {
	device := newMemDevice(64 << 10)
	entered, release := gate(device, cmdWrite)
	l, err := net.Listen("unix", "")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Exports: map[string]Export{"disk": {Device: device}}}
	served, closed := make(chan error), make(chan struct{})
	go func() { served <- s.Serve(ctxb, l) }()
	busy, idle := connect(t, l.Addr().String(), "disk"), connect(t, l.Addr().String(), "disk")
	silent, err := net.Dial("unix", l.Addr().String()) // stays in the handshake
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := io.ReadFull(silent, make([]byte, 18)); err != nil {
		t.Fatal(err)
	}
	result := make(chan error)
	go func() { result <- busy.WriteAt(ctxb, []byte("last words"), 0, false) }()
	<-entered
	go func() { s.Close(); close(closed) }()
	if err := idle.waitLost(); err == nil {
		t.Error("the idle connection is not closed")
	}
	select {
	case <-closed:
		t.Error("Close returns before the write is done")
	default:
	}
	close(release)
	if err := <-result; err != nil {
		t.Errorf("write in progress: %v", err)
	}
	<-closed
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if got := device.operations(); !slices.Contains(got, "write 0+10 fua=false") {
		t.Errorf("device saw %v", got)
	}
	l, err = net.Listen("unix", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(ctxb, l); err != nil {
		t.Errorf("Serve after Close: %v", err)
	}
}

// waitLost waits for the end of the connection and gives its cause.
func (c *Client) waitLost() error {
	c.reader.Wait()
	return c.Flush(ctxb)
}

func TestClientClose(t *testing.T) {
	device := newMemDevice(64 << 10)
	entered, release := gate(device, cmdRead)
	defer close(release)
	_, path := serve(t, map[string]Export{"disk": {Device: device}})
	c := connect(t, path, "disk")
	result := make(chan error)
	go func() { result <- c.ReadAt(ctxb, make([]byte, 512), 0) }()
	<-entered
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Errorf("call in progress: %v", err)
	}
	if err := c.Flush(ctxb); !errors.Is(err, ErrClosed) {
		t.Errorf("call after Close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestHandshakeCancelled(t *testing.T) {
	_, conn := pair(t) // a server that never says a word
	ctx, cancel := context.WithCancel(ctxb)
	result := make(chan error)
	go func() {
		_, err := NewClient(ctx, conn, "disk")
		result <- err
	}()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("NewClient: %v", err)
	}
}

func TestBadExports(t *testing.T) {
	sized := func(size int, s blockSizes) Device {
		d := newMemDevice(size)
		d.sizes = &s
		return d
	}
	for name, exports := range map[string]map[string]Export{
		"name":    {"a\x00": {Device: newMemDevice(512)}},
		"sizes":   {"a": {Device: sized(512, blockSizes{3, 512, 512})}},
		"maximum": {"a": {Device: sized(512, blockSizes{1, 512, 64 << 20})}},
		"odd end": {"a": {Device: sized(513, blockSizes{512, 512, 512})}},
	} {
		l, err := net.Listen("unix", "")
		if err != nil {
			t.Fatal(err)
		}
		if err := (&Server{Exports: exports}).Serve(ctxb, l); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: the listener stays open", name)
		}
	}
}

// oldServer is the least a server can be: newstyle without options, and simple replies.
type oldServer struct{ flags uint16 }

const oldServerSize = 32 << 20

func (o oldServer) greet(t *testing.T, conn net.Conn) {
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	conn.Write(append(b, 0, 0))
	var asked [4 + optionHeaderSize + len("disk")]byte
	if _, err := io.ReadFull(conn, asked[:]); err != nil {
		t.Error(err)
	}
	want := append(appendOptionHeader(make([]byte, 4), optExportName, 4), "disk"...)
	if !bytes.Equal(asked[:], want) {
		t.Errorf("client says %x, want %x", asked, want)
	}
	b = binary.BigEndian.AppendUint64(nil, oldServerSize)
	b = binary.BigEndian.AppendUint16(b, o.flags)
	conn.Write(append(b, make([]byte, 124)...))
}

// serve answers reads, writes and flushes, and gives what it was asked.
func (o oldServer) serve(t *testing.T, conn net.Conn) (asked []string) {
	defer conn.Close()
	o.greet(t, conn)
	disk := bytes.Repeat([]byte{0xee}, oldServerSize)
	for {
		var header [requestSize]byte
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			t.Errorf("client left without goodbye: %v", err)
			return asked
		}
		r, err := parseRequest(&header)
		if err != nil {
			t.Error(err)
			return asked
		}
		asked = append(asked, fmt.Sprintf("%v %d+%d flags=%d", r.cmd, r.offset, r.length, r.flags))
		reply := appendSimpleReply(nil, 0, r.cookie)
		switch r.cmd {
		case cmdRead:
			reply = append(reply, disk[r.offset:][:r.length]...)
		case cmdWrite:
			if _, err := io.ReadFull(conn, disk[r.offset:][:r.length]); err != nil {
				t.Error(err)
			}
		case cmdDisc:
			return asked
		}
		conn.Write(reply)
	}
}

func TestOldServer(t *testing.T) {
	server, conn := pair(t)
	asked := make(chan []string)
	go func() { asked <- oldServer{flagHasFlags | flagFlush}.serve(t, server) }()
	c, err := NewClient(ctxb, conn, "disk")
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1000)
	status, err := c.BlockStatus(ctxb, 10, 1<<20)
	if err != nil || !reflect.DeepEqual(status, []Extent{{Offset: 10, Length: 1 << 20}}) {
		t.Errorf("block status: %v, %v", status, err)
	}
	for _, err := range []error{
		c.WriteAt(ctxb, []byte("hello"), 7, true), c.Zero(ctxb, 12, int64(len(zeros))+5, ZeroFlags{FUA: true}),
		c.Trim(ctxb, 0, 512, true), c.ReadAt(ctxb, p, 0), c.Close(),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	want := []string{
		"write 7+5 flags=0", "flush 0+0 flags=0", "write 12+262144 flags=0", "write 262156+5 flags=0", "flush 0+0 flags=0",
		"read 0+1000 flags=0", "disconnect 0+0 flags=0",
	}
	if got := <-asked; !reflect.DeepEqual(got, want) {
		t.Errorf("server was asked %q, want %q", got, want)
	}
	if want := append(append(bytes.Repeat([]byte{0xee}, 7), "hello"...), make([]byte, 988)...); !bytes.Equal(p, want) {
		t.Errorf("read %q", p)
	}
}

func TestNoFlushOffered(t *testing.T) {
	server, conn := pair(t)
	served := make(chan []string)
	go func() { served <- oldServer{flagHasFlags}.serve(t, server) }()
	c, err := NewClient(ctxb, conn, "disk")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{c.Flush(ctxb), c.WriteAt(ctxb, []byte("x"), 0, true)} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("durability that the server does not offer: %v", err)
		}
	}
	c.Close()
	<-served
}
