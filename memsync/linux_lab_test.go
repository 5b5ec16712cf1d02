//go:build lab

package memsync

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/compress"
)

// startLinux boots the lab's guest, Debian's kernel and a program that rewrites
// memory, from the images that `wanlab image` has made.
func startLinux(t testing.TB) *qemu {
	t.Helper()
	cache := os.Getenv("WANLAB_CACHE")
	if cache == "" {
		cache = "/var/cache/wanlab"
	}
	newest := func(pattern string) string {
		files, err := filepath.Glob(filepath.Join(cache, pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s has no %s: run wanlab image", cache, pattern)
		}
		return slices.MaxFunc(files, func(a, b string) int {
			x, errX := os.Stat(a)
			y, errY := os.Stat(b)
			if errX != nil || errY != nil {
				t.Fatal(errX, errY)
			}
			return x.ModTime().Compare(y.ModTime())
		})
	}
	console := filepath.Join(t.TempDir(), "console")
	q := startQEMU(t, "pc", "-m", "512", "-serial", "file:"+console,
		"-kernel", newest("package-linux-image-*-cloud-amd64/boot/vmlinuz-*"), "-initrd", newest("initrd-*"),
		"-append", "console=ttyS0 quiet mitigations=off wanlab.name=captured wanlab.working-set=128MiB wanlab.dirty=8MiB")
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if said, err := os.ReadFile(console); err == nil && strings.Contains(string(said), "guest is up") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the guest does not come up")
		}
	}
	return q
}

// sentTwice is a stream whose RAM is sent twice, and where the second time
// begins.
func sentTwice(t testing.TB, data []byte) (twice []byte, second int) {
	t.Helper()
	end := []byte{0, 0, 0, 0, 0, 0, 0, flagContentsEnd, sectionFooter, 0, 0, 0, ramSection}
	first := bytes.Index(data, append(bytes.Clone(end), sectionPart, 0, 0, 0, ramSection))
	last := bytes.LastIndex(data, append(bytes.Clone(end), sectionLast, 0, 0, 0, ramSection))
	if first < 0 || last < first {
		t.Fatal("no parts of RAM in the stream")
	}
	first, last = first+len(end), last+len(end)
	return slices.Concat(data[:last], data[first:]), last
}

// from is a script that tells when it is read from a place on.
type from struct {
	script
	left  int
	begin func()
}

func (f *from) Read(p []byte) (int, error) {
	if f.left > 0 {
		n, err := f.script.Read(p[:min(len(p), f.left)])
		f.left -= n
		return n, err
	}
	if f.begin != nil {
		f.begin()
		f.begin = nil
	}
	return f.script.Read(p)
}

// BenchmarkCaptured takes the stream of a Linux guest through Source and the
// decoder of Dest. MB/s are of pages with content; zero pages come on top.
func BenchmarkCaptured(b *testing.B) {
	q := startLinux(b)
	q.do("stop", nil, nil) // each page is then sent once
	file := filepath.Join(q.dir, "stream")
	q.do("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30}, nil)
	q.do("migrate", map[string]any{"uri": "exec:cat > " + file}, nil)
	q.await("query-migrate", "completed")
	data, err := os.ReadFile(file)
	if err != nil {
		b.Fatal(err)
	}
	twice, second := sentTwice(b, data)
	pages := encodeGuest(b, data, 0, coder.Encode, newOracle(compress.Nowhere, nil), nil).Pages
	if pages*storePage < 128<<20 {
		b.Fatalf("only %d pages have content", pages)
	}
	for _, c := range []struct {
		name   string
		data   []byte
		begin  int // where what counts begins
		encode encoder
		found  compress.Origin // what is offered
	}{
		{"new", data, 0, coder.Encode, compress.Nowhere},
		{"new, fastest level", data, 0, fastest(b), compress.Nowhere},
		{"on disk", data, 0, coder.Encode, compress.OnDisk},
		{"known", twice, second, coder.Encode, compress.Nowhere},
	} {
		b.Run(c.name+"/encode", func(b *testing.B) {
			measure(b, pages*storePage, func(begin func()) {
				encodeGuest(b, c.data, c.begin, c.encode, newOracle(c.found, nil), begin)
			})
		})
		if c.found != compress.Nowhere {
			continue // what is decoded then is not in the frames
		}
		b.Run(c.name+"/decode", func(b *testing.B) {
			var k keep
			st := encodeGuest(b, c.data, 0, c.encode, newOracle(c.found, &k), nil)
			measure(b, pages*storePage, func(begin func()) { decodeGuest(b, k.frames, c.begin, begin) })
			b.ReportMetric(float64(st.WireBytes)/float64(st.StreamBytes), "wire/stream")
		})
	}
}

// measure times work from its call of begin on. As other programs may run
// beside it, it also reports MB for each second of processor time.
func measure(b *testing.B, bytes uint64, work func(begin func())) {
	cpu := func() (s float64) {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
	}
	b.SetBytes(int64(bytes))
	b.ReportAllocs()
	var busy float64
	for b.Loop() {
		b.StopTimer()
		var before float64
		work(func() {
			before = cpu()
			b.StartTimer()
		})
		busy += cpu() - before
	}
	b.ReportMetric(float64(bytes)*float64(b.N)/1e6/busy, "MB/cpu-s")
}

const guestStore = 1 << 30 // holds all of the guest

type encoder = func(dst, src []byte) ([]byte, compress.Method)

// fastest is zstd at the level that package compress is to use on fast links.
func fastest(tb testing.TB) encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true))
	if err != nil {
		tb.Fatal(err)
	}
	return func(dst, src []byte) ([]byte, compress.Method) {
		if len(src) == 0 {
			return dst, compress.Raw
		}
		return e.EncodeAll(src, dst), compress.Zstd
	}
}

// encodeGuest takes a stream through a Source, and calls begin when it has read
// up to a place.
func encodeGuest(tb testing.TB, data []byte, at int, e encoder, o *oracle, begin func()) Stats {
	s := NewSource(SourceConfig{QEMU: &from{script{data: data}, at, begin}, Frames: o, Return: o, Store: guestStore})
	s.pipeline.press.encode = e
	if err := s.Run(context.Background()); err != nil {
		tb.Fatal(err)
	}
	return s.Stats()
}

// decodeGuest decodes frames, and calls begin when it has decoded so many bytes.
func decodeGuest(tb testing.TB, frames [][]byte, at int, begin func()) {
	u, err := newUnbatch(slotsIn(guestStore))
	if err != nil {
		tb.Fatal(err)
	}
	defer u.close()
	n := 0
	for _, f := range frames {
		if f[0] != frameBatch && f[0] != frameUse {
			continue
		}
		if n >= at && begin != nil {
			begin()
			begin = nil
		}
		p, err := u.decode(f)
		if err != nil {
			tb.Fatal(err)
		}
		n += len(p)
	}
}
