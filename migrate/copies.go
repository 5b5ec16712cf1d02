package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
)

const (
	// worthKeeping is what must have arrived for a next attempt to start from it.
	worthKeeping = 1 << 20
	// keepFree is the part of a file system that copies leave free.
	keepFree = 0.1
	// sweepInterval is how often copies are looked at whose time may be over.
	sweepInterval = 10 * time.Minute
)

// identify notes which file a copy is, and returns what it occupies.
func identify(c *handoff.Copy) (allocated int64, err error) {
	info, err := os.Lstat(c.Path)
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return 0, fmt.Errorf("%s is no file", c.Path)
	}
	c.Inode, c.Length, c.Modified = st.Ino, st.Size, st.Mtim.Nano()
	return st.Blocks * 512, nil
}

// unchanged reports that the file of a copy is still what it was.
func unchanged(c handoff.Copy) bool {
	now := c
	_, err := identify(&now)
	return err == nil && now == c
}

// olderCopy finds the copy that a disk of an arriving guest can start from.
func (e *Engine) olderCopy(uuid string, d wireDisk) (handoff.Copy, bool) {
	all, err := e.Journal.Copies()
	if err != nil {
		e.Log.Error("copies of disks not known", "error", err)
	}
	i := slices.IndexFunc(all, func(c handoff.Copy) bool { return c.Path == d.Path })
	if i < 0 || d.Block || all[i].UUID != uuid || !unchanged(all[i]) {
		return handoff.Copy{}, false
	}
	return all[i], true
}

// fits reports whether a move can write into a copy.
func fits(c handoff.Copy, d wireDisk) bool {
	return !d.Static && c.Format == d.Format && c.Size == d.Size
}

// keepCopies records images that no domain uses any more.
func (e *Engine) keepCopies(list []handoff.Copy) error {
	e.copies.Lock()
	defer e.copies.Unlock()
	var errs []error
	for _, c := range list {
		allocated, err := identify(&c)
		if errors.Is(err, os.ErrNotExist) || err == nil && !c.Kept() && allocated < worthKeeping {
			continue
		}
		if err == nil {
			err = e.Journal.PutCopy(c)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// keepArrived keeps the images of a guest that has not arrived, as far as there
// is room: so many bytes. It returns what is left to be removed of what the move
// made.
func (e *Engine) keepArrived(entry handoff.Entry) (remove []string, bytes int64) {
	var list []handoff.Copy
	for _, c := range entry.Arriving {
		c.Since, c.Whole = time.Now(), false
		if !c.Kept() {
			c.Until = c.Since.Add(e.Keep)
		}
		if c.Kept() || e.Keep > 0 {
			list = append(list, c)
		}
	}
	if err := e.keepCopies(list); err != nil {
		e.Log.Error("a copy of a disk is not kept for the next attempt", "error", err)
	}
	e.sweepCopies()
	remove = entry.Created
	all, err := e.Journal.Copies()
	if err != nil {
		e.Log.Error("copies of disks not known", "error", err)
	}
	for _, c := range all {
		if slices.ContainsFunc(list, func(mine handoff.Copy) bool { return mine.Path == c.Path }) && unchanged(c) {
			allocated, _ := identify(&c)
			bytes += allocated
			remove = slices.DeleteFunc(slices.Clone(remove), func(path string) bool { return path == c.Path })
		}
	}
	return remove, bytes
}

// takeCopy gives a copy to a move, which has it in its journal.
func (e *Engine) takeCopy(c handoff.Copy) error {
	e.copies.Lock()
	defer e.copies.Unlock()
	if !unchanged(c) {
		return fmt.Errorf("the older copy %s has changed or gone since this move was checked: start the move again", c.Path)
	}
	return e.Journal.DropCopy(c.Path)
}

// Copy is an image that a later move to this host starts from.
type Copy struct {
	handoff.Copy
	Storage int64 `json:"storage"` // bytes that it takes
}

// Copies lists the images that later moves to this host start from.
func (e *Engine) Copies() ([]Copy, error) {
	e.sweepCopies()
	all, err := e.Journal.Copies()
	list := make([]Copy, 0, len(all))
	for _, c := range all {
		now := c
		if allocated, err := identify(&now); err == nil && now == c {
			list = append(list, Copy{c, allocated})
		}
	}
	return list, err
}

// RemoveCopies removes the copies of a guest, by its name or UUID, and returns
// how many there were.
func (e *Engine) RemoveCopies(ctx context.Context, vm string) (int, error) {
	e.sweepCopies()
	e.copies.Lock()
	defer e.copies.Unlock()
	all, err := e.Journal.Copies()
	if err != nil {
		return 0, err
	}
	n := 0
	for _, c := range all {
		if c.VM != vm && c.UUID != vm {
			continue
		}
		if unchanged(c) {
			if err := e.Host.RemoveDisk(ctx, c.Path); err != nil {
				return n, err
			}
			n++
		}
		e.forget(c, "an operator has removed it")
	}
	return n, nil
}

// standing is a copy as it is found.
type standing struct {
	handoff.Copy
	unchanged bool
	storage   int64
	room      bool // its file system is not nearly full
}

// surplus tells which copies go, and why: those whose time is over, and of those
// that take too much room the oldest.
func surplus(all []standing, now time.Time, space int64) map[string]string {
	gone := map[string]string{}
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b standing) int { return b.Since.Compare(a.Since) })
	var taken int64
	for _, c := range all { // the newest first
		switch {
		case c.Kept():
			continue
		case now.After(c.Until):
			gone[c.Path] = "its time is over"
		case !c.unchanged: // it may come back: its file system may not be mounted
			continue
		case taken+c.storage > space:
			gone[c.Path] = "copies take more than reduction.keep_space"
		case !c.room:
			gone[c.Path] = "its file system is nearly full"
		default:
			taken += c.storage
		}
	}
	return gone
}

// sweepCopies removes what is surplus. What has changed is not its to remove.
func (e *Engine) sweepCopies() {
	e.copies.Lock()
	defer e.copies.Unlock()
	all, err := e.Journal.Copies()
	if err != nil {
		e.Log.Error("copies of disks not known", "error", err)
		return
	}
	var list []standing
	for _, c := range all {
		now := c
		storage, err := identify(&now)
		list = append(list, standing{c, err == nil && now == c, storage, roomBeside(c.Path)})
	}
	gone := surplus(list, time.Now(), e.KeepSpace)
	for _, c := range list {
		why := gone[c.Path]
		if why == "" {
			continue
		}
		if c.unchanged {
			if err := e.Host.RemoveDisk(context.Background(), c.Path); err != nil {
				e.Log.Error("older copy not removed", "error", err)
				continue
			}
		}
		e.forget(c.Copy, why)
	}
}

func (e *Engine) forget(c handoff.Copy, why string) {
	e.Log.Info("an older copy of a disk is gone", "vm", c.VM, "path", c.Path, "why", why)
	if err := e.Journal.DropCopy(c.Path); err != nil {
		e.Log.Error("older copy not forgotten", "error", err)
	}
}

// roomBeside reports whether a copy leaves enough of its file system free.
func roomBeside(path string) bool {
	var st syscall.Statfs_t
	return syscall.Statfs(path, &st) != nil || float64(st.Bavail) >= keepFree*float64(st.Blocks)
}

// keepSwept looks at the copies now and then until ctx ends.
func (e *Engine) keepSwept(ctx context.Context) {
	for {
		e.sweepCopies()
		select {
		case <-ctx.Done():
			return
		case <-time.After(sweepInterval):
		}
	}
}

// arriving is the record of a disk that is about to be written.
func (e *Engine) arriving(ask prepare, d wireDisk) handoff.Copy {
	return handoff.Copy{Path: d.Path, VM: ask.Name, UUID: ask.UUID, Format: d.Format, Size: d.Size, Until: time.Now().Add(e.Keep)}
}

// leaving are the records of disks that an operator wants kept.
func leaving(dom *hypervisor.Domain, p plan) []handoff.Copy {
	var list []handoff.Copy
	for _, d := range p.disks {
		path := p.source[d.Target]
		if slices.Contains(p.remove, path) {
			list = append(list, handoff.Copy{Path: path, VM: dom.Name, UUID: dom.UUID, Format: d.Format, Size: d.Size, Whole: true})
		}
	}
	return list
}
