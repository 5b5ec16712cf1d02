package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Down removes the lab in dir: its processes and guests, its network
// namespaces, and all files in dir. It needs nothing of the lab to run or to
// be complete, so it works after a crash at any point; where there is no lab
// it does nothing. It refuses a directory that is not a lab's.
func Down(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("find lab: %w", err)
	}
	if os.Geteuid() != 0 {
		return errors.New("wanlab needs root to remove a lab: use sudo")
	}
	l := newLab(dir)
	l.addThird() // should there have been one
	lock, err := os.OpenFile(filepath.Join(dir, markerName), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("read directory: %w", err)
		}
		if len(entries) > 0 {
			return fmt.Errorf("%s: %w: wanlab did not make it, and leaves it alone", dir, ErrNoLab)
		}
		return l.remove(ctx)
	}
	if err != nil {
		return fmt.Errorf("open lab: %w", err)
	}
	defer lock.Close()
	// Who holds the lock is the supervisor, which is killed here, or an Up,
	// which fails without it and cleans up.
	ctx, cancel := context.WithTimeout(ctx, downTimeout)
	defer cancel()
	for unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		if err := l.kill(ctx); err != nil {
			return err
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("%s is in use by another wanlab: %w", dir, err)
		}
	}
	return l.remove(ctx)
}

const (
	downTimeout = 30 * time.Second
	busyTimeout = 5 * time.Second
)

// remove kills and deletes whatever there is of the lab.
func (l *Lab) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, downTimeout)
	defer cancel()
	if err := l.kill(ctx); err != nil {
		return err
	}
	for _, s := range l.Sites {
		patient, cancel := context.WithTimeout(ctx, busyTimeout)
		err := removeNamespace(patient, s.Namespace)
		cancel()
		if err != nil {
			return err
		}
	}
	for _, s := range l.Sites {
		if err := s.detachDisk(); err != nil {
			return err
		}
	}
	return l.removeFiles()
}

// kill returns when nothing runs for the lab or in its sites any more.
func (l *Lab) kill(ctx context.Context) error {
	for {
		left := l.processes()
		if len(left) == 0 {
			return nil
		}
		for _, pid := range left {
			// An error means that it has ended, or soon shows as a timeout.
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("kill the lab's processes %v: %w", left, err)
		}
	}
}

func (l *Lab) removeFiles() error {
	fresh := unclaimed(l.Dir)
	for _, path := range []string{filepath.Join(fresh, markerName), fresh} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove what an up that was stopped left: %w", err)
		}
	}
	marker, err := os.ReadFile(filepath.Join(l.Dir, markerName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read marker: %w", err)
	}
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, point := range points {
		// The lab's own disks are not mounted any more. Someone else's files
		// are not to be deleted.
		if within(point, l.Dir) && point != l.Dir {
			return fmt.Errorf("something is mounted on %s: unmount it and run wanlab down again", point)
		}
	}
	entries, err := os.ReadDir(l.Dir)
	if err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	for _, e := range entries {
		// The marker goes last, or a crash here would leave a directory that
		// is nobody's.
		if e.Name() == markerName {
			continue
		}
		if err := os.RemoveAll(filepath.Join(l.Dir, e.Name())); err != nil {
			return fmt.Errorf("remove lab: %w", err)
		}
	}
	if err := os.Remove(filepath.Join(l.Dir, markerName)); err != nil {
		return fmt.Errorf("remove lab: %w", err)
	}
	if string(marker) != markerMade {
		return nil
	}
	if err := os.Remove(l.Dir); err != nil {
		return fmt.Errorf("remove lab: %w", err)
	}
	return nil
}

// pause waits a moment between two attempts.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(20 * time.Millisecond):
		return nil
	}
}
