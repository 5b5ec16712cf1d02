package seed

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/wanmig/wanmig/compress"
)

const page = compress.PageSize

// pages makes content: 0 is a page of zeros, other numbers a page each.
func pages(numbers ...int) []byte {
	b := make([]byte, len(numbers)*page)
	for i, n := range numbers {
		if n != 0 {
			fill(b[i*page:][:page], uint64(n))
		}
	}
	return b
}

func fill(p []byte, n uint64) {
	r := rand.NewPCG(n, 1)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64())
	}
}

func write(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// indexed builds the index of an image, with runs of some entries.
func indexed(t testing.TB, folder, image string, most int) (*index, error) {
	t.Helper()
	f, id, err := openFile(image, false)
	if err != nil {
		return nil, err
	}
	img, err := openFormat(f, id.size)
	if err != nil {
		return nil, err
	}
	defer img.close()
	b := builder{folder: folder, most: most, fault: func(string) error { return nil }, done: func(int64, int64) {}, pace: func(context.Context, int) error { return nil }}
	unread, err := b.build(t.Context(), image, time.Unix(5, 6), id, img)
	if err = errors.Join(unread, err); err != nil {
		return nil, err
	}
	return openIndex(indexPath(folder, image))
}

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Min(0).Draw(t, "size")
		h := header{path: rapid.StringN(0, 1000, maxPath).Draw(t, "path"), format: rapid.SampledFrom([]formatKind{formatRaw, formatQCOW2}).Draw(t, "format"),
			file: identity{rapid.Uint64().Draw(t, "inode"), rapid.Int64().Draw(t, "file"), rapid.Int64().Draw(t, "mtime")},
			size: size, indexed: time.Unix(0, rapid.Int64().Draw(t, "when")), count: rapid.Int64Range(0, min(size/page, maxPages)).Draw(t, "count"), sum: rapid.Uint32().Draw(t, "sum")}
		got, err := parseHeader(h.encode())
		if err != nil || !reflect.DeepEqual(got, h) {
			t.Fatalf("%+v became %+v, %v", h, got, err)
		}
	})
}

// TestDamagedIndexIsRecognised tries every prefix, every flipped bit and what is
// longer than it should be.
func TestDamagedIndexIsRecognised(t *testing.T) {
	dir := t.TempDir()
	x, err := indexed(t, dir, write(t, filepath.Join(dir, "a.raw"), pages(1, 2, 0, 3, 2)), 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.release(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(indexPath(dir, filepath.Join(dir, "a.raw")))
	if err != nil {
		t.Fatal(err)
	}
	if len(good) != headerSize+3*entrySize {
		t.Fatalf("three pages take %d bytes", len(good))
	}
	if _, err := parseIndex(good); err != nil {
		t.Fatal(err)
	}
	try := func(what string, at int, b []byte) {
		if x, err := parseIndex(b); !errors.Is(err, errIndex) {
			t.Fatalf("%s at %d: %v, %v", what, at, x, err)
		}
	}
	for i := range good {
		try("prefix", i, good[:i])
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			try("bit", i*8+bit, bad)
		}
	}
	try("a byte more", len(good), append(bytes.Clone(good), 0))
	try("an entry more", len(good), append(bytes.Clone(good), good[len(good)-entrySize:]...))
	try("zeros", 0, make([]byte, len(good)))
	for _, b := range [][]byte{nil, good[:headerSize-1], good[:len(good)-1]} {
		if x, err := openIndex(write(t, filepath.Join(dir, "cut"), b)); !errors.Is(err, errIndex) {
			t.Fatalf("file of %d bytes: %v, %v", len(b), x, err)
		}
	}
}

// TestIndexWithEntriesOutOfPlace: the checksums are right, the content is not.
func TestIndexWithEntriesOutOfPlace(t *testing.T) {
	for name, entries := range map[string][]entry{
		"tags not ascending":     {{2, 0}, {1, 1}},
		"a tag twice":            {{1, 0}, {1, 1}},
		"a page beyond the end":  {{1, 0}, {2, 2}},
		"the last page that can": {{1, 0}, {2, 1}}, // the control
	} {
		var raw []byte
		for _, e := range entries {
			var one [entrySize]byte
			e.encode(one[:])
			raw = append(raw, one[:]...)
		}
		h := header{path: "/a", format: formatRaw, size: 2 * page, count: 2, sum: checksum(raw)}
		x, err := parseIndex(append(h.encode(), raw...))
		if name == "the last page that can" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if !errors.Is(err, errIndex) {
			t.Errorf("%s: %v, %v", name, x, err)
		}
	}
}

// TestEveryPageIsFound: of any image, with runs of any length, each page that is
// not zero is found where it is, and what is nowhere is not.
func TestEveryPageIsFound(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	rapid.Check(t, func(rt *rapid.T) {
		numbers := rapid.SliceOfN(rapid.IntRange(0, 300), 0, 400).Draw(rt, "pages")
		most := rapid.IntRange(1, 500).Draw(rt, "most")
		content := pages(numbers...)
		tail := rapid.SliceOfN(rapid.Byte(), 0, page-1).Draw(rt, "tail")
		write(t, image, append(bytes.Clone(content), tail...))
		x, err := indexed(t, dir, image, most)
		if err != nil {
			rt.Fatal(err)
		}
		defer x.release()
		distinct := map[int]bool{}
		for i, n := range numbers {
			at, ok := x.find(compress.Sum(content[i*page:][:page]))
			if n == 0 {
				if ok {
					rt.Fatalf("a page of zeros is said to be at %d", at)
				}
				continue
			}
			distinct[n] = true
			if !ok || numbers[at] != n {
				rt.Fatalf("page %d: %d, %v", i, at, ok)
			}
		}
		if x.count != int64(len(distinct)) {
			rt.Fatalf("%d entries for %d distinct pages", x.count, len(distinct))
		}
		for n := 1000; n < 1100; n++ {
			if at, ok := x.find(compress.Sum(pages(n))); ok {
				rt.Fatalf("a page that is nowhere is said to be at %d", at)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(dir, tempPrefix+"*")); len(left) != 0 {
			rt.Fatalf("left: %v", left)
		}
	})
}

// TestIndexFileThatShrinks: an index file that can't be read any more while it is
// used ends no program.
func TestIndexFileThatShrinks(t *testing.T) {
	dir := t.TempDir()
	image := write(t, filepath.Join(dir, "image"), pages(1, 2, 3))
	x, err := indexed(t, dir, image, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer x.release()
	if _, ok := x.find(compress.Sum(pages(1))); !ok {
		t.Fatal("not found before")
	}
	if err := os.Truncate(indexPath(dir, image), 0); err != nil {
		t.Fatal(err)
	}
	if at, ok := x.find(compress.Sum(pages(1))); ok {
		t.Fatalf("found at %d", at)
	}
}

func FuzzHeader(f *testing.F) {
	f.Add([]byte{})
	f.Add(header{path: "/a", format: formatRaw, size: page, count: 1}.encode())
	f.Add(header{path: "/b", format: formatQCOW2, size: 1 << 50}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := parseHeader(b); err == nil && !bytes.Equal(h.encode(), b[:headerSize]) {
			t.Fatalf("%+v is encoded otherwise", h)
		}
		if len(b) >= headerSize { // the same behind a right checksum
			binary.LittleEndian.PutUint32(b[headerSize-4:], checksum(b[:headerSize-4]))
			copy(b, magic)
			binary.LittleEndian.PutUint32(b[headerSize-4:], checksum(b[:headerSize-4]))
			if h, err := parseHeader(b); err == nil && (h.count*entrySize < 0 || len(h.path) > maxPath) {
				t.Fatalf("accepted: %+v", h)
			}
		}
	})
}

func BenchmarkFind(b *testing.B) {
	dir := b.TempDir()
	const n = 1 << 18
	image := filepath.Join(dir, "image")
	content := make([]byte, n*page)
	sums := make([]compress.Fingerprint, n)
	for i := range n {
		binary.LittleEndian.PutUint64(content[i*page:], uint64(i+1))
		sums[i] = compress.Sum(content[i*page:][:page])
	}
	x, err := indexed(b, dir, write(b, image, content), runEntries)
	if err != nil {
		b.Fatal(err)
	}
	defer x.release()
	for name, of := range map[string]func(i int) compress.Fingerprint{
		"there":   func(i int) compress.Fingerprint { return sums[i*7919%n] },
		"nowhere": func(i int) compress.Fingerprint { f := sums[i*7919%n]; f[4]++; return f },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, ok := x.find(of(i)); ok != (name == "there") {
					b.Fatal("wrong")
				}
			}
		})
	}
}

// BenchmarkIndex indexes a GiB, raw.
func BenchmarkIndex(b *testing.B) {
	dir := b.TempDir()
	image := filepath.Join(dir, "image")
	f, err := os.Create(image)
	if err != nil {
		b.Fatal(err)
	}
	part := make([]byte, 1<<20)
	const size = 1 << 30
	for i := range size / len(part) {
		fill(part, uint64(i))
		if _, err := f.Write(part); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(size)
	for b.Loop() {
		x, err := indexed(b, dir, image, runEntries)
		if err != nil {
			b.Fatal(err)
		}
		x.release()
	}
}
