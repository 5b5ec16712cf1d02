package hypervisor

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestStraySockets removes what is left of a move that is over, and nothing else.
func TestStraySockets(t *testing.T) {
	h := &Host{socket: filepath.Join(t.TempDir(), "libvirt-sock")}
	over := func(id string) bool { return id == "mv-over" }
	if err := h.RemoveStraySockets(over); err != nil {
		t.Errorf("without a folder: %v", err)
	}
	dir := filepath.Join(filepath.Dir(h.socket), "wanmig")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	stays := map[string]bool{
		"mv-over-rams.tunnelmigrate.dest.a VM":    false,
		"mv-over-nbdd.tunnelmigrate.dest.mv-open": false,
		"mv-open-nbdd.tunnelmigrate.dest.mv-over": true,
		"mv-over-rams":            true,
		".tunnelmigrate.dest.web": true,
	}
	for name := range stays {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.RemoveStraySockets(over); err != nil {
		t.Error(err)
	}
	for name, want := range stays {
		if _, err := os.Stat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) == want {
			t.Errorf("%q stays: %v", name, !want)
		}
	}
}
