package memsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/wanmig/wanmig/compress"
)

// pages are what a destination holds, on its disks.
type pages map[compress.Fingerprint][]byte

func (h pages) add(p []byte) { h[compress.Sum(p)] = bytes.Clone(p) }

func (h pages) Search(_ context.Context, sums []compress.Fingerprint) ([]compress.Origin, []byte) {
	found, content := make([]compress.Origin, len(sums)), []byte(nil)
	for i, sum := range sums {
		if p := h[sum]; p != nil {
			found[i] = compress.OnDisk
			content = append(content, make([]byte, i*storePage-len(content))...)
			content = append(content, p...)
		}
	}
	return found, append(content, make([]byte, len(sums)*storePage-len(content))...)
}

// somePages are those that the tests of hostile frames count on.
var somePages = func() pages {
	h := pages{}
	for i := range uint64(4) {
		h.add(content(i))
	}
	return h
}()

// fickle holds pages at one moment and not at the next, now here and now there.
type fickle struct {
	pages
	mu   sync.Mutex
	rand *rand.Rand
	none bool
}

func newFickle(t *rapid.T, list [][]byte) *fickle {
	f := &fickle{pages: pages{}, rand: rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "mood"), 1)), none: rapid.Bool().Draw(t, "nil for nothing")}
	for _, p := range list {
		f.add(p)
	}
	return f
}

func (f *fickle) Search(ctx context.Context, sums []compress.Fingerprint) ([]compress.Origin, []byte) {
	found, content := f.pages.Search(ctx, sums)
	f.mu.Lock()
	defer f.mu.Unlock()
	nothing := true
	for i, o := range found {
		if o != compress.Nowhere {
			found[i] = compress.Origin(f.rand.IntN(4))
			nothing = nothing && found[i] == compress.Nowhere
		}
	}
	if nothing && f.none {
		content = nil
	}
	return found, content
}

func offerFrame(number uint32, list ...[]byte) []byte {
	f := binary.BigEndian.AppendUint32([]byte{frameOffer}, number)
	for _, p := range list {
		sum := compress.Sum(p)
		f = append(f, sum[:]...)
	}
	return f
}

// useFrame is a batch for the oldest offer.
func useFrame(crc uint32, ops, contents []byte) []byte {
	f := sectionsFrame(crc, ops, nil, contents)
	f[0] = frameUse
	return f
}

func tooManyOffers(page []byte) (frames [][]byte) {
	for i := range uint32(maxOffers + 1) {
		frames = append(frames, offerFrame(i, page))
	}
	return frames
}

// What the destination holds is not sent, and comes out all the same.
func TestOffered(t *testing.T) {
	s := head(true)
	s.device()
	s.description()
	have := pages{}
	for _, p := range s.pages[:100] {
		have.add(p)
	}
	plain := carry(s.Bytes())
	plain.check(t, s.Bytes())
	c := carryOffered(1000*storePage, have, 0, s.Bytes(), 5000)
	c.check(t, s.Bytes())
	if c.src != nil || c.tails != 1 {
		t.Errorf("source: %v, %d tails", c.src, c.tails)
	}
	st := c.source.Stats()
	if r := st.Reduction; r.Disk.Pages != 100 || r.Disk.StreamBytes < 100*storePage || r.Disk.WireBytes < 100*16 || r.Disk.WireBytes > 100*40 ||
		r.Data.Pages != plain.source.Stats().Reduction.Data.Pages-100 || r.Seed.Pages+r.Old.Pages > 0 {
		t.Errorf("%+v", r)
	}
	if limit := plain.source.Stats().WireBytes - 100*storePage/3; st.WireBytes > limit {
		t.Errorf("%d wire bytes, %d with nothing held", st.WireBytes, plain.source.Stats().WireBytes)
	}
	for _, store := range []int64{0, storePage, 7 * storePage} {
		carryOffered(store, have, 0, s.Bytes()).check(t, s.Bytes())
	}
}

// Content that is not what it is said to be does not reach QEMU.
func TestWrongContent(t *testing.T) {
	s := head(true)
	s.device()
	s.description()
	have := pages{}
	for _, p := range s.pages {
		have[compress.Sum(p)] = content(1 << 40)
	}
	c := carryOffered(1000*storePage, have, 0, s.Bytes())
	if !errors.Is(c.dest, ErrFrame) || !bytes.HasPrefix(s.Bytes(), c.out) {
		t.Errorf("destination: %v", c.dest)
	}
}

// bubble is a Source and its peer without a clock. Frames are kept.
type bubble struct {
	source  *Source
	qemu    *counter
	returns *channel
	done    chan error

	mu     sync.Mutex
	frames [][]byte
}

// ended is a QEMU that has sent its stream and closed.
type ended struct{ *counter }

func (e ended) Read(p []byte) (int, error) {
	if e.n == len(e.data) {
		return 0, io.EOF
	}
	return e.counter.Read(p)
}

func newBubble(t *testing.T, data []byte, above uint64) *bubble {
	b := &bubble{qemu: &counter{data: data}, returns: newChannel(), done: make(chan error, 1)}
	b.source = NewSource(SourceConfig{QEMU: stall{ended{b.qemu}}, Return: b.returns, Store: 1 << 30, Frames: b})
	b.source.offerAbove = above
	go func() { b.done <- b.source.Run(t.Context()) }()
	b.settle()
	return b
}

func (b *bubble) Send(_ context.Context, f []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frames = append(b.frames, bytes.Clone(f))
	return nil
}

// settle waits until nothing more happens.
func (b *bubble) settle() {
	time.Sleep(time.Minute)
	synctest.Wait()
}

// count counts the frames of a type.
func (b *bubble) count(kind byte) (n int) {
	for _, f := range b.frames {
		if f[0] == kind {
			n++
		}
	}
	return n
}

// answer says that nothing of an offer is held.
func (b *bubble) answer(t *testing.T, number uint32) {
	for _, f := range b.frames {
		if f[0] == frameOffer && binary.BigEndian.Uint32(f[1:]) == number {
			n := (len(f) - numberHeader) / sumSize
			b.returns.Send(t.Context(), appendOrigins(binary.BigEndian.AppendUint32([]byte{frameHeld}, number), make([]compress.Origin, n)))
		}
	}
	b.settle()
}

func (b *bubble) stop(t *testing.T, want error) {
	t.Helper()
	b.returns.closeSend()
	if err := <-b.done; !errors.Is(err, want) {
		t.Errorf("Run: %v, want %v", err, want)
	}
}

// While offers are not answered the stream is read on, so far and no further,
// and nothing that comes after an offered batch overtakes it.
func TestPipelineIsBounded(t *testing.T) {
	data := guest("pages")
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, data, 0)
		if n := b.count(frameOffer); n != maxOffers {
			t.Errorf("%d offers are made, want %d", n, maxOffers)
		}
		if n := b.qemu.n; n < maxOffers*maxStream*9/10 || n > maxOffers*maxStream+1<<20 {
			t.Errorf("%d bytes were read of QEMU", n)
		}
		if n := b.count(frameUse) + b.count(frameTail); n > 0 {
			t.Errorf("%d batches were sent before an answer", n)
		}
		b.answer(t, 1)
		if n := b.count(frameUse); n > 0 {
			t.Error("a batch overtook another")
		}
		b.answer(t, 0)
		if n := b.count(frameUse); n != 2 {
			t.Errorf("%d batches were sent after two answers", n)
		}
		if n := b.count(frameOffer); n != maxOffers+2 {
			t.Errorf("%d offers are made, want two more", n)
		}
		b.stop(t, io.EOF)
	})
}

// Nothing is offered when little is left, and all answers are in by then.
func TestNoOffersAtTheEnd(t *testing.T) {
	data := guest("pages")
	const above, pages = 4 << 20, 16 << 10
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, data, above)
		for next := uint32(0); b.count(frameTail) == 0; next++ {
			if b.count(frameOffer) <= int(next) {
				t.Fatalf("stuck after %d answers", next)
			}
			b.answer(t, next)
		}
		offered, after := 0, 0
		for _, f := range b.frames {
			switch f[0] {
			case frameOffer:
				offered += (len(f) - numberHeader) / sumSize
				after = 0
			case frameBatch:
				after++
			}
		}
		if after < above/maxStream {
			t.Errorf("%d batches come after the last offer", after)
		}
		// After patience with nothing found, and what is on its way, only a sample
		// of the batches is offered.
		ahead := maxOffers * maxOffered
		if most := pages - above/storePage; offered < patience || offered > patience+ahead+(most-ahead-patience)/sampling+2*maxOffered {
			t.Errorf("%d pages were offered of %d", offered, most)
		}
		if err := <-b.done; err != nil {
			t.Error(err)
		}
	})
}

// A first pass that never ends, as free pages are not sent, does not keep the
// later rounds waiting in a deep pipeline.
func TestLaterRoundsAreShallow(t *testing.T) {
	const mib = 1 << 20 / testPage
	s := &stream{}
	s.header()
	s.section(sectionStart, ramSection, ramName, ramVersion)
	s.u64(1024*mib*testPage | flagSizes)
	s.name(mainBlock)
	s.u64(1024 * mib * testPage)
	s.contentsEnd()
	s.part(sectionPart)
	s.page(0, mainBlock, content(0))
	for i := range 4 * mib {
		s.zero(i%10, "")
	}
	seed := uint64(1)
	for range 3 * mib {
		s.page(int(seed%10), "", content(seed))
		seed++
	}
	data := s.Bytes()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		b := &bubble{qemu: &counter{data: data}, returns: newChannel(), done: make(chan error, 1)}
		blocking := sendFunc(func(ctx context.Context, f []byte) error {
			if f[0] == frameBatch {
				select {
				case <-release:
				case <-ctx.Done():
				}
			}
			return b.Send(ctx, f)
		})
		b.source = NewSource(SourceConfig{QEMU: stall{ended{b.qemu}}, Return: b.returns, Store: 1 << 30, Frames: blocking})
		go func() { b.done <- b.source.Run(t.Context()) }()
		b.settle()
		b.answer(t, 0)
		if n := b.qemu.n; n > 1<<20 {
			t.Errorf("%d bytes were read of QEMU while no batch could be sent", n)
		}
		close(release)
		if err := <-b.done; !errors.Is(err, ErrAborted) {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestBadAnswers(t *testing.T) {
	data := guest("pages")
	held := func(number uint32, origins ...byte) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{frameHeld}, number), origins...)
	}
	right := func(f []byte) int { return ((len(f)-numberHeader)/sumSize + 3) / 4 }
	for name, answers := range map[string]func(offer []byte) [][]byte{
		"without number":   func([]byte) [][]byte { return [][]byte{{frameHeld, 0, 0, 0}} },
		"nothing":          func([]byte) [][]byte { return [][]byte{held(0)} },
		"short":            func(f []byte) [][]byte { return [][]byte{held(0, make([]byte, right(f)-1)...)} },
		"long":             func(f []byte) [][]byte { return [][]byte{held(0, make([]byte, right(f)+1)...)} },
		"offer not made":   func(f []byte) [][]byte { return [][]byte{held(maxOffers, make([]byte, right(f))...)} },
		"beyond the pages": func(f []byte) [][]byte { return [][]byte{held(0, bytes.Repeat([]byte{0xff}, right(f))...)} },
		"twice": func(f []byte) [][]byte {
			return [][]byte{held(1, make([]byte, right(f))...), held(1, make([]byte, right(f))...)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBubble(t, data, 0)
				i := slices.IndexFunc(b.frames, func(f []byte) bool { return f[0] == frameOffer })
				for _, a := range answers(b.frames[i]) {
					b.returns.Send(t.Context(), a)
				}
				b.stop(t, ErrFrame)
			})
		})
	}
}

func TestOriginsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(rapid.Map(rapid.IntRange(0, 3), func(i int) compress.Origin { return compress.Origin(i) }), 1, maxOffered).Draw(t, "origins")
		b := appendOrigins(nil, list)
		got, err := parseOrigins(nil, b, len(list))
		if err != nil || !slices.Equal(got, list) {
			t.Fatalf("%v became %v: %v", list, got, err)
		}
		for n := range b {
			if _, err := parseOrigins(nil, b[:n], len(list)); !errors.Is(err, ErrFrame) {
				t.Fatalf("%d of %d bytes: %v", n, len(b), err)
			}
		}
	})
}

func FuzzOrigins(f *testing.F) {
	f.Add([]byte{0x1b, 2}, 5)
	f.Add([]byte{0xff}, 3)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if n < 0 || n > maxOffered {
			return
		}
		list, err := parseOrigins(nil, b, n)
		if err == nil && !bytes.Equal(appendOrigins(nil, list), b) || err != nil && !errors.Is(err, ErrFrame) {
			t.Fatalf("%x as %d origins: %v, %v", b, n, list, err)
		}
	})
}

func FuzzOffer(f *testing.F) {
	f.Add(offerFrame(0, content(1)), uint32(0))
	f.Add(offerFrame(7, content(1), content(2)), uint32(7))
	f.Add([]byte{frameOffer}, uint32(0))
	f.Fuzz(func(t *testing.T, frame []byte, next uint32) {
		if len(frame) == 0 || frame[0] != frameOffer {
			return
		}
		sums, err := parseOffer(frame, next)
		if err != nil {
			if !errors.Is(err, ErrFrame) {
				t.Fatal(err)
			}
			return
		}
		again := binary.BigEndian.AppendUint32([]byte{frameOffer}, next)
		for _, s := range sums {
			again = append(again, s[:]...)
		}
		if !bytes.Equal(again, frame) || len(sums) > maxOffered {
			t.Fatalf("offer of %d pages, %x", len(sums), frame)
		}
	})
}

// wan is a link with a rate and a delay, and a destination at its other end that
// finds half of what is offered.
type wan struct {
	busy    chan struct{}
	returns chan []byte
	bytes   int
}

const (
	wanRate  = 100e6 / 8
	wanDelay = 25 * time.Millisecond
)

func (w *wan) Send(_ context.Context, f []byte) error {
	w.busy <- struct{}{}
	time.Sleep(time.Duration(float64(len(f)) / wanRate * float64(time.Second)))
	w.bytes += len(f)
	<-w.busy
	if f[0] == frameOffer {
		origins := make([]compress.Origin, (len(f)-numberHeader)/sumSize)
		for i := range origins {
			origins[i] = compress.Origin(i % 2)
		}
		answer := appendOrigins(append([]byte{frameHeld}, f[1:numberHeader]...), origins)
		time.AfterFunc(2*wanDelay, func() { w.returns <- answer })
	}
	return nil
}

func (w *wan) Recv(ctx context.Context, _ []byte) ([]byte, error) {
	select {
	case f := <-w.returns:
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// The link is never idle for an answer but the first.
func TestAnswersCostNoTime(t *testing.T) {
	data := guest("pages")
	synctest.Test(t, func(t *testing.T) {
		w := &wan{busy: make(chan struct{}, 1), returns: make(chan []byte, maxOffers)}
		s := NewSource(SourceConfig{QEMU: &script{data: data}, Frames: w, Return: w, Store: 1 << 30})
		s.offerAbove = 0
		start := time.Now()
		if err := s.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		took, least := time.Since(start), time.Duration(float64(w.bytes)/wanRate*float64(time.Second))
		if r := s.Stats().Reduction; r.Disk.Pages < 8000 || r.Data.Pages < 8000 {
			t.Fatalf("%+v", r)
		}
		if took > least+2*wanDelay+10*time.Millisecond {
			t.Errorf("%v for %d bytes that take the link %v", took, w.bytes, least)
		}
	})
}
