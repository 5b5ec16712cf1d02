package memsync

import (
	"context"
	"errors"
	"hash/crc32"
	"io"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/wanmig/wanmig/compress"
)

func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// guests are kinds of pages that a guest of 64 MiB may have.
var guests = map[string]func(s *stream, i int, block string){
	"zero":  func(s *stream, i int, b string) { s.zero(i, b) },
	"pages": func(s *stream, i int, b string) { s.page(i, b, content(uint64(i))) },
	"changed": func(s *stream, i int, b string) {
		p := content(uint64(i % 2048))
		p[i%testPage]++
		s.page(i%2048, b, p)
	},
	"known": func(s *stream, i int, b string) { s.page(i%2048, b, content(uint64(i%2048))) },
	"mixed": func(s *stream, i int, b string) {
		if i%3 == 0 {
			s.zero(i, b)
		} else {
			s.page(i, b, content(uint64(i)))
		}
	},
}

// guest is a stream of 16,384 pages of one kind.
func guest(kind string) []byte {
	const pages = 16 << 10
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
		guests[kind](s, i, block)
	}
	s.contentsEnd()
	s.part(sectionLast)
	s.contentsEnd()
	s.device()
	s.description()
	return s.Bytes()
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

// oracle is a destination that finds all pages that are offered, or none. It
// remembers frames if it has where to.
type oracle struct {
	mu      sync.Mutex
	keep    *keep
	origins []byte // of an answer; enough of them
	offers  chan []byte
}

func newOracle(o compress.Origin, k *keep) *oracle {
	all := slices.Repeat([]compress.Origin{o}, maxOffered+originsPerByte)
	return &oracle{keep: k, origins: appendOrigins(nil, all), offers: make(chan []byte, maxOffers)}
}

func (o *oracle) Send(ctx context.Context, f []byte) error {
	if f[0] == frameOffer {
		answer := make([]byte, 1, 1+4+len(o.origins))
		pages := (len(f) - numberHeader) / sumSize
		answer[0] = frameHeld
		answer = append(answer, f[1:numberHeader]...)
		answer = append(answer, o.origins[:(pages+originsPerByte-1)/originsPerByte]...)
		if rest := pages % originsPerByte; rest > 0 {
			answer[len(answer)-1] &= 1<<(2*rest) - 1
		}
		o.offers <- answer
	}
	if o.keep != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.keep.Send(ctx, f)
	}
	return nil
}

func (o *oracle) Recv(ctx context.Context, _ []byte) ([]byte, error) {
	select {
	case f := <-o.offers:
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

const benchStore = 32 << 20 // half of a guest

func encode(tb testing.TB, data []byte, frames frameWriter) {
	tb.Helper()
	s := NewSource(SourceConfig{QEMU: &script{data: data}, Frames: frames, Return: drop{}, Store: benchStore})
	if err := s.Run(context.Background()); err != nil {
		tb.Fatal(err)
	}
}

// encodeOffered is encode with a destination that is asked.
func encodeOffered(tb testing.TB, data []byte, o *oracle) {
	tb.Helper()
	s := NewSource(SourceConfig{QEMU: &script{data: data}, Frames: o, Return: o, Store: benchStore})
	s.offerAbove = 0
	if err := s.Run(context.Background()); err != nil {
		tb.Fatal(err)
	}
}

func benchDecoder(tb testing.TB) *unbatch {
	tb.Helper()
	u, err := newUnbatch(slotsIn(benchStore))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { u.close() })
	return u
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
	for kind := range guests {
		b.Run(kind, func(b *testing.B) {
			data := guest(kind)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				encode(b, data, drop{})
			}
		})
	}
}

// BenchmarkOffered offers pages to a destination that has all, or none, of them.
func BenchmarkOffered(b *testing.B) {
	for _, o := range []compress.Origin{compress.OnDisk, compress.Nowhere} {
		b.Run(o.String(), func(b *testing.B) {
			data := guest("pages")
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				encodeOffered(b, data, newOracle(o, nil))
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for kind := range guests {
		b.Run(kind, func(b *testing.B) {
			data := guest(kind)
			var k keep
			encode(b, data, &k)
			u := benchDecoder(b)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				decode(b, k.frames, u)
			}
		})
	}
}

// The way of a page allocates nothing; what a stream allocates is its setup.
func TestNoAllocationPerPage(t *testing.T) {
	mallocs := func(work func()) uint64 {
		work() // fills the pools
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		work()
		runtime.ReadMemStats(&after)
		return after.Mallocs - before.Mallocs
	}
	const limit = 1000 // for 16,384 pages
	for _, kind := range []string{"mixed", "changed", "known"} {
		data := guest(kind)
		if n := mallocs(func() { encode(t, data, drop{}) }); n > limit {
			t.Errorf("%s: encode: %d allocations", kind, n)
		}
		for _, o := range []compress.Origin{compress.OnDisk, compress.Nowhere} {
			if n := mallocs(func() { encodeOffered(t, data, newOracle(o, nil)) }); n > 2*limit { // 256 are offers' answers
				t.Errorf("%s: encode what is found %s: %d allocations", kind, o, n)
			}
		}
		var k keep
		encode(t, data, &k)
		u := benchDecoder(t)
		if n := mallocs(func() { decode(t, k.frames, u) }); n > limit {
			t.Errorf("%s: decode: %d allocations", kind, n)
		}
	}
}

var errStop = errors.New("stop")

// stall is a QEMU whose socket never has enough.
type stall struct{ io.Reader }

func (stall) Write(p []byte) (int, error) { return len(p), nil }
func (stall) Close() error                { return nil }

// A caller that blocks takes no more than a shallow buffer from QEMU.
func TestShallow(t *testing.T) {
	data := guest("pages")
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
