package hypervisor

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

func TestDiskSpec(t *testing.T) {
	good := DiskSpec{Path: "/srv/a.qcow2", Type: "file", Format: "qcow2", VirtualSize: 1 << 30, ClusterSize: 64 << 10}
	if err := good.check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*DiskSpec){
		"no path":       func(s *DiskSpec) { s.Path = "" },
		"relative path": func(s *DiskSpec) { s.Path = "a.qcow2" },
		"unclean path":  func(s *DiskSpec) { s.Path = "/srv/../a" },
		"type":          func(s *DiskSpec) { s.Type = "network" },
		"no type":       func(s *DiskSpec) { s.Type = "" },
		"format":        func(s *DiskSpec) { s.Format = "vmdk" },
		"no size":       func(s *DiskSpec) { s.VirtualSize = 0 },
		"negative size": func(s *DiskSpec) { s.VirtualSize = -512 },
		"odd size":      func(s *DiskSpec) { s.VirtualSize = 1000 },
		"odd cluster":   func(s *DiskSpec) { s.ClusterSize = 3 << 10 },
		"small cluster": func(s *DiskSpec) { s.ClusterSize = 256 },
		"large cluster": func(s *DiskSpec) { s.ClusterSize = 4 << 20 },
	} {
		s := good
		change(&s)
		if err := s.check(); err == nil {
			t.Errorf("%s is no error: %+v", name, s)
		}
	}
}

func TestFreeSpace(t *testing.T) {
	dir := t.TempDir()
	have, err := FreeSpace(dir)
	if err != nil || have <= 0 {
		t.Fatal(have, err)
	}
	if _, err := FreeSpace(filepath.Join(dir, "new.raw")); err != nil {
		t.Error("of a file to be made:", err)
	}
	if _, err := FreeSpace(filepath.Join(dir, "no", "folder")); err == nil {
		t.Error("a missing folder is no error")
	}
}

// Files are made without asking libvirtd.
func TestCreateDisk(t *testing.T) {
	dir := t.TempDir()
	h := &Host{socket: filepath.Join(dir, "no-libvirtd"), log: slog.New(slog.DiscardHandler)}
	for _, format := range []string{"raw", "qcow2"} {
		path := filepath.Join(dir, format)
		s := DiskSpec{Path: path, Type: "file", Format: format, VirtualSize: 3<<30 + 512}
		if format == "qcow2" {
			s.ClusterSize = 128 << 10
		}
		if err := h.CreateDisk(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		d := Disk{Type: "file", Format: format, Path: path, VirtualSize: s.VirtualSize}
		if err := d.inspect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d.Allocated > 1<<20 || d.ClusterSize != s.ClusterSize {
			t.Errorf("%s: %+v", format, d)
		}
		out, err := runTool(t.Context(), "qemu-img", "info", "--output=json", "-f", format, path)
		if err != nil {
			t.Fatal(err)
		}
		var made image
		if err := json.Unmarshal(out, &made); err != nil {
			t.Fatal(err)
		}
		if made.VirtualSize != s.VirtualSize {
			t.Errorf("%s has %d bytes, want %d", format, made.VirtualSize, s.VirtualSize)
		}
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.CreateDisk(t.Context(), s); !errors.Is(err, ErrExists) {
			t.Errorf("%s, made twice: %v", format, err)
		}
		if b, err := os.ReadFile(path); string(b) != "precious" {
			t.Errorf("%s was overwritten: %q, %v", format, b, err)
		}
	}
	for name, path := range map[string]string{"missing folder": filepath.Join(dir, "no", "disk"), "link": filepath.Join(dir, "link")} {
		if name == "link" {
			if err := os.Symlink(filepath.Join(dir, "elsewhere"), path); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.CreateDisk(t.Context(), DiskSpec{Path: path, Type: "file", Format: "raw", VirtualSize: 512}); err == nil {
			t.Errorf("%s is no error", name)
		}
	}
	if err := h.CreateDisk(t.Context(), DiskSpec{Path: filepath.Join(dir, "raw"), Type: "block", Format: "raw", VirtualSize: 512}); err == nil {
		t.Error("a file passes for a block device")
	}
	if err := h.RemoveDisk(t.Context(), filepath.Join(dir, "gone")); err != nil {
		t.Error(err)
	}
	if err := h.RemoveDisk(t.Context(), filepath.Join(dir, "raw")); err == nil {
		t.Error("removed without knowing whether a domain uses it")
	}
}
