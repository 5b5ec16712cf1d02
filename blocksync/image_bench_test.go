//go:build bench

package blocksync

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/wanmig/wanmig/compress"
)

// debianImage is 256 MiB of content of the Debian system that `wanlab image
// --debian` has made.
func debianImage(tb testing.TB) []byte {
	tb.Helper()
	cache := os.Getenv("WANLAB_CACHE")
	if cache == "" {
		cache = "/var/cache/wanlab"
	}
	files, err := filepath.Glob(filepath.Join(cache, "debian", "debian-*", "disk.raw"))
	if err != nil || len(files) == 0 {
		tb.Fatalf("%s has no Debian image: run wanlab image --debian", cache)
	}
	f, err := os.Open(files[0])
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	const size = 256 << 20
	content, block := make([]byte, 0, size), make([]byte, blockSize)
	for len(content) < size {
		if _, err := io.ReadFull(f, block); err != nil {
			tb.Fatalf("%s has less content than expected: %v", files[0], err)
		}
		if !isZero(block) {
			content = append(content, block...)
		}
	}
	return content
}

// BenchmarkImage is the disk path on a real image, by one core: from the mirror's
// write to the frames, and from frames to the device.
func BenchmarkImage(b *testing.B) {
	content := debianImage(b)
	size := int64(len(content))
	fastest := compress.NewEncoder(1)
	fastest.Awaited(time.Hour) // as where the link waits
	time.Sleep(time.Second)
	fastest.Sent(0)
	source := func(b *testing.B, p []byte, encoder *compress.Encoder, held bool) (o *Outbox, path func(see func(*job))) {
		budget := newBudget(b, 64<<20, 0)
		o = newOutbox(b, size, budget)
		image, err := newImage(size)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = image.close() })
		o.image = image
		return o, func(see func(*job)) {
			j := &job{}
			for off := int64(0); off < size; off += jobSize {
				if err := o.WriteAt(context.Background(), p[off:off+jobSize], off, false); err != nil {
					b.Fatal(err)
				}
				if err := o.take(context.Background(), j); err != nil {
					b.Fatal(err)
				}
				if err := o.collect(j); err != nil {
					b.Fatal(err)
				}
				o.recall(j)
				if held && j.offer(blockUnit) {
					for range (countUnits(j.extents, blockUnit) + 3) / 4 {
						j.held = append(j.held, 0xaa) // all in seeds
					}
				}
				j.encode(encoder.Encode)
				if see != nil {
					see(j)
				}
				o.stats.InFlight -= j.content
			}
		}
	}
	for name, kind := range map[string]struct {
		content        []byte
		again, offered bool
	}{
		"zero":               {content: make([]byte, size)},
		"written again":      {content: content, again: true},
		"held in seeds":      {content: content, offered: true},
		"new, fastest level": {content: content},
	} {
		b.Run(name+"/encode", func(b *testing.B) {
			o, path := source(b, kind.content, fastest, kind.offered)
			if kind.again {
				path(nil)
			}
			b.SetBytes(size)
			for b.Loop() {
				if !kind.again {
					clear(o.image.known)
				}
				path(nil)
			}
		})
	}
	b.Run("new, fastest level/decode", func(b *testing.B) {
		var frames [][]byte
		_, path := source(b, content, fastest, false)
		path(func(j *job) { frames = append(frames, append([]byte(nil), j.dataFrame...)) })
		d := newDisk(size)
		b.SetBytes(size)
		for b.Loop() {
			t := NewTarget(d, newContent(b, size), false)
			ctx, cancel := context.WithCancelCause(context.Background())
			w := newWriters(ctx, cancel)
			var into data
			for _, frame := range frames {
				if err := t.data(w, &into, frame[1:]); err != nil {
					b.Fatal(err)
				}
			}
			if err := w.wait(); err != nil {
				b.Fatal(err)
			}
			cancel(nil)
		}
	})
}
