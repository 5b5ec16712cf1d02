package memsync

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"
)

func TestRoundTrip(t *testing.T) {
	data := whole(true)
	c := carry(data)
	c.check(t, data)
	if c.src != nil {
		t.Fatal(c.src)
	}
	if c.tails != 1 {
		t.Errorf("OnTail was called %d times", c.tails)
	}
	if i := slices.Index(c.frameKinds, frameTail); i < 0 || slices.Contains(c.frameKinds[i+1:], frameTail) {
		t.Errorf("frames %x, want one tail", c.frameKinds)
	}
	if c.frameKinds[0] != frameStart || c.frameKinds[len(c.frameKinds)-1] != frameEnd {
		t.Errorf("frames %x, want start first and end last", c.frameKinds)
	}
	got := c.source.Stats()
	wire := got.WireBytes
	got.WireBytes, got.Reduction = 0, Reduction{}
	want := Stats{
		StreamBytes: uint64(len(data)),
		Pages:       150 + 3 + 1,
		ZeroPages:   150 + 2,
		Parts:       2,
		TailBytes:   uint64(len(data) - head(true).Len()),
		RAMBytes:    (mainPages + romPages) * testPage,
		PageSize:    testPage,
		UnseenPages: romPages - 2,
		Tail:        true,
	}
	if got != want {
		t.Errorf("stats\n got %+v\nwant %+v", got, want)
	}
	if wire == 0 || wire > uint64(len(data))*3/4 {
		t.Errorf("%d wire bytes for a stream of %d", wire, len(data))
	}
}

// Every way of cutting the stream into reads gives the same bytes.
func TestReadSizes(t *testing.T) {
	data := whole(true)
	for _, sizes := range [][]int{{1}, {7, 1, 4096}, {4104}, {4096}, {13, 70000}} {
		carry(data, sizes...).check(t, data)
	}
}

func TestEveryPrefix(t *testing.T) {
	s := small()
	for n := range s.Len() {
		c := carry(s.Bytes()[:n])
		c.check(t, s.Bytes()[:n])
		if !errors.Is(c.src, ErrAborted) {
			t.Fatalf("cut after %d of %d bytes: %v, want ErrAborted", n, s.Len(), c.src)
		}
		if slices.Contains(c.frameKinds, frameEnd) {
			t.Fatalf("cut after %d of %d bytes: an end frame was sent", n, s.Len())
		}
	}
}

func TestZeroRunsAreCompact(t *testing.T) {
	s := &stream{}
	s.header()
	s.section(sectionStart, ramSection, ramName, ramVersion)
	const pages = 100_000
	s.u64(pages*testPage | flagSizes)
	s.name(mainBlock)
	s.u64(pages * testPage)
	s.contentsEnd()
	s.part(sectionPart)
	s.zero(0, mainBlock)
	for i := 1; i < pages; i++ {
		s.zero(i, "")
	}
	s.contentsEnd()
	c := carry(s.Bytes())
	c.check(t, s.Bytes())
	st := c.source.Stats()
	if st.ZeroPages != pages || st.UnseenPages != 0 {
		t.Errorf("%d zero pages, %d unseen", st.ZeroPages, st.UnseenPages)
	}
	if st.WireBytes > 2000 {
		t.Errorf("%d zero pages took %d wire bytes", pages, st.WireBytes)
	}
}

// What is not understood passes on, without a tail.
func TestOpaque(t *testing.T) {
	started := func() *stream { s := &stream{}; s.header(); s.configuration(); s.returnPath(); return s }
	ram := func() *stream { s := started(); s.ramStart(); s.part(sectionPart); return s }
	cases := map[string]*stream{}
	add := func(name string, s *stream, build func(s *stream)) { build(s); cases[name] = s }

	add("not a stream", &stream{}, func(s *stream) { s.WriteString("GET / HTTP/1.1\r\n") })
	add("version 4", &stream{}, func(s *stream) { s.u32(streamMagic); s.u32(4) })
	add("virtio-mem before RAM", started(), func(s *stream) { s.section(4, 1, "0000:00:04.0/virtio-mem-early", 1) })
	add("dirty bitmaps", started(), func(s *stream) { s.section(sectionStart, 9, "dirty-bitmap", 1) })
	add("vfio", started(), func(s *stream) { s.ramStart(); s.section(sectionStart, 9, "0000:00:05.0/vfio", 1) })
	add("part of another section", started(), func(s *stream) { s.ramStart(); s.u8(sectionPart); s.u32(9) })
	add("RAM version", started(), func(s *stream) { s.section(sectionStart, ramSection, ramName, 5) })
	add("packaged", ram(), func(s *stream) { s.contentsEnd(); s.command(commandPackaged, 0, 0, 0, 9); s.device() })
	add("capabilities", started(), func(s *stream) {
		s.u8(sectionSubsection)
		s.name("configuration/capabilities")
		s.u32(1)
		s.u32(1)
		s.name("x-ignore-shared")
	})
	add("sizes with page size", started(), func(s *stream) { // postcopy with huge pages
		s.section(sectionStart, ramSection, ramName, ramVersion)
		s.u64(mainPages*2*testPage | flagSizes)
		for _, n := range []string{"a", "b"} {
			s.name(n)
			s.u64(mainPages * testPage)
			s.u64(2 << 20)
		}
	})
	add("too much RAM", started(), func(s *stream) {
		s.section(sectionStart, ramSection, ramName, ramVersion)
		s.u64(maxRAM*2 | flagSizes)
	})
	add("sizes twice", ram(), func(s *stream) { s.u64(testPage | flagSizes) })
	add("block twice", started(), func(s *stream) {
		s.section(sectionStart, ramSection, ramName, ramVersion)
		s.u64(2*testPage | flagSizes)
		s.name("a")
		s.u64(testPage)
		s.name("a")
		s.u64(testPage)
	})
	add("unknown block", ram(), func(s *stream) { s.zero(0, "nvdimm") })
	add("no block", ram(), func(s *stream) { s.zero(0, "") })
	add("beyond the block", ram(), func(s *stream) { s.zero(mainPages, mainBlock) })
	add("unknown flag", ram(), func(s *stream) { s.at(0, 0x400, mainBlock) })
	add("hook", ram(), func(s *stream) { s.u64(0x80) })
	add("xbzrle encoding", ram(), func(s *stream) { s.at(0, flagXbzrle, mainBlock); s.u8(2); s.u16(0) })
	add("compressed length", ram(), func(s *stream) { s.at(0, flagCompressed, mainBlock); s.u32(1 << 30) })

	for name, s := range cases {
		t.Run(name, func(t *testing.T) {
			understood := s.Len()
			s.Write(whole(true)[8:]) // all of it passes, however well it is formed
			c := carry(s.Bytes())
			c.check(t, s.Bytes())
			if c.src != nil {
				t.Errorf("a stream that ends like one was not complete: %v", c.src)
			}
			if !c.source.Opaque() || c.tails != 0 || slices.Contains(c.frameKinds, frameTail) {
				t.Errorf("opaque %v, OnTail called %d times, frames %x", c.source.Opaque(), c.tails, c.frameKinds)
			}
			if n := c.source.Stats().OpaqueBytes; n < uint64(s.Len()-understood) || n > uint64(s.Len()) {
				t.Errorf("%d opaque bytes", n)
			}
		})
	}
}

func TestPageSize(t *testing.T) {
	const bits, size = 14, 1 << 14
	s := &stream{}
	s.header()
	s.configuration()
	s.u8(sectionSubsection)
	s.name("configuration/target-page-bits")
	s.u32(1)
	s.u32(bits)
	s.u8(sectionSubsection)
	s.name("configuration/uuid")
	s.u32(1)
	s.Write(make([]byte, 16))
	s.section(sectionStart, ramSection, ramName, ramVersion)
	s.u64(4*size | flagSizes)
	s.name(mainBlock)
	s.u64(4 * size)
	s.contentsEnd()
	s.part(sectionLast)
	s.u64(flagZero)
	s.name(mainBlock)
	s.u8(0)
	for i := range uint64(2) {
		s.u64((i+1)*size | flagZero | flagContinue)
		s.u8(0)
	}
	s.u64(3*size | flagPage | flagContinue)
	s.Write(make([]byte, size))
	s.contentsEnd()
	s.device()
	s.description()
	c := carry(s.Bytes())
	c.check(t, s.Bytes())
	st := c.source.Stats()
	if c.src != nil || st.Opaque || st.PageSize != size || st.ZeroPages != 3 || st.Pages != 1 || st.UnseenPages != 0 {
		t.Errorf("%v, %+v", c.src, st)
	}
}

// qemuPair is a Source with a source QEMU, played by the test over a real
// socket, and the destination's channels.
type qemuPair struct {
	qemu            *net.UnixConn
	source          *Source
	frames, returns *channel
	done            chan error
}

func play(t *testing.T, cfg SourceConfig) *qemuPair {
	t.Helper()
	qemu, ours := unixPair(t)
	p := &qemuPair{qemu: qemu, frames: newChannel(), returns: newChannel(), done: make(chan error, 1)}
	p.frames.frames = make(chan []byte, 4096)
	cfg.QEMU, cfg.Frames, cfg.Return = ours, p.frames, p.returns
	p.source = NewSource(cfg)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	go func() { p.done <- p.source.Run(ctx) }()
	t.Cleanup(cancel)
	qemu.SetDeadline(time.Now().Add(time.Minute))
	return p
}

func (p *qemuPair) send(t *testing.T, b []byte) {
	t.Helper()
	if _, err := p.qemu.Write(b); err != nil {
		t.Fatal(err)
	}
}

func (p *qemuPair) answer(b ...byte) {
	p.returns.Send(context.Background(), append([]byte{frameReturn}, b...))
}

func (p *qemuPair) expect(t *testing.T, want ...byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(p.qemu, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("QEMU was told %x, want %x", got, want)
	}
}

// sent returns the stream bytes in the frames so far and the number of ends.
func (p *qemuPair) sent(t *testing.T) (out []byte, ends int) {
	t.Helper()
	u := noStore(t)
	for {
		select {
		case f := <-p.frames.frames:
			switch f[0] {
			case frameBatch:
				b, err := u.decode(f)
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, b...)
			case frameEnd:
				ends++
			}
		default:
			return out, ends
		}
	}
}

func (p *qemuPair) finish(t *testing.T, want []byte, wantErr error) {
	t.Helper()
	p.qemu.CloseWrite()
	if err := <-p.done; !errors.Is(err, wantErr) {
		t.Fatalf("Run: %v, want %v", err, wantErr)
	}
	if rest, err := io.ReadAll(p.qemu); err != nil || len(rest) > 0 {
		t.Fatalf("QEMU was told %x more (%v)", rest, err)
	}
	out, ends := p.sent(t)
	if !bytes.Equal(out, want) {
		t.Fatalf("%d bytes became %d", len(want), len(out))
	}
	if (wantErr == nil) != (ends == 1) {
		t.Fatalf("%d end frames", ends)
	}
}

var (
	pong   = []byte{0, 2, 0, 4, 0, 0, 0, 1}
	failed = []byte{0, messageShut, 0, 4, 0, 0, 0, 1}
)

// QEMU gets its SHUT from Source, and the destination's is swallowed.
func TestOwnShut(t *testing.T) {
	tail := make(chan struct{})
	p := play(t, SourceConfig{OnTail: func() { close(tail) }})
	data := whole(true)
	p.answer(pong...)
	p.send(t, data[:40])
	p.expect(t, pong...)
	p.send(t, data[40:])
	<-tail
	p.expect(t, shutMessage...)
	p.answer(append(pong, shutMessage...)...)
	select {
	case err := <-p.done:
		t.Fatalf("Run returned %v before QEMU closed its socket", err)
	default:
	}
	p.finish(t, data, nil)
}

// The own SHUT waits for the end of a message that is being relayed.
func TestOwnShutBetweenMessages(t *testing.T) {
	p := play(t, SourceConfig{})
	p.answer(pong[:5]...)
	p.expect(t, pong[:5]...)
	data := whole(true)
	p.send(t, data)
	for p.source.Stats().StreamBytes < uint64(len(data)) {
		runtime.Gosched()
	}
	p.answer(pong[5:]...)
	p.expect(t, append(pong[5:], shutMessage...)...)
	p.finish(t, data, nil)
}

// Device state that looks like the end of the stream costs nothing.
func TestImitatedEnd(t *testing.T) {
	for name, end := range map[string]struct {
		more func(s *stream)
		want error
	}{
		"stream goes on to its end":      {func(s *stream) { s.device(); s.description() }, nil},
		"stream ends without an own one": {func(s *stream) { s.device(); s.u8(sectionEnd) }, nil},
		"QEMU dies in its device state":  {func(s *stream) { s.device(); s.WriteString("half a dev") }, ErrAborted},
	} {
		t.Run(name, func(t *testing.T) {
			p := play(t, SourceConfig{})
			s := head(true)
			s.device()
			s.description()
			p.send(t, s.Bytes())
			p.expect(t, shutMessage...)
			rest := &stream{}
			end.more(rest)
			p.send(t, rest.Bytes())
			p.finish(t, append(s.Bytes(), rest.Bytes()...), end.want)
		})
	}
}

// Without a description the end cannot be seen: the destination says it.
func TestNoDescription(t *testing.T) {
	s := head(true)
	s.device()
	s.u8(sectionEnd)
	for name, c := range map[string]struct {
		told []byte
		want error
	}{
		"loaded": {shutMessage, nil},
		"failed": {failed, ErrAborted},
	} {
		t.Run(name, func(t *testing.T) {
			p := play(t, SourceConfig{})
			p.send(t, s.Bytes())
			p.answer(c.told...)
			p.expect(t, c.told...)
			p.finish(t, s.Bytes(), c.want)
		})
	}
}

func TestNoReturnPath(t *testing.T) {
	data := whole(false)
	p := play(t, SourceConfig{})
	p.send(t, data)
	p.finish(t, data, nil)

	p = play(t, SourceConfig{})
	data = data[:len(data)-1]
	p.send(t, data)
	p.finish(t, data, ErrAborted)
}

// In opaque mode only the destination's SHUT reaches QEMU.
func TestOpaqueShut(t *testing.T) {
	s := &stream{}
	s.header()
	s.returnPath()
	s.section(4, 1, "0000:00:04.0/virtio-mem-early", 1)
	s.Write(whole(true))
	p := play(t, SourceConfig{})
	p.send(t, s.Bytes())
	p.answer(pong...)
	p.answer(shutMessage...)
	p.expect(t, append(bytes.Clone(pong), shutMessage...)...)
	p.finish(t, s.Bytes(), nil)
}

// Nothing is held back while QEMU is silent, not even half a record.
func TestPrompt(t *testing.T) {
	p := play(t, SourceConfig{})
	data := head(true).Bytes()
	sent := 0
	for _, n := range []int{3, 40, 4000, 5, 9000} {
		p.send(t, data[sent:sent+n])
		sent += n
		var got []byte
		for deadline := time.Now().Add(30 * time.Second); len(got) < n; {
			more, _ := p.sent(t)
			got = append(got, more...)
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d bytes were passed on", len(got), n)
			}
			time.Sleep(time.Millisecond)
		}
		if !bytes.Equal(got, data[sent-n:sent]) {
			t.Fatal("other bytes came out")
		}
	}
}

func TestPace(t *testing.T) {
	data := whole(false)
	total, calls := 0, 0
	boom := errors.New("boom")
	run := func(limit int) error {
		frames, returns := newChannel(), newChannel()
		frames.frames = make(chan []byte, 4096)
		return NewSource(SourceConfig{
			QEMU: &script{data: data, sizes: []int{1000}}, Frames: frames, Return: returns,
			Pace: func(_ context.Context, n int) error {
				if calls++; calls == limit {
					return boom
				}
				total += n
				return nil
			},
		}).Run(t.Context())
	}
	if err := run(-1); err != nil {
		t.Fatal(err)
	}
	if total != len(data) || calls != (len(data)+999)/1000+1 {
		t.Errorf("paced %d of %d bytes in %d calls", total, len(data), calls)
	}
	calls = 0
	if err := run(10); !errors.Is(err, boom) {
		t.Errorf("Run: %v, want the error of Pace", err)
	}
}

func TestSourceEnds(t *testing.T) {
	t.Run("with its context", func(t *testing.T) {
		qemu, ours := unixPair(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s := NewSource(SourceConfig{QEMU: ours, Frames: newChannel(), Return: newChannel()})
		if err := s.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
		if n, err := qemu.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("QEMU's socket is still open: %d, %v", n, err)
		}
	})
	t.Run("when the destination ends the return path", func(t *testing.T) {
		p := play(t, SourceConfig{})
		p.returns.closeSend()
		if err := <-p.done; !errors.Is(err, io.EOF) || errors.Is(err, ErrAborted) {
			t.Errorf("Run: %v", err)
		}
	})
	t.Run("on a bad frame", func(t *testing.T) {
		for _, f := range [][]byte{{}, {frameReturn}, {frameBatch, 1}, make([]byte, 2+maxReturn)} {
			p := play(t, SourceConfig{})
			p.returns.Send(t.Context(), f)
			if err := <-p.done; !errors.Is(err, ErrFrame) {
				t.Errorf("frame of %d bytes: %v", len(f), err)
			}
		}
	})
	t.Run("when QEMU says nothing", func(t *testing.T) {
		p := play(t, SourceConfig{})
		p.qemu.Close()
		if err := <-p.done; !errors.Is(err, ErrAborted) {
			t.Errorf("Run: %v", err)
		}
		if n := len(p.frames.frames); n != 0 {
			t.Errorf("%d frames for an empty stream", n)
		}
	})
}

func TestEndFinder(t *testing.T) {
	s := &stream{}
	s.WriteString("state \x00\x06\x00\x00\x00\x06") // the id of the last section imitates a header
	for range 5 {
		s.u8(sectionFooter)
		s.u32(6)
	}
	s.description()
	for size := 1; size < s.Len(); size++ {
		var f endFinder
		for rest := s.Bytes(); len(rest) > 0; {
			n := min(size, len(rest))
			f.write(rest[:n])
			rest = rest[n:]
			if f.atEnd() != (len(rest) == 0) {
				t.Fatalf("in pieces of %d, %d bytes before the end: %v", size, len(rest), f.atEnd())
			}
		}
	}

	// Text without end is not collected without end.
	var f endFinder
	block := bytes.Repeat([]byte("{"), 1<<20)
	for range 40 {
		f.write(block)
	}
	f.write(s.Bytes())
	if cap(f.kept) > 2*maxDescription || !f.atEnd() {
		t.Errorf("%d bytes kept, at the end: %v", cap(f.kept), f.atEnd())
	}
}
