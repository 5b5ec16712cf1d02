package seed

import (
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/wanmig/wanmig/compress"
)

// qcowImage writes a small qcow2 image as QEMU would, by docs/interop/qcow2.txt,
// without reference counts, which nobody reads here.
type qcowImage struct {
	version  uint32
	bits     uint
	zstd     bool
	content  []byte
	stored   func(cluster int) storage
	features uint64
	crypt    uint32
	backing  string
}

type storage int

const (
	hole storage = iota
	plain
	packed
	zeroed
)

func (q qcowImage) bytes(t testing.TB) []byte {
	t.Helper()
	size := 1 << q.bits
	clusters := (len(q.content) + size - 1) / size
	perTable := size / 8
	tables := (clusters + perTable - 1) / perTable
	l1Clusters := (tables*8 + size - 1) / size
	out := make([]byte, (1+l1Clusters+tables)*size)
	if q.bits == minClusterBit {
		out = append(out, make([]byte, size)...)
	}
	be := binary.BigEndian
	copy(out, qcowMagic)
	be.PutUint32(out[4:], q.version)
	be.PutUint32(out[20:], uint32(q.bits))
	be.PutUint64(out[24:], uint64(len(q.content)))
	be.PutUint32(out[32:], q.crypt)
	be.PutUint32(out[36:], uint32(tables))
	be.PutUint64(out[40:], uint64(size))
	if q.version == 3 {
		features := q.features
		if q.zstd {
			features |= featureCompression
			out[104] = 1
		}
		be.PutUint64(out[72:], features)
		be.PutUint32(out[96:], 4)
		be.PutUint32(out[100:], 112)
	}
	if q.backing != "" {
		be.PutUint64(out[8:], 256)
		be.PutUint32(out[16:], uint32(len(q.backing)))
		copy(out[256:], q.backing)
	}
	l1, l2 := size, (1+l1Clusters)*size
	for i := range tables {
		be.PutUint64(out[l1+i*8:], uint64(l2+i*size)|1<<63)
	}
	for c := range clusters {
		whole := make([]byte, size)
		copy(whole, q.content[c*size:])
		var entry uint64
		switch q.stored(c) {
		case plain:
			out = append(out, make([]byte, (size-len(out)%size)%size)...)
			entry = uint64(len(out)) | 1<<63
			out = append(out, whole...)
		case packed:
			b := q.pack(t, whole)
			split := 62 - (q.bits - 8)
			first, last := len(out)/512, (len(out)+len(b)-1)/512
			entry = 1<<62 | uint64(last-first)<<split | uint64(len(out))
			out = append(out, b...)
		case zeroed:
			entry = 1
		}
		be.PutUint64(out[l2+c*8:], entry)
	}
	return out
}

func (q qcowImage) pack(t testing.TB, b []byte) []byte {
	t.Helper()
	if q.zstd {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		return e.EncodeAll(b, nil)
	}
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, 6)
	if err == nil {
		_, err = w.Write(b)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// open opens an image from its bytes.
func open(t testing.TB, path string, b []byte) (format, error) {
	t.Helper()
	f, id, err := openFile(write(t, path, b), false)
	if err != nil {
		t.Fatal(err)
	}
	return openFormat(f, id.size)
}

// TestQCOWReads: any image is read as what was written, and nextData leaves out
// nothing but zeros.
func TestQCOWReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	rapid.Check(t, func(rt *rapid.T) {
		q := qcowImage{version: rapid.SampledFrom([]uint32{2, 3}).Draw(rt, "version"), bits: rapid.UintRange(minClusterBit, 17).Draw(rt, "bits")}
		q.zstd = q.version == 3 && rapid.Bool().Draw(rt, "zstd")
		q.content = make([]byte, rapid.IntRange(0, 300).Draw(rt, "sectors")*512)
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		kinds := map[int]storage{}
		for c := 0; c<<q.bits < len(q.content); c++ {
			kinds[c] = storage(r.IntN(4))
			if kinds[c] == zeroed && q.version == 2 {
				kinds[c] = hole
			}
			if kinds[c] == plain || kinds[c] == packed {
				part := q.content[c<<q.bits : min((c+1)<<q.bits, len(q.content))]
				for i := range part {
					part[i] = byte(r.IntN(4))
				}
			}
		}
		q.stored = func(c int) storage { return kinds[c] }
		img, err := open(t, path, q.bytes(t))
		if err != nil {
			rt.Fatal(err)
		}
		defer img.close()
		if img.kind() != formatQCOW2 || img.size() != int64(len(q.content)) {
			rt.Fatalf("%v of %d bytes", img.kind(), img.size())
		}
		for range 10 {
			from := r.IntN(len(q.content) + 1)
			got := make([]byte, r.IntN(len(q.content)-from+1))
			if err := img.readAt(got, int64(from)); err != nil {
				rt.Fatal(err)
			}
			if !bytes.Equal(got, q.content[from:][:len(got)]) {
				rt.Fatalf("%d bytes at %d are others", len(got), from)
			}
		}
		for off := int64(0); off < img.size(); {
			from, to, err := img.nextData(t.Context(), off)
			if err != nil {
				rt.Fatal(err)
			}
			if from < off || to < from || len(bytes.Trim(q.content[off:from], "\x00")) > 0 {
				rt.Fatalf("data from %d to %d behind %d", from, to, off)
			}
			off = max(to, from)
		}
	})
}

// TestQCOWWithBackingFile: its own clusters are read, and the file beside is not.
func TestQCOWWithBackingFile(t *testing.T) {
	dir := t.TempDir()
	secret := pages(7, 7)
	base := write(t, filepath.Join(dir, "base"), secret)
	q := qcowImage{version: 3, bits: 12, content: pages(1, 0, 2), backing: base,
		stored: func(c int) storage { return []storage{plain, hole, plain}[c] }}
	x, err := indexed(t, dir, write(t, filepath.Join(dir, "top"), q.bytes(t)), 10)
	if err != nil {
		t.Fatal(err)
	}
	defer x.release()
	for n, want := range map[int]bool{1: true, 2: true, 7: false} {
		if _, ok := x.find(compress.Sum(pages(n))); ok != want {
			t.Errorf("page %d found: %v", n, ok)
		}
	}
}

// TestQCOWThatIsNotRead: what can't be read is said.
func TestQCOWThatIsNotRead(t *testing.T) {
	base := qcowImage{version: 3, bits: 16, content: pages(1), stored: func(int) storage { return plain }}
	path := filepath.Join(t.TempDir(), "image")
	for want, change := range map[string]func(q *qcowImage, b []byte){
		"encrypted":           func(_ *qcowImage, b []byte) { b[35] = 1 },
		"another file":        func(_ *qcowImage, b []byte) { b[79] = featureDataFile },
		"extended_l2":         func(_ *qcowImage, b []byte) { b[79] = featureExtendedL2 },
		"unknown features":    func(_ *qcowImage, b []byte) { b[72] = 1 },
		"version 4":           func(_ *qcowImage, b []byte) { b[7] = 4 },
		"clusters of 2^8":     func(_ *qcowImage, b []byte) { b[23] = 8 },
		"clusters of 2^22":    func(_ *qcowImage, b []byte) { b[23] = 22 },
		"compression of type": func(_ *qcowImage, b []byte) { b[79], b[104] = featureCompression, 2 },
		"level 1 table":       func(_ *qcowImage, b []byte) { b[36] = 1 },
		"sizes out of bounds": func(_ *qcowImage, b []byte) { b[24] = 0xff },
	} {
		b := base.bytes(t)
		change(&base, b)
		if img, err := open(t, path, b); !errors.Is(err, errQCOW) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", want, img, err)
		}
	}
	b := base.bytes(t)
	for i := 4; i < qcowHeaderV3; i++ {
		if img, err := open(t, path, b[:i]); !errors.Is(err, errQCOW) {
			t.Errorf("the first %d bytes: %v, %v", i, img, err)
		}
	}
}

// TestQCOWThatRepeats: tables that lead to the same cluster again and again don't
// keep the indexing busy.
func TestQCOWThatRepeats(t *testing.T) {
	dir := t.TempDir()
	for name, kind := range map[string]storage{"plain": plain, "packed": packed} {
		q := qcowImage{version: 3, bits: 16, content: make([]byte, 64<<20), stored: func(c int) storage {
			if c == 0 {
				return kind
			}
			return hole
		}}
		fill(q.content[:1<<16], 3)
		b := q.bytes(t)
		const l2 = 2 << 16
		for c := 1; c < 1024; c++ {
			copy(b[l2+c*8:], b[l2:l2+8])
		}
		if _, err := indexed(t, dir, write(t, filepath.Join(dir, name), b), 100); !errors.Is(err, errRepeated) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDamagedClustersAreLeftOut: what can be read of an image is of use, unless
// there is too much that can't.
func TestDamagedClustersAreLeftOut(t *testing.T) {
	dir := t.TempDir()
	numbers := make([]int, maxBad)
	for i := range numbers {
		numbers[i] = i + 1
	}
	q := qcowImage{version: 3, bits: 12, content: pages(numbers...), stored: func(int) storage { return packed }}
	damage := func(n int) (*index, error, error) {
		b := q.bytes(t)
		l2 := b[2<<12:]
		for c := range n {
			off := binary.BigEndian.Uint64(l2[c*8:]) & (1<<50 - 1)
			copy(b[off:], []byte{0xff, 0xff, 0xff, 0xff}) // a block of a type that there is not
		}
		path := write(t, filepath.Join(dir, "image"), b)
		img, err := open(t, path, b)
		if err != nil {
			t.Fatal(err)
		}
		defer img.close()
		bu := builder{folder: dir, most: 100, fault: func(string) error { return nil }, done: func(int64, int64) {}, pace: func(context.Context, int) error { return nil }}
		unread, err := bu.build(t.Context(), path, time.Unix(1, 0), identity{}, img)
		if err != nil {
			return nil, unread, err
		}
		x, err := openIndex(indexPath(dir, path))
		return x, unread, err
	}
	x, unread, err := damage(1)
	if err != nil || !errors.Is(unread, errQCOW) || x.count != maxBad-1 {
		t.Errorf("one bad cluster: %v, %v", unread, err)
	}
	x.release()
	if _, _, err := damage(maxBad); !errors.Is(err, errQCOW) {
		t.Errorf("all clusters bad: %v", err)
	}
}

// FuzzQCOW reads whatever claims to be an image.
func FuzzQCOW(f *testing.F) {
	for _, q := range []qcowImage{
		{version: 2, bits: 9}, {version: 3, bits: 12}, {version: 3, bits: 16}, {version: 3, bits: 12, zstd: true},
	} {
		q.content = pages(1, 0, 2, 0, 3)
		for _, kind := range []storage{hole, plain, packed} {
			q.stored = func(int) storage { return kind }
			f.Add(q.bytes(f))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		img, err := open(t, filepath.Join(dir, "image"), append([]byte(qcowMagic), b[min(4, len(b)):]...))
		if err != nil {
			return
		}
		defer img.close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		read := int64(0)
		bu := builder{folder: dir, most: 100, fault: func(string) error { return nil }, done: func(int64, int64) {}, pace: func(ctx context.Context, n int) error {
			if read += int64(n); read > 16<<20 { // hostile input may be long, not endless
				cancel()
			}
			return ctx.Err()
		}}
		_, _ = bu.collect(ctx, img) // any error will do
	})
}

func FuzzDecompress(f *testing.F) {
	q := qcowImage{bits: 12}
	f.Add(q.pack(f, pages(1)), false)
	f.Add(q.pack(f, pages(0)), false)
	q.zstd = true
	f.Add(q.pack(f, pages(1)), true)
	f.Add(append(q.pack(f, pages(0)), "what follows"...), true)
	f.Fuzz(func(t *testing.T, b []byte, zstd bool) {
		d := decompressor{isZstd: zstd}
		defer d.close()
		q := qcowImage{bits: 12, zstd: zstd}
		for range 2 { // whatever came before, what is good is read
			got := make([]byte, page)
			_ = d.decompress(got, b)
			if err := d.decompress(got, q.pack(t, pages(1))); err != nil || !bytes.Equal(got, pages(1)) {
				t.Fatalf("after it: %v", err)
			}
		}
	})
}
