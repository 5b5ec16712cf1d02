package lab

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab/guest/api"
)

type cpioEntry struct {
	name    string
	mode    int64
	device  [2]int64
	content string
}

// readCPIO reads an archive of the format newc as the kernel would.
func readCPIO(t *testing.T, b []byte) []cpioEntry {
	t.Helper()
	var entries []cpioEntry
	for {
		if len(b) < 110 || string(b[:6]) != "070701" {
			t.Fatalf("no header after %d entries", len(entries))
		}
		field := func(n int) int64 {
			v, err := strconv.ParseInt(string(b[6+8*n:14+8*n]), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		aligned := func(n int64) int64 { return (n + 3) &^ 3 }
		nameEnd := 110 + field(11)
		contentEnd := aligned(nameEnd) + field(6)
		e := cpioEntry{string(b[110 : nameEnd-1]), field(1), [2]int64{field(9), field(10)}, string(b[aligned(nameEnd):contentEnd])}
		b = b[aligned(contentEnd):]
		if e.name == "TRAILER!!!" {
			if len(b) != 0 {
				t.Fatalf("%d bytes after the end", len(b))
			}
			return entries
		}
		entries = append(entries, e)
	}
}

func TestCPIORoundTrip(t *testing.T) {
	var b bytes.Buffer
	c := &cpioWriter{w: &b}
	c.directory("dev")
	c.device("dev/console", 5, 1)
	for n := range 5 { // every padding
		c.file("f"+strings.Repeat("x", n), 0o755, []byte(strings.Repeat("c", n)))
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	got := readCPIO(t, b.Bytes())
	want := []cpioEntry{{"dev", 0o40755, [2]int64{}, ""}, {"dev/console", 0o20600, [2]int64{5, 1}, ""}}
	for n := range 5 {
		want = append(want, cpioEntry{"f" + strings.Repeat("x", n), 0o100755, [2]int64{}, strings.Repeat("c", n)})
	}
	if !slices.Equal(got, want) {
		t.Errorf("read %v, want %v", got, want)
	}
}

type shortWriter struct{ left int }

var errShort = errors.New("no space")

func (w *shortWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errShort
	}
	return len(p), nil
}

func TestCPIOReportsWriteErrors(t *testing.T) {
	for n := range 100 {
		c := &cpioWriter{w: &shortWriter{n}}
		c.file("a", 0o644, []byte("b"))
		if err := c.close(); !errors.Is(err, errShort) {
			t.Fatalf("with space for %d bytes: %v", n, err)
		}
	}
}

// writeModule makes an object file that has nothing but a section .modinfo.
func writeModule(t *testing.T, path, info string) {
	t.Helper()
	names := "\x00.modinfo\x00.shstrtab\x00"
	header := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2,
		Shoff: uint64(64 + len(info) + len(names)),
	}
	copy(header.Ident[:], []byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1})
	var b bytes.Buffer
	for _, part := range []any{
		header, []byte(info), []byte(names), elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(info))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(info)), Size: uint64(len(names))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestResolveModules(t *testing.T) {
	dir := t.TempDir()
	for name, info := range map[string]string{
		"net/virtio_net.ko":     "license=GPL\x00depends=net_failover,virtio\x00",
		"net/net-failover.ko":   "depends=virtio\x00",
		"virtio/virtio.ko":      "depends=virtio_ring,crc16\x00",
		"virtio/virtio-ring.ko": "depends=\x00",
		"broken/broken.ko":      "depends=absent\x00",
		"loop/a.ko":             "depends=b\x00",
		"loop/b.ko":             "depends=a\x00",
	} {
		writeModule(t, filepath.Join(dir, "kernel", name), info)
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/lib/crc16.ko\nkernel/fs/ext4/ext4.ko\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	files, err := ResolveModules(dir, []string{"virtio-net", "ext4", "virtio"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, moduleName(f))
	}
	if want := []string{"virtio_ring", "virtio", "net_failover", "virtio_net"}; !slices.Equal(names, want) {
		t.Errorf("modules %v, want %v", names, want)
	}
	if files, err := ResolveModules(dir, []string{"a"}); err != nil || len(files) != 2 {
		t.Errorf("modules that need each other: %v, %v", files, err)
	}
	if _, err := ResolveModules(dir, []string{"broken"}); err == nil || !strings.Contains(err.Error(), "no module absent") {
		t.Errorf("a missing dependency: %v", err)
	}
	whole, err := os.ReadFile(filepath.Join(dir, "kernel/net/virtio_net.ko"))
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) {
		if err := os.WriteFile(filepath.Join(dir, "kernel/net/virtio_net.ko"), whole[:n], 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := ResolveModules(dir, []string{"virtio_net"}); err == nil {
			t.Fatalf("the first %d of %d bytes were read as a module", n, len(whole))
		}
	}
}

func TestStageFiles(t *testing.T) {
	source := filepath.Join(t.TempDir(), "src")
	for name, size := range map[string]int{"a": 1000, "b/long name": 3000, "c": 0, "d": 5000, "e": 500} {
		path := filepath.Join(source, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte(name[:1]), size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a", filepath.Join(source, "aa")); err != nil {
		t.Fatal(err)
	}
	staged := filepath.Join(t.TempDir(), "staged")
	if err := stageFiles(context.Background(), staged, 5000, []string{source}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(staged, api.Manifest))
	if err != nil {
		t.Fatal(err)
	}
	// c is empty, aa a link, and d does not fit.
	var want string
	for _, f := range []struct {
		name string
		size int
	}{{"a", 1000}, {"b/long name", 3000}, {"e", 500}} {
		content := bytes.Repeat([]byte(f.name[:1]), f.size)
		want += fmt.Sprintf("%08x %d src/%s\n", crc32.Checksum(content, castagnoli), f.size, f.name)
		if copied, err := os.ReadFile(filepath.Join(staged, "src", f.name)); err != nil || !bytes.Equal(copied, content) {
			t.Errorf("%s was not copied: %v", f.name, err)
		}
	}
	if string(got) != want {
		t.Errorf("manifest:\n%swant:\n%s", got, want)
	}
}

func testImages(t *testing.T) *Images {
	t.Helper()
	guest := filepath.Join(t.TempDir(), "guest")
	if err := os.WriteFile(guest, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	im, err := OpenImages(t.TempDir(), guest)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func TestCacheHasNothingHalfWritten(t *testing.T) {
	im := testImages(t)
	failed := errors.New("failed")
	_, err := im.make("thing", func(path string) error {
		if err := os.WriteFile(path, []byte("half"), 0o644); err != nil {
			return err
		}
		return failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("got %v", err)
	}
	// What a process that was killed leaves.
	if err := os.WriteFile(filepath.Join(im.dir, "new-thing"), []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	unlock, err := im.lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if left, _ := filepath.Glob(filepath.Join(im.dir, "*thing")); len(left) != 0 {
		t.Errorf("the cache has %v", left)
	}
	write := func(text string) string {
		path, err := im.make("thing", func(path string) error { return os.WriteFile(path, []byte(text), 0o644) })
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if one, two := write("one"), write("two"); one != "one" || two != "one" {
		t.Errorf("made %q, then %q; want one both times", one, two)
	}
}

func TestCacheIsLocked(t *testing.T) {
	im := testImages(t)
	unlock, err := im.lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := im.lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("locked twice: %v", err)
	}
	unlock()
	unlock, err = im.lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestMissingGuestProgramSaysWhatToDo(t *testing.T) {
	_, err := OpenImages(t.TempDir(), "/nonexistent/wanlab-guest")
	if err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("got %v", err)
	}
}
