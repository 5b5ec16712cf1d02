//go:build faults

package faults

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestPoints meets a point that fails, once, and one that holds up who comes there. The
// lab's TestFaults stops agents.
func TestPoints(t *testing.T) {
	if err := os.MkdirAll(Folder, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(Folder) }) // unless somebody else is in it
	arm := func(point, what string) string {
		path := filepath.Join(Folder, point)
		if err := os.WriteFile(path, []byte(what), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(path + ".reached") })
		return path + ".reached"
	}
	reached := arm("test-fails", "fail no space left")
	if err := Err("test-fails"); err == nil || err.Error() != "no space left" {
		t.Errorf("the point gives %v", err)
	}
	if err := Err("test-fails"); err != nil {
		t.Errorf("the point fails twice: %v", err)
	}
	if _, err := os.Stat(reached); err != nil {
		t.Error(err)
	}
	reached = arm("test-waits", "wait")
	passed := make(chan struct{})
	go func() { At("test-waits"); close(passed) }()
	for _, err := os.Stat(reached); errors.Is(err, fs.ErrNotExist); _, err = os.Stat(reached) {
		select {
		case <-passed:
			t.Fatal("nobody was held up")
		default:
		}
	}
	os.Remove(reached)
	<-passed
}
