package blocksync

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// A storage that spoils a write is found out, whenever and wherever that is,
// unless the guest has written there again.
func TestVerifyFindsWhatIsSpoiled(t *testing.T) {
	found := 0
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.Int64Range(1, 6000).Draw(rt, "sectors") * sectorSize
		s := scene{verify: true, before: "used",
			thin:   rapid.Bool().Draw(rt, "thin"),
			offers: rapid.Bool().Draw(rt, "offers"),
			spoil:  rapid.IntRange(1, 20).Draw(rt, "spoil")}
		for i := range rapid.IntRange(1, 20).Draw(rt, "steps") {
			off := rapid.Int64Range(0, size/sectorSize-1).Draw(rt, "offset") * sectorSize
			n := min(rapid.Int64Range(1, 300).Draw(rt, "length")*sectorSize, size-off)
			s.steps = append(s.steps, step{kind: "wwz"[i%3], off: off, n: n, fill: byte(1 + i)})
		}
		var err error
		synctest.Test(t, func(t *testing.T) { err = play(t, size, newBudget(t, 4<<20, 0), s) })
		switch {
		case err == nil: // play has compared
		case strings.Contains(err.Error(), ErrDiffers.Error()):
			found++
		default:
			rt.Fatal(err)
		}
	})
	if found == 0 {
		t.Error("nothing was ever found")
	}
}

// What the guest writes meanwhile, and the mirror copies late, is compared again:
// only little of it when the guest is stopped.
func TestVerifyOfAWritingGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 40*segment + 512
		guest, d := newDisk(size), newDisk(size)
		x := newTransfer(t, d, newBudget(t, 8<<20, 0))
		opened := 0
		x.verify(func(context.Context) (Image, error) { opened++; return &openDisk{guest}, nil })
		x.outbox.bulk = true
		x.start(t.Context())
		r := rand.New(rand.NewPCG(1, 2))
		write := func(off int64) func() {
			p := noise(r.Uint64(), page)
			guest.set(p, off)
			return func() { mustWrite(t, x.outbox, p, off) }
		}
		for i := range int64(30) {
			write(i * segment)()
		}
		synctest.Wait()
		if x.outbox.Verified() || opened > 0 {
			t.Error("compared before the disk is covered")
		}
		x.outbox.Covered()
		for range 50 { // the mirror is behind the guest by 150 ms
			mirror := write(r.Int64N(4) * segment)
			time.Sleep(150 * time.Millisecond)
			mirror()
		}
		synctest.Wait()
		if s := x.outbox.Stats(); !x.outbox.Verified() || s.Verified < 37*segment {
			t.Errorf("%d of %d segments are agreed on", s.Verified/segment, size/segment)
		}
		write(7 * segment)()
		if err := x.finish(); err != nil {
			t.Fatal(err)
		}
		if s := x.outbox.Stats(); s.Verified != size || s.VerifiedLast > 5*segment {
			t.Errorf("%d of %d bytes are the same in the end, %d were compared when the guest was stopped", s.Verified, size, s.VerifiedLast)
		}
		if err := x.settled(); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(d.content, guest.content) {
			t.Error("content differs")
		}
	})
}

// A disk that the mirror did not copy all of is found out, and so is one that
// can't be read.
func TestVerifyOfTheSource(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(guest *disk) (Image, error)
		says  string
	}{
		"not copied": {func(guest *disk) (Image, error) { guest.set([]byte{1}, 3*segment+5); return &openDisk{guest}, nil }, "at 3145728"},
		"shorter":    {func(*disk) (Image, error) { return &openDisk{newDisk(segment)}, nil }, "1048576"},
		"unreadable": {func(*disk) (Image, error) { return nil, errors.New("no such image") }, "no such image"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				guest, d := newDisk(4*segment), newDisk(4*segment)
				x := newTransfer(t, d, newBudget(t, 1<<20, 0))
				x.verify(func(context.Context) (Image, error) { return tt.spoil(guest) })
				x.start(t.Context())
				guest.set(fill(page, 1), 0)
				mustWrite(t, x.outbox, fill(page, 1), 0)
				time.Sleep(time.Minute)
				x.outbox.Seal()
				time.Sleep(time.Minute)
				x.cancel()
				if err := errors.Join(x.wait(), x.verifyErr); err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%v: want %q", err, tt.says)
				}
			})
		})
	}
}

// A source that leaves a segment out does not get its disk called complete.
func TestEverySegmentIsCompared(t *testing.T) {
	zeros := func(i int64) check { return check{i, zeroSegment} }
	open := appendOpen(nil, testDisk, true)
	all := []check{zeros(0), zeros(1), zeros(2), zeros(3)}
	for name, tt := range map[string]struct {
		frames [][]byte
		says   error
	}{
		"all":                {[][]byte{open, appendChecks(nil, true, all)}, nil},
		"one is left out":    {[][]byte{open, appendChecks(nil, true, all[:3])}, ErrFrame},
		"one is written":     {[][]byte{open, appendChecks(nil, false, all), dataOf([]extent{{segment, 512}}, fill(512, 1))}, ErrFrame},
		"one differs":        {[][]byte{open, dataOf([]extent{{segment, 512}}, fill(512, 1)), appendChecks(nil, true, all)}, ErrDiffers},
		"beyond the disk":    {[][]byte{open, appendChecks(nil, true, append(all[:4:4], zeros(4)))}, ErrFrame},
		"not to be verified": {[][]byte{appendOpen(nil, testDisk, false), appendChecks(nil, true, all)}, ErrFrame},
		"cut short":          {[][]byte{open, appendChecks(nil, true, all)[:79]}, ErrFrame},
	} {
		_, err := apply(t, newDisk(testDisk), append(tt.frames, appendBarrier(nil, 1, true)))
		if !errors.Is(err, tt.says) || tt.says == nil && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
