package blocksync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wanmig/wanmig/blocksync/nbd"
	"pgregory.net/rapid"
)

// step is one thing the mirror or the link does.
type step struct {
	kind byte // 'w'rite, 'z'ero, 't'rim, 'f'lush, 'c'overed, 'd'rain
	off  int64
	n    int64
	fill byte // content: 0 makes it all zeros
}

func (s step) String() string { return fmt.Sprintf("%c %d+%d/%d", s.kind, s.off, s.n, s.fill) }

func content(s step, serial int) []byte {
	p := make([]byte, s.n)
	if s.fill == 0 {
		return p
	}
	r := rand.New(rand.NewPCG(uint64(serial), uint64(s.fill)))
	for i := 0; i < len(p); i += sectorSize {
		switch s.fill % 3 {
		case 0: // pages of zeros between
			if i/page%2 == 0 {
				continue
			}
			fallthrough
		case 1:
			for j := i; j < i+sectorSize; j++ {
				p[j] = s.fill
			}
			p[i] = byte(r.Uint32())
		case 2:
			for j := i; j < i+sectorSize; j++ {
				p[j] = byte(r.Uint32())
			}
		}
	}
	return p
}

// The target has the mirror's content, whatever is written where, however
// little room there is and whenever the link takes frames.
func TestTargetEqualsModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.Int64Range(1, 3000).Draw(rt, "sectors") * sectorSize
		memory := rapid.Int64Range(0, 6).Draw(rt, "memory") * blockSize
		spool := rapid.Int64Range(0, 6).Draw(rt, "spool") * blockSize
		thin := rapid.Bool().Draw(rt, "thin")
		before := rapid.SampledFrom([]string{"new", "used", "old copy"}).Draw(rt, "before")
		strict := rapid.Bool().Draw(rt, "strict")
		offers := rapid.Bool().Draw(rt, "offers")
		verify := rapid.Bool().Draw(rt, "verify")
		steps := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) step {
			s := step{kind: rapid.SampledFrom([]byte("wwwwwzztfcddd")).Draw(rt, "kind")}
			unit := rapid.SampledFrom([]int64{sectorSize, page, blockSize}).Draw(rt, "unit")
			s.off = min(rapid.Int64Range(0, size/unit).Draw(rt, "offset")*unit, size-sectorSize)
			s.n = min(rapid.Int64Range(1, 40).Draw(rt, "length")*unit, size-s.off)
			s.fill = rapid.Byte().Draw(rt, "fill")
			return s
		}), 1, 60).Draw(rt, "steps")
		var err error
		synctest.Test(t, func(t *testing.T) {
			err = play(t, size, newBudget(t, memory, spool), scene{thin: thin, before: before, strict: strict, offers: offers, verify: verify, steps: steps})
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}

// scene is how a transfer goes.
type scene struct {
	thin, strict, offers, verify bool
	before                       string // what the target's disk is
	spoil                        int    // the write that reaches the disk with an error, if any
	steps                        []step
}

func play(t *testing.T, size int64, b *Budget, s scene) error {
	steps, before := s.steps, s.before
	d := newDisk(size)
	d.spoil = s.spoil
	guest := newDisk(size)
	model := guest.content
	if before == "old copy" {
		older(d.content, steps)
	}
	if before == "used" {
		for i := size / 3 / page * page; i < size; i++ {
			d.content[i] = 0xee
		}
		steps = append([]step{{kind: 'z', n: size}}, steps...)
	}
	var dev nbd.Device = d
	if s.thin {
		dev = thinDisk{d}
	}
	x := newTransfer(t, dev, b)
	if before == "old copy" {
		x.target = NewTarget(dev, newContent(t, size), true)
	}
	x.outbox.Strict(s.strict)
	x.outbox.bulk = s.offers
	if s.verify {
		x.verify(func(context.Context) (Image, error) { return &openDisk{guest}, nil })
	}
	x.frames.tokens = make(chan struct{})
	x.start(t.Context())
	defer x.cancel()

	// until lets the link take a frame whenever nothing else can go on.
	until := func(done *atomic.Bool) {
		for synctest.Wait(); !done.Load(); synctest.Wait() {
			x.frames.tokens <- struct{}{}
		}
	}
	strict := s.strict
	for i, s := range steps {
		var done atomic.Bool
		var err error
		go func() {
			defer done.Store(true)
			switch s.kind {
			case 'w':
				p := content(s, i)
				guest.set(p, s.off)
				err = x.outbox.WriteAt(t.Context(), p, s.off, s.fill%16 == 1)
			case 'z':
				guest.set(make([]byte, s.n), s.off)
				err = x.outbox.Zero(t.Context(), s.off, s.n, nbd.ZeroFlags{NoHole: s.fill%2 == 0})
			case 't':
				guest.set(make([]byte, s.n), s.off)
				err = x.outbox.Trim(t.Context(), s.off, s.n, false)
			case 'f':
				err = x.outbox.Flush(t.Context())
			case 'c':
				x.outbox.Covered()
			case 'd':
				select {
				case x.frames.tokens <- struct{}{}:
				default:
				}
			}
		}()
		until(&done)
		if err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
		if strict && s.kind == 'f' {
			if d.unsynced || !bytes.Equal(d.content, model) {
				return fmt.Errorf("step %d: flush returned before all was durable", i)
			}
		}
		if err := readBack(x.outbox, model); err != nil {
			return fmt.Errorf("step %d %v: %w", i, s, err)
		}
	}
	var done atomic.Bool
	var err error
	go func() { defer done.Store(true); err = x.finish() }()
	until(&done)
	if err != nil {
		return err
	}
	if !bytes.Equal(d.content, model) {
		return errors.New("content differs")
	}
	if d.overlap != "" {
		return fmt.Errorf("writes overlap: %s", d.overlap)
	}
	if d.unsynced {
		return errors.New("not flushed")
	}
	return x.settled()
}

// older makes of p what some of the steps would, and something else where others do.
func older(p []byte, steps []step) {
	for i, s := range steps {
		switch {
		case s.kind == 'w' && s.fill%4 > 0:
			copy(p[s.off:], content(s, i))
		case s.kind == 'z' || s.kind == 'w':
			copy(p[s.off:], fill(int(s.n), 0xdd))
		}
	}
}

// readBack checks that what can be read of the outbox is the newest content.
func readBack(o *Outbox, model []byte) error {
	var p [sectorSize]byte
	for off := int64(0); off < o.Size(); off += 5 * sectorSize {
		err := o.ReadAt(context.Background(), p[:], off)
		if err != nil && !errors.Is(err, syscall.EPERM) {
			return err
		}
		if err == nil && !bytes.Equal(p[:], model[off:off+sectorSize]) {
			return fmt.Errorf("old content at %d", off)
		}
	}
	return nil
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

func mustWrite(t *testing.T, o *Outbox, p []byte, off int64) {
	t.Helper()
	if err := o.WriteAt(t.Context(), p, off, false); err != nil {
		t.Fatal(err)
	}
}

func TestBlockWrittenAgainIsSentOnce(t *testing.T) {
	x := newTransfer(t, newDisk(1<<20), newBudget(t, 1<<20, 0))
	x.frames.keep = true
	for i := range 50 {
		mustWrite(t, x.outbox, fill(blockSize, byte(i+1)), 3*blockSize)
	}
	mustWrite(t, x.outbox, fill(blockSize, 9), 4*blockSize)
	if s := x.outbox.Stats(); s.Coalesced != 49*blockSize || s.Pending() != 2*blockSize {
		t.Errorf("before: %+v", s)
	}
	x.start(t.Context())
	if err := x.finish(); err != nil {
		t.Fatal(err)
	}
	if s := x.outbox.Stats(); s.SentData != 2*blockSize {
		t.Errorf("sent: %+v", s)
	}
	// Adjacent blocks travel as one extent.
	if n := len(x.frames.sent); n != 3 {
		t.Fatalf("%d frames: open, data and barrier expected", n)
	}
	list, n, _, _, err := parseData(nil, x.frames.sent[1][1:], 1<<20)
	if err != nil || len(list) != 1 || list[0] != (extent{3 * blockSize, 2 * blockSize}) || n != 2*blockSize {
		t.Errorf("extents %v, %d bytes, %v", list, n, err)
	}
	if err := x.settled(); err != nil {
		t.Error(err)
	}
}

func TestZerosCostLittle(t *testing.T) {
	const size = 2 << 40
	o := newOutbox(t, size, newBudget(t, 0, 0))
	if err := o.Zero(t.Context(), 0, size, nbd.ZeroFlags{NoHole: true}); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, o, make([]byte, 1<<20), 5<<30)
	s := o.Stats()
	if s.PendingZero != size || s.Pending() != 0 || s.Coalesced != 1<<20 {
		t.Errorf("%+v", s)
	}
	if n := len(o.order.spans) + len(o.blocks); n != 1 {
		t.Errorf("%d entries for one run of zeros", n)
	}
	j := new(job)
	if err := o.take(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	if len(j.zeros) != 1 || j.zeros[0] != (extent{0, size}) {
		t.Errorf("taken %v", j.zeros)
	}
}

func TestZerosAreSkippedOnNewDisk(t *testing.T) {
	d := thinDisk{newDisk(64 << 20)}
	copy(d.content[8<<20+page:], fill(page, 7)) // not new; the status has odd extents
	x := newTransfer(t, d, newBudget(t, 1<<20, 0))
	x.start(t.Context())
	if err := x.outbox.Zero(t.Context(), 0, 64<<20, nbd.ZeroFlags{}); err != nil {
		t.Fatal(err)
	}
	// Content with pages of zeros before, between and after.
	p := make([]byte, 2*blockSize)
	copy(p[page:], fill(100, 1))
	copy(p[blockSize+5*page:], fill(100, 2))
	mustWrite(t, x.outbox, p, 16<<20)
	if err := x.finish(); err != nil {
		t.Fatal(err)
	}
	s := x.target.Stats()
	if s.Written != 2*page || s.Zeroed != 3*page {
		t.Errorf("written %d, zeroed %d: want two pages and, as extents of 3584 bytes have them, three", s.Written, s.Zeroed)
	}
	want := make([]byte, 64<<20)
	copy(want[16<<20:], p)
	if !bytes.Equal(d.content, want) {
		t.Error("content differs")
	}
	if err := x.settled(); err != nil {
		t.Error(err)
	}
}

func TestZeroedAgainIsSkipped(t *testing.T) {
	d := newDisk(1 << 20) // without block status: nothing is known at first
	x := newTransfer(t, d, newBudget(t, 1<<20, 0))
	x.outbox.Strict(true)
	x.start(t.Context())
	for range 3 {
		if err := x.outbox.Zero(t.Context(), 0, 1<<20, nbd.ZeroFlags{FUA: true}); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.finish(); err != nil {
		t.Fatal(err)
	}
	if s := x.target.Stats(); s.Zeroed != 1<<20 || s.Skipped != 2<<20 || d.writes != 1 {
		t.Errorf("%+v, %d writes", s, d.writes)
	}
}

func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTransfer(t, newDisk(1<<20), newBudget(t, 2*blockSize, 3*blockSize))
		for i := range int64(5) {
			mustWrite(t, x.outbox, fill(blockSize, 1), i*blockSize)
		}
		if s := x.outbox.Stats(); s.PendingMemory != 2*blockSize || s.PendingSpool != 3*blockSize {
			t.Errorf("%+v", s)
		}
		var done atomic.Bool
		go func() {
			mustWrite(t, x.outbox, fill(blockSize, 2), 5*blockSize)
			done.Store(true)
		}()
		synctest.Wait()
		if done.Load() {
			t.Error("a write beyond the budget was accepted")
		}
		// What is there may be replaced meanwhile, and a waiting write given up.
		mustWrite(t, x.outbox, fill(blockSize, 3), 4*blockSize)
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("connection lost")
		cancel(gone)
		if err := x.outbox.WriteAt(ctx, fill(blockSize, 4), 6*blockSize, false); !errors.Is(err, gone) {
			t.Errorf("cancelled write: %v", err)
		}
		x.start(t.Context())
		synctest.Wait()
		if !done.Load() {
			t.Error("room did not wake the writer")
		}
		if err := x.finish(); err != nil {
			t.Error(err)
		}
		if err := x.settled(); err != nil {
			t.Error(err)
		}
	})
}

// The mirror's first pass is only a little ahead of the link, and waits for it.
func TestFirstPassIsNotFarAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 64
		x := newTransfer(t, newDisk(n*blockSize), newBudget(t, n*blockSize, 0))
		x.outbox.bulk, x.outbox.bulkRoom = true, 4*blockSize
		var done atomic.Bool
		go func() {
			for i := range int64(n) {
				mustWrite(t, x.outbox, noise(uint64(i), blockSize), i*blockSize)
			}
			x.outbox.Covered()
			done.Store(true)
		}()
		synctest.Wait()
		if p := x.outbox.Stats().PendingMemory; p != 4*blockSize {
			t.Errorf("%d bytes wait, %d may", p, 4*blockSize)
		}
		x.start(t.Context())
		synctest.Wait()
		if !done.Load() {
			t.Error("the mirror waits though nothing is in its way")
		}
		if err := errors.Join(x.finish(), x.settled()); err != nil {
			t.Error(err)
		}
	})
}

func TestBudgetIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(t, blockSize, 0)
		x := newTransfer(t, newDisk(1<<20), b)
		other := newOutbox(t, 1<<20, b)
		mustWrite(t, x.outbox, fill(512, 1), 0)
		var done atomic.Bool
		go func() {
			mustWrite(t, other, fill(512, 1), 0)
			done.Store(true)
		}()
		synctest.Wait()
		if done.Load() {
			t.Error("two disks took the same room")
		}
		x.start(t.Context())
		if err := x.finish(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if !done.Load() {
			t.Error("room of one disk did not reach the other")
		}
	})
}

// faulty is a spool file with a seam.
type faulty struct {
	*os.File
	write, read func(off int64) error
}

func (f *faulty) WriteAt(p []byte, off int64) (int, error) {
	if f.write != nil {
		if err := f.write(off); err != nil {
			n, _ := f.File.WriteAt(p[:len(p)/2], off) // as a full disk does
			return n, err
		}
	}
	return f.File.WriteAt(p, off)
}

func (f *faulty) ReadAt(p []byte, off int64) (int, error) {
	if f.read != nil {
		if err := f.read(off); err != nil {
			return 0, err
		}
	}
	return f.File.ReadAt(p, off)
}

func TestSpoolWithoutSpace(t *testing.T) {
	for name, failing := range map[string]func(n int, off int64) bool{
		"at once":           func(n int, off int64) bool { return true },
		"third block":       func(n int, off int64) bool { return off >= 2*blockSize },
		"every second time": func(n int, off int64) bool { return n%2 == 1 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBudget(t, 2*blockSize, 8*blockSize)
				n := 0
				b.file = &faulty{File: b.file.(*os.File), write: func(off int64) error {
					if n++; failing(n, off) {
						return &os.PathError{Op: "write", Path: "spool", Err: syscall.ENOSPC}
					}
					return nil
				}}
				d := newDisk(2 << 20)
				x := newTransfer(t, d, b)
				want := make([]byte, 2<<20)
				write := func(p []byte, off int64) {
					copy(want[off:], p)
					mustWrite(t, x.outbox, p, off)
				}
				var done atomic.Bool
				go func() {
					for i := range int64(12) {
						write(fill(blockSize, byte(i+1)), i*blockSize)
					}
					for i := range int64(12) { // again, in part
						write(fill(page, byte(i+101)), i*blockSize+page)
					}
					done.Store(true)
				}()
				synctest.Wait()
				if done.Load() {
					t.Error("a full spool did not hold the mirror")
				}
				s := x.outbox.Stats()
				if !errors.Is(s.SpoolProblem, syscall.ENOSPC) || !strings.Contains(s.SpoolProblem.Error(), "spool") {
					t.Errorf("problem in stats: %v", s.SpoolProblem)
				}
				x.start(t.Context())
				synctest.Wait()
				if !done.Load() {
					t.Error("the mirror did not go on")
				}
				if err := x.finish(); err != nil {
					t.Error(err)
				}
				if !bytes.Equal(d.content, want) {
					t.Error("content differs")
				}
			})
		})
	}
}

func TestRewriteOfSpooledBlockFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(t, blockSize, 2*blockSize)
		d := newDisk(1 << 20)
		x := newTransfer(t, d, b)
		want := make([]byte, 1<<20)
		copy(want, append(fill(blockSize, 1), fill(blockSize, 2)...))
		mustWrite(t, x.outbox, want[:2*blockSize], 0)
		b.file = &faulty{File: b.file.(*os.File), write: func(int64) error { return syscall.EIO }}
		var done atomic.Bool
		go func() {
			mustWrite(t, x.outbox, fill(page, 3), blockSize+page)
			done.Store(true)
		}()
		synctest.Wait()
		if done.Load() {
			t.Error("answered without having the content")
		}
		x.start(t.Context())
		synctest.Wait()
		if !done.Load() {
			t.Error("the mirror did not go on when the block was sent")
		}
		if err := x.finish(); err != nil {
			t.Error(err)
		}
		copy(want[blockSize+page:], fill(page, 3))
		if !bytes.Equal(d.content, want) {
			t.Error("content differs")
		}
		if err := x.settled(); err == nil || !strings.Contains(err.Error(), "slots are free") {
			t.Errorf("the bad slot may be used again: %v", err)
		}
	})
}

func TestSpoolCannotBeRead(t *testing.T) {
	b := newBudget(t, blockSize, 2*blockSize)
	b.file = &faulty{File: b.file.(*os.File), read: func(int64) error { return syscall.EIO }}
	x := newTransfer(t, newDisk(1<<20), b)
	mustWrite(t, x.outbox, fill(2*blockSize, 1), 0)
	x.start(t.Context())
	for x.outbox.WriteAt(t.Context(), fill(512, 1), 0, false) == nil {
	}
	x.cancel()
	if err := x.wait(); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "read spool file") {
		t.Errorf("error %v", err)
	}
}

func TestSpoolLeavesNoName(t *testing.T) {
	dir := t.TempDir()
	b, err := NewBudget(0, dir, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("%v, %v", names, err)
	}
	if _, err := NewBudget(0, dir+"/none", 1<<20); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

func TestSeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newTransfer(t, newDisk(1<<20), newBudget(t, blockSize, 0))
		mustWrite(t, x.outbox, fill(512, 1), 0)
		var waiting error
		go func() { waiting = x.outbox.WriteAt(t.Context(), fill(512, 1), blockSize, false) }()
		synctest.Wait()
		x.outbox.Seal()
		x.outbox.Seal()
		synctest.Wait()
		late := x.outbox.Zero(t.Context(), 0, 1<<20, nbd.ZeroFlags{})
		for _, err := range []error{waiting, late} {
			if !errors.Is(err, syscall.ESHUTDOWN) {
				t.Errorf("write after the seal: %v", err)
			}
		}
		if err := x.outbox.Flush(t.Context()); err != nil {
			t.Errorf("flush after the seal: %v", err)
		}
		x.outbox.Strict(true)
		var flushed atomic.Bool
		go func() {
			if err := x.outbox.Flush(t.Context()); err != nil {
				t.Error(err)
			}
			flushed.Store(true)
		}()
		synctest.Wait()
		if flushed.Load() {
			t.Error("strict flush before anything was sent")
		}
		x.start(t.Context())
		if err := x.wait(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if !flushed.Load() {
			t.Error("final barrier did not answer the strict flush")
		}
		if err := x.settled(); err != nil {
			t.Error(err)
		}
	})
}

// What is settled is durable at the destination, while the mirror goes on.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(16 << 20)
		x := newTransfer(t, d, newBudget(t, 1<<20, 0))
		if err := x.outbox.WriteAt(t.Context(), fill(blockSize, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		settled := x.outbox.Settle()
		synctest.Wait()
		if settled() {
			t.Error("settled before anything was sent")
		}
		x.start(t.Context())
		time.Sleep(time.Second)
		synctest.Wait()
		if !settled() {
			t.Error("not settled after a second")
		}
		if err := x.outbox.WriteAt(t.Context(), fill(blockSize, 2), blockSize, false); err != nil {
			t.Fatal(err)
		}
		x.outbox.Seal()
		if err := x.wait(); err != nil {
			t.Error(err)
		}
		if !x.outbox.Settle()() {
			t.Error("a disk that is complete does not settle")
		}
		if err := x.settled(); err != nil {
			t.Error(err)
		}
	})
}

func TestTargetWithoutSpace(t *testing.T) {
	d := newDisk(16 << 20)
	d.limited, d.room = true, 4<<20
	x := newTransfer(t, d, newBudget(t, 1<<20, 0))
	x.start(t.Context())
	var err error
	for off := int64(0); off < 16<<20 && err == nil; off += blockSize {
		err = x.outbox.WriteAt(t.Context(), fill(blockSize, 1), off, false)
	}
	if err == nil {
		x.outbox.Seal()
	}
	x.ended.Wait()
	x.cancel()
	if !errors.Is(x.targetErr, syscall.ENOSPC) {
		t.Errorf("target: %v", x.targetErr)
	}
	if x.sendErr == nil || !strings.Contains(x.sendErr.Error(), "no space left on device") || !strings.Contains(x.sendErr.Error(), "free space") {
		t.Errorf("operator at the source reads: %v", x.sendErr)
	}
	if err := x.outbox.WriteAt(t.Context(), fill(512, 1), 0, false); !errors.Is(err, syscall.EIO) {
		t.Errorf("write after the failure: %v", err)
	}
	select {
	case <-x.target.Durable():
		t.Error("durable after a failure")
	default:
	}
}

func TestSizesMustMatch(t *testing.T) {
	x := newTransfer(t, newDisk(1<<20), newBudget(t, 1<<20, 0))
	x.outbox = newOutbox(t, 2<<20, x.budget)
	x.start(t.Context())
	err := x.wait()
	if !errors.Is(x.targetErr, ErrFrame) || err == nil || !strings.Contains(err.Error(), "2097152") {
		t.Errorf("target: %v, source: %v", x.targetErr, err)
	}
}

func TestChannelEnds(t *testing.T) {
	x := newTransfer(t, newDisk(1<<20), newBudget(t, 1<<20, 0))
	close(x.acks.frames)
	if err := x.outbox.Run(t.Context(), x.frames, x.acks); err == nil || !strings.Contains(err.Error(), "unexpected EOF") {
		t.Errorf("outbox: %v", err)
	}
	if err := x.outbox.WriteAt(t.Context(), fill(512, 1), 0, false); !errors.Is(err, syscall.EIO) {
		t.Errorf("write: %v", err)
	}
	close(x.frames.frames)
	if err := x.target.Run(t.Context(), x.frames, newPipe()); err == nil || !strings.Contains(err.Error(), "unexpected EOF") {
		t.Errorf("target: %v", err)
	}
}

func TestRequestsOutsideTheDisk(t *testing.T) {
	o := newOutbox(t, 1<<20, newBudget(t, 1<<20, 0))
	for _, e := range []extent{{-512, 512}, {1 << 20, 512}, {0, 1<<20 + 512}, {1, 512}, {0, 511}, {1 << 62, 1 << 62}} {
		if err := o.Zero(t.Context(), e.offset, e.length, nbd.ZeroFlags{}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("zero %v: %v", e, err)
		}
	}
	if err := o.ReadAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("read: %v", err)
	}
	for _, size := range []int64{0, -512, 513} {
		if _, err := NewOutbox(size, nil); err == nil {
			t.Errorf("disk of %d bytes", size)
		}
	}
}

func BenchmarkTransfer(b *testing.B) {
	const size = 64 << 20
	kinds := map[string][]byte{"zeros": make([]byte, size), "noise": make([]byte, size), "numbers": make([]byte, 0, size)}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range kinds["noise"] {
		kinds["noise"][i] = byte(r.Uint32())
	}
	for i := 0; len(kinds["numbers"]) < size-32; i++ {
		kinds["numbers"] = fmt.Appendf(kinds["numbers"], "%d %d\n", i, r.IntN(1000))
	}
	kinds["numbers"] = kinds["numbers"][:size]
	for name, p := range kinds {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			var wire int64
			for b.Loop() {
				budget, err := NewBudget(16<<20, "", 0)
				if err != nil {
					b.Fatal(err)
				}
				x := newTransfer(b, thinDisk{newDisk(size)}, budget)
				x.start(b.Context())
				for off := int64(0); off < size; off += 1 << 20 {
					if err := x.outbox.WriteAt(b.Context(), p[off:off+1<<20], off, false); err != nil {
						b.Fatal(err)
					}
				}
				if err := x.finish(); err != nil {
					b.Fatal(err)
				}
				wire = x.outbox.Stats().Wire
			}
			b.ReportMetric(size/float64(max(wire, 1)), "ratio")
		})
	}
}

// While a writer is in the spool file, without the mutex, others come by.
func TestSlowSpool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(t, blockSize, 8*blockSize)
		d := newDisk(1 << 20)
		x := newTransfer(t, d, b)
		want := make([]byte, 1<<20)
		write := func(p []byte, off int64) {
			copy(want[off:], p)
			mustWrite(t, x.outbox, p, off)
		}
		write(fill(3*blockSize, 1), 0) // the last two in the spool

		gate := make(chan struct{})
		b.file = &faulty{File: b.file.(*os.File), write: func(int64) error { <-gate; return nil }}
		go write(fill(page, 2), 2*blockSize)      // again, in its slot
		go write(fill(page, 3), 4*blockSize)      // two new parts of one block
		go write(fill(page, 4), 4*blockSize+page) //
		go write(fill(page, 5), 5*blockSize)      // a new part, and zeros under it
		synctest.Wait()
		if err := x.outbox.Zero(t.Context(), 5*blockSize, blockSize, nbd.ZeroFlags{}); err != nil {
			t.Error(err)
		}
		x.start(t.Context())
		synctest.Wait()
		if got := x.outbox.Stats().PendingSpool; got != blockSize {
			t.Errorf("%d bytes wait in the spool: a block was taken from under its writer", got)
		}
		close(gate)
		synctest.Wait()
		if err := x.finish(); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(d.content, want) {
			t.Error("content differs")
		}
		if err := x.settled(); err != nil {
			t.Error(err)
		}
	})
}
