//go:build faults

package faults

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// At is a point at which nothing can go wrong: it stops, or waits.
func At(point string) { _ = Err(point) }

// Err is a point at which something can: it returns the error that a test wants
// to happen there.
func Err(point string) error {
	path := filepath.Join(Folder, point)
	what, err := os.ReadFile(path)
	if err != nil || os.Rename(path, path+".reached") != nil { // nobody waits here, or another thread was first
		return nil
	}
	switch do, why, _ := strings.Cut(string(what), " "); do {
	case "fail":
		return errors.New(why)
	case "wait":
		for _, err = os.Stat(path + ".reached"); err == nil; _, err = os.Stat(path + ".reached") {
			time.Sleep(5 * time.Millisecond)
		}
	default:
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		time.Sleep(20 * time.Millisecond) // the signal may be delivered to another thread first
	}
	return nil
}

// Now is the time as a wrong clock shows it.
func Now() time.Time {
	text, err := os.ReadFile(filepath.Join(Folder, "clock"))
	if err != nil {
		return time.Now()
	}
	off, err := time.ParseDuration(string(text))
	if err != nil {
		panic(err) // the test's own mistake
	}
	return time.Now().Add(off)
}
