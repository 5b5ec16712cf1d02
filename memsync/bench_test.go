package memsync

import (
	"context"
	"errors"
	"hash/crc32"
	"io"
	"runtime"
	"testing"
)

func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// kinds are streams of one kind of page each, 64 MiB of guest memory.
func kinds() map[string][]byte {
	const pages = 16 << 10
	build := func(add func(s *stream, i int, block string)) []byte {
		s := &stream{}
		s.header()
		s.section(sectionStart, ramSection, ramName, ramVersion)
		s.u64(pages*testPage | flagSizes)
		s.name(mainBlock)
		s.u64(pages * testPage)
		s.contentsEnd()
		s.part(sectionPart)
		for i := range pages {
			block := ""
			if i == 0 {
				block = mainBlock
			}
			add(s, i, block)
		}
		s.contentsEnd()
		s.part(sectionLast)
		s.contentsEnd()
		s.device()
		s.description()
		return s.Bytes()
	}
	return map[string][]byte{
		"zero":  build(func(s *stream, i int, b string) { s.zero(i, b) }),
		"pages": build(func(s *stream, i int, b string) { s.page(i, b, content(uint64(i))) }),
		"mixed": build(func(s *stream, i int, b string) {
			if i%3 == 0 {
				s.zero(i, b)
			} else {
				s.page(i, b, content(uint64(i)))
			}
		}),
	}
}

// keep is a channel that remembers frames.
type keep struct{ frames [][]byte }

func (k *keep) Send(_ context.Context, f []byte) error {
	k.frames = append(k.frames, append([]byte(nil), f...))
	return nil
}

// drop is a channel to nowhere.
type drop struct{}

func (drop) Send(context.Context, []byte) error { return nil }
func (drop) Recv(ctx context.Context, _ []byte) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func encode(tb testing.TB, data []byte, frames frameWriter) {
	tb.Helper()
	s := NewSource(SourceConfig{QEMU: &script{data: data}, Frames: frames, Return: drop{}})
	if err := s.Run(context.Background()); err != nil {
		tb.Fatal(err)
	}
}

// decode runs the frames through Dest's decoder, up to the writes to QEMU.
func decode(tb testing.TB, frames [][]byte, u *unbatch) (n int) {
	tb.Helper()
	for _, f := range frames {
		if f[0] != frameBatch {
			continue
		}
		p, err := u.decode(f)
		if err != nil {
			tb.Fatal(err)
		}
		n += len(p)
	}
	return n
}

func BenchmarkEncode(b *testing.B) {
	for name, data := range kinds() {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				encode(b, data, drop{})
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, data := range kinds() {
		b.Run(name, func(b *testing.B) {
			var k keep
			encode(b, data, &k)
			var u unbatch
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				decode(b, k.frames, &u)
			}
		})
	}
}

// The way of a page allocates nothing; what a stream allocates is its setup.
func TestNoAllocationPerPage(t *testing.T) {
	data := kinds()["mixed"]
	mallocs := func(work func()) uint64 {
		work() // fills the pools
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		work()
		runtime.ReadMemStats(&after)
		return after.Mallocs - before.Mallocs
	}
	const limit = 1000 // for 16,384 pages
	if n := mallocs(func() { encode(t, data, drop{}) }); n > limit {
		t.Errorf("encode: %d allocations", n)
	}
	var k keep
	encode(t, data, &k)
	var u unbatch
	if n := mallocs(func() { decode(t, k.frames, &u) }); n > limit {
		t.Errorf("decode: %d allocations", n)
	}
}

var errStop = errors.New("stop")

// stall is a QEMU whose socket never has enough.
type stall struct{ io.Reader }

func (stall) Write(p []byte) (int, error) { return len(p), nil }
func (stall) Close() error                { return nil }

// A caller that blocks takes no more than a shallow buffer from QEMU.
func TestShallow(t *testing.T) {
	data := kinds()["pages"]
	blocked := make(chan struct{})
	ctx, cancel := context.WithCancelCause(t.Context())
	reads := &counter{data: data}
	s := NewSource(SourceConfig{QEMU: stall{reads}, Return: drop{}, Frames: sendFunc(func(ctx context.Context, _ []byte) error {
		close(blocked)
		<-ctx.Done()
		return ctx.Err()
	})})
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	<-blocked
	cancel(errStop)
	if err := <-done; !errors.Is(err, errStop) {
		t.Errorf("Run: %v", err)
	}
	if reads.n > 1<<20 {
		t.Errorf("%d bytes were read from QEMU while no frame could be sent", reads.n)
	}
}

type sendFunc func(context.Context, []byte) error

func (f sendFunc) Send(ctx context.Context, frame []byte) error { return f(ctx, frame) }

type counter struct {
	data []byte
	n    int
}

func (c *counter) Read(p []byte) (int, error) {
	n := copy(p, c.data[c.n:])
	c.n += n
	return n, nil
}
