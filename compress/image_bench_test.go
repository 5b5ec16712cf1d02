//go:build bench

package compress

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const imageBlock = 1 << 20 // as disks are sent

// image is the content of the Debian system that `wanlab image --debian` has
// made, without zeros: n blocks from all over it, or fewer if it has not so many.
func image(tb testing.TB, n int) (blocks [][]byte) {
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
	var block []byte
	zeros, part := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		switch _, err := io.ReadFull(f, part); {
		case err == io.EOF:
			if len(blocks) < n {
				n = len(blocks)
			}
			for i := range n {
				blocks[i] = blocks[i*len(blocks)/n]
			}
			return blocks[:n]
		case err != nil:
			tb.Fatal(err)
		}
		if bytes.Equal(part, zeros) {
			continue
		}
		if block = append(block, part...); len(block) == imageBlock {
			blocks, block = append(blocks, block), nil
		}
	}
}

// BenchmarkImage is what settings are chosen by.
func BenchmarkImage(b *testing.B) {
	blocks := image(b, 128)
	for l := range levels {
		b.Run(l.String(), func(b *testing.B) {
			z := l.encoder(1)
			benchmark(b, map[string][][]byte{"image": blocks}, func(dst, src []byte) []byte { return z.EncodeAll(src, dst) })
		})
	}
}

// link takes bytes at a rate, and a little ahead of it; 0 is no limit.
type link struct {
	rate float64
	free time.Time // when it has sent what it took
	sent int
}

func (l *link) take(n int) {
	l.sent += n
	if l.rate == 0 {
		return
	}
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
	const queue = 5 * time.Millisecond
	time.Sleep(l.free.Sub(now) - queue)
}

// send encodes blocks on all cores and sends them in order, as a disk is sent.
// It calls sent after each.
func send(e *Encoder, blocks [][]byte, l *link, sent func(took time.Duration)) {
	type job struct {
		src, dst []byte
		encoded  chan struct{}
	}
	const depth = 32
	order, encode, free := make(chan *job, depth), make(chan *job, depth), make(chan *job, depth)
	for range depth {
		free <- &job{encoded: make(chan struct{}, 1)}
	}
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for j := range encode {
				j.dst, _ = e.Encode(j.dst[:0], j.src)
				j.encoded <- struct{}{}
			}
		})
	}
	workers.Go(func() {
		for _, b := range blocks {
			j := <-free
			j.src = b
			order <- j
			encode <- j
		}
		close(order)
		close(encode)
	})
	for j := range order {
		<-j.encoded
		begun := time.Now()
		l.take(len(j.dst))
		sent(time.Since(begun))
		free <- j
	}
	workers.Wait()
}

// BenchmarkLink sends the image over links: at each level, and at the one that
// follows the link.
func BenchmarkLink(b *testing.B) {
	for _, l := range []struct {
		mbit   float64
		blocks int
	}{{20, 128}, {100, 384}, {1000, 1 << 20}, {0, 1 << 20}} {
		blocks := image(b, l.blocks)
		name := fmt.Sprintf("%g", l.mbit)
		if l.mbit == 0 {
			name = "no limit"
		}
		run := func(kind string, e *Encoder, sent func(time.Duration)) {
			b.Run(name+"/"+kind, func(b *testing.B) {
				for b.Loop() {
					var before, after unix.Rusage
					unix.Getrusage(unix.RUSAGE_SELF, &before)
					out := link{rate: l.mbit * 1e6 / 8}
					send(e, blocks, &out, sent)
					unix.Getrusage(unix.RUSAGE_SELF, &after)
					cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
					b.ReportMetric(float64(out.sent)/float64(len(blocks)*imageBlock)*100, "%sent")
					b.ReportMetric(float64(cpu)/1e9, "cpu-s")
				}
				b.ReportMetric(float64(e.control.level), "level") // at the end, fastest is 0
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(b.Elapsed().Seconds()/float64(b.N), "s")
			})
		}
		for level := range levels {
			if level < best || l.mbit == 20 { // else it would take a minute
				run(level.String(), at(level), func(time.Duration) {})
			}
		}
		e := NewEncoder(float64(runtime.GOMAXPROCS(0)))
		run("following", e, e.Sent)
	}
}
