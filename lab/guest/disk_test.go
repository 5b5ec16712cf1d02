package main

import (
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// testDisk is a disk of 8 blocks in a directory with two listed files. /var/tmp is a real disk, as O_DIRECT needs, where
// /tmp may be memory.
func testDisk(t *testing.T) *disk {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "wanlab-guest-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var manifest string
	for name, content := range map[string]string{"short": "hello", "with space/long": strings.Repeat("0123456789abcdef", 100_000)} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		manifest += fmt.Sprintf("%08x %d %s\n", crc32.Checksum([]byte(content), castagnoli), len(content), name)
	}
	if err := os.WriteFile(filepath.Join(dir, api.Manifest), []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := openDisk("vda", dir, 8*8*api.BlockSize, 42)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.ring.Close(); d.direct.Close() })
	return d
}

func put(t *testing.T, d *disk, n int64) {
	t.Helper()
	if err := d.put(n); err != nil {
		t.Fatal(err)
	}
}

func TestDiskUnderLoadHasNoErrors(t *testing.T) {
	d := testDisk(t)
	for n := range int64(10) {
		put(t, d, n)
		d.verifyNext()
	}
	if blocks, bad := d.verifyBlocks(); blocks != 8 || bad != 0 {
		t.Errorf("%d of %d blocks are bad, want 0 of 8", bad, blocks)
	}
	if files, bad := d.verifyFiles(); files != 2 || bad != 0 {
		t.Errorf("%d of %d files are bad, want 0 of 2", bad, files)
	}
	if r := d.report(); r.Errors != 0 || r.Acknowledged != 45 || r.WrittenBlocks != 45 || r.Files != 2 {
		t.Errorf("report %+v", r)
	}
}

// TestDiskFindsWhatWasWritten boots again, after nothing, after some blocks, after more
// than there is room for, and with one of them gone.
func TestDiskFindsWhatWasWritten(t *testing.T) {
	for _, c := range []struct{ written, lost, found int64 }{{0, 0, 0}, {3, 0, 3}, {8, 0, 8}, {21, 0, 21}, {21, 19, 2}, {5, 1, 0}} {
		d := testDisk(t)
		put(t, d, c.written)
		if c.lost > 0 {
			if _, err := d.ring.WriteAt([]byte{1}, (c.lost-1)%d.slots*api.BlockSize+99); err != nil {
				t.Fatal(err)
			}
		}
		again, err := openDisk("vda", d.root, 8*8*api.BlockSize, 42)
		if err != nil {
			t.Fatal(err)
		}
		if found := again.report().Found; found != c.found {
			t.Errorf("of %d blocks without number %d the next boot found %d, want %d", c.written, c.lost, found, c.found)
		}
		again.ring.Close()
		again.direct.Close()
	}
}

func TestDiskFindsWrongBlocks(t *testing.T) {
	block := func(t *testing.T, d *disk, slot int64) []byte {
		b := make([]byte, api.BlockSize)
		if _, err := d.ring.ReadAt(b, slot*api.BlockSize); err != nil {
			t.Fatal(err)
		}
		return b
	}
	overwrite := func(t *testing.T, d *disk, slot int64, b []byte) {
		if _, err := d.ring.WriteAt(b, slot*api.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name   string
		breaks func(t *testing.T, d *disk)
		bad    int64
		want   string
	}{
		{"a corrupted byte", func(t *testing.T, d *disk) {
			b := block(t, d, 5)
			b[40000] ^= 8
			overwrite(t, d, 5, b)
		}, 1, "block 5: generation 14 damaged in 1 of 65536 bytes, first at offset 40000:"},
		{"a lost write", func(t *testing.T, d *disk) {
			old := block(t, d, 0) // 9, which 17 overwrites
			put(t, d, 1)
			overwrite(t, d, 0, old)
		}, 1, "block 0: expected generation 17, holds the stale generation 9"},
		{"swapped blocks", func(t *testing.T, d *disk) {
			one, two := block(t, d, 1), block(t, d, 2)
			overwrite(t, d, 1, two)
			overwrite(t, d, 2, one)
		}, 2, "block 1: expected generation 10, holds 2 of generation 11"},
		{"a hole", func(t *testing.T, d *disk) { overwrite(t, d, 7, make([]byte, api.BlockSize)) }, 1, "block 7: generation 16 damaged in "},
		{"a cut ring", func(t *testing.T, d *disk) {
			if err := d.ring.Truncate(7 * api.BlockSize); err != nil {
				t.Fatal(err)
			}
		}, 1, "block 16: read: EOF"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := testDisk(t)
			put(t, d, 16) // twice round
			test.breaks(t, d)
			for range 2 {
				if _, bad := d.verifyBlocks(); bad != test.bad {
					t.Errorf("%d blocks are bad, want %d", bad, test.bad)
				}
			}
			r := d.report()
			if r.Errors != test.bad {
				t.Errorf("%d errors after two passes, want %d: each counts once", r.Errors, test.bad)
			}
			if len(r.FirstErrors) == 0 || !strings.HasPrefix(r.FirstErrors[0], test.want) {
				t.Errorf("described as %q, want %q", r.FirstErrors, test.want)
			}
		})
	}
}

func TestDiskFindsWrongFiles(t *testing.T) {
	long := "with space/long"
	for name, breaks := range map[string]func(path string) error{
		"missing":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 1_000_000) },
		"a byte": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), 1_234_567)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := testDisk(t)
			if err := breaks(filepath.Join(d.root, long)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if files, bad := d.verifyFiles(); files != 2 || bad != 1 {
					t.Errorf("%d of %d files are bad, want 1 of 2", bad, files)
				}
			}
			if r := d.report(); r.Errors != 1 || !strings.Contains(r.FirstErrors[0], long) {
				t.Errorf("errors %q", r.FirstErrors)
			}
		})
	}
}

func TestShortenedManifestIsAnError(t *testing.T) {
	d := testDisk(t)
	path := filepath.Join(d.root, api.Manifest)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) - 1 { // the last newline does not matter
		if err := os.WriteFile(path, whole[:n], 0o644); err != nil {
			t.Fatal(err)
		}
		if _, bad := d.verifyFiles(); bad == 0 {
			t.Fatalf("the first %d of %d bytes of the manifest give no error", n, len(whole))
		}
	}
}

func TestBlocksNotAcknowledgedAreNotVerified(t *testing.T) {
	d := testDisk(t)
	put(t, d, 3)
	d.sequence++ // as if written, before fsync
	if blocks, bad := d.verifyBlocks(); blocks != 3 || bad != 0 {
		t.Errorf("%d of %d blocks are bad, want 0 of 3", bad, blocks)
	}
}

func FuzzManifestLine(f *testing.F) {
	dir, err := os.MkdirTemp("/var/tmp", "wanlab-guest-fuzz-")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { os.RemoveAll(dir) })
	buf, err := aligned(readChunk)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{"00000000 5 nothing", "x", "  ", "ffffffff 99999999999999999999 a b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		if strings.Contains(line, "..") {
			return // stays in the directory
		}
		if err := checkFile(dir, line, buf); err == nil {
			t.Errorf("%q matches a file in an empty directory", line)
		}
	})
}
