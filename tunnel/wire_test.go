package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"testing/iotest"
)

func frameBytes(frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

func TestChannelHeaderRoundTrip(t *testing.T) {
	for _, want := range []channelHeader{
		{"c", Control},
		{"disk/vda.1_x-y", Disk},
		{strings.Repeat("m", maxName), Memory},
	} {
		r := bytes.NewReader(append(want.append(nil), "frame"...))
		got, err := readChannelHeader(r)
		if err != nil || got != want {
			t.Errorf("%v is read as %v, %v", want, got, err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != "frame" {
			t.Errorf("after the header %q is left", rest)
		}
	}
}

func TestChannelHeaderOfLaterVersion(t *testing.T) {
	b := channelHeader{"disk/vda", Disk}.append(nil)
	b[0], b[1] = 7, b[1]+3
	got, err := readChannelHeader(bytes.NewReader(append(b, 1, 2, 3)))
	if want := (channelHeader{"disk/vda", Disk}); err != nil || got != want {
		t.Errorf("a later header is read as %v, %v", got, err)
	}
}

func TestChannelHeaderEveryPrefixFails(t *testing.T) {
	b := channelHeader{"disk/vda", Disk}.append(nil)
	for n := range b {
		if h, err := readChannelHeader(bytes.NewReader(b[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes give %v, %v", n, len(b), h, err)
		}
	}
}

var junkHeaders = map[string][]byte{
	"version 0":        {0, 3, 0, 1, 'a'},
	"no fields":        {1, 0},
	"no name length":   {1, 1, 0},
	"empty name":       {1, 2, 0, 0},
	"name beyond rest": {1, 4, 0, 3, 'a', 'b'},
	"name of 65":       append([]byte{1, 67, 0, 65}, bytes.Repeat([]byte{'a'}, 65)...),
	"upper case":       {1, 3, 0, 1, 'A'},
	"space":            {1, 3, 0, 1, ' '},
	"NUL":              {1, 3, 0, 1, 0},
	"UTF-8":            {1, 4, 0, 2, 0xc3, 0xa9},
	"priority 3":       {1, 3, 3, 1, 'a'},
	"HTTP":             []byte("GET / HTTP/1.1\r\nHost: wanmig.example.org\r\nAccept: text/html, text/plain, application/json\r\n\r\n"),
}

func TestChannelHeaderJunk(t *testing.T) {
	for name, b := range junkHeaders {
		if h, err := readChannelHeader(bytes.NewReader(b)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: read as %v, %v", name, h, err)
		}
	}
}

func TestTokenRoundTrip(t *testing.T) {
	want := token{1, 2, 3, 15: 16}
	for _, later := range []int{0, 1, maxGreeting - 1} {
		r := bytes.NewReader(append(want.append(nil), make([]byte, later)...))
		got, err := readToken(r)
		if err != nil || got != want {
			t.Errorf("%x is read as %x, %v", want, got, err)
		}
		if err := skipLater(r); err != nil || r.Len() != 0 {
			t.Errorf("%d later bytes: %v, %d are left", later, err, r.Len())
		}
	}
	if err := skipLater(bytes.NewReader(make([]byte, maxGreeting))); !errors.Is(err, ErrFormat) {
		t.Errorf("too many later bytes: %v", err)
	}
}

func TestTokenEveryPrefixFails(t *testing.T) {
	b := token{1}.append(nil)
	for n := range b {
		if got, err := readToken(bytes.NewReader(b[:n])); !errors.Is(err, ErrFormat) {
			t.Errorf("%d of %d bytes give %x, %v", n, len(b), got, err)
		}
	}
	b[0] = 0
	if got, err := readToken(bytes.NewReader(b)); !errors.Is(err, ErrFormat) {
		t.Errorf("version 0 gives %x, %v", got, err)
	}
}

func TestLaneHeader(t *testing.T) {
	for _, want := range []laneHeader{{0}, {5}, {maxStreamID}} {
		b := want.append(nil)
		for n := range b {
			if h, err := readLaneHeader(bytes.NewReader(b[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%d of %d bytes give %v, %v", n, len(b), h, err)
			}
		}
		r := bytes.NewReader(append(b, "chunk"...))
		if got, err := readLaneHeader(r); err != nil || got != want || r.Len() != len("chunk") {
			t.Errorf("%v is read as %v, %v, %d bytes left", want, got, err, r.Len())
		}
		b[0], b[1] = 9, b[1]+2
		if got, err := readLaneHeader(bytes.NewReader(append(b, 1, 2))); err != nil || got != want {
			t.Errorf("a later header is read as %v, %v", got, err)
		}
	}
	for name, b := range junkLaneHeaders {
		if h, err := readLaneHeader(bytes.NewReader(b)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: read as %v, %v", name, h, err)
		}
	}
}

var junkLaneHeaders = map[string][]byte{
	"version 0":         {0, 8, 0, 0, 0, 0, 0, 0, 0, 0},
	"short":             {1, 7, 0, 0, 0, 0, 0, 0, 0},
	"above QUIC's most": {1, 8, 0x40, 0, 0, 0, 0, 0, 0, 0},
}

func TestChunkHead(t *testing.T) {
	for _, want := range []chunkHead{{0, 0}, {1 << 40, maxChunk}, {math.MaxUint64 - 9, 9}, {math.MaxUint64, 0}} {
		b := want.append(nil)
		for n := range b {
			short := io.ErrUnexpectedEOF
			if n == 0 {
				short = io.EOF
			}
			if h, err := readChunkHead(bytes.NewReader(b[:n])); err != short {
				t.Errorf("%d of %d bytes give %v, %v", n, len(b), h, err)
			}
		}
		r := bytes.NewReader(append(b, "data"...))
		if got, err := readChunkHead(r); err != nil || got != want || r.Len() != len("data") {
			t.Errorf("%v is read as %v, %v, %d bytes left", want, got, err, r.Len())
		}
	}
	for _, bad := range []chunkHead{{0, maxChunk + 1}, {0, math.MaxUint16}, {math.MaxUint64, 1}, {math.MaxUint64 - 8, 9}} {
		if got, err := readChunkHead(bytes.NewReader(bad.append(nil))); !errors.Is(err, ErrFormat) {
			t.Errorf("%v is read as %v, %v", bad, got, err)
		}
	}
}

func TestFrameRoundTrip(t *testing.T) {
	var stream []byte
	frames := [][]byte{{}, {1}, bytes.Repeat([]byte("wan"), 1000), {}, bytes.Repeat([]byte{7}, MaxFrame)}
	for _, f := range frames {
		stream = append(stream, frameBytes(f)...)
	}
	for name, r := range map[string]io.Reader{
		"whole":              bytes.NewReader(stream),
		"last data with EOF": iotest.DataErrReader(bytes.NewReader(stream)),
		"halves":             iotest.HalfReader(bytes.NewReader(stream)),
	} {
		buf := []byte("left over")
		for i, want := range frames {
			got, taken, err := readFrame(r, buf[:0])
			if err != nil || !bytes.Equal(got, want) || taken != frameHead+len(want) {
				t.Fatalf("%s: frame %d: %d bytes, %d taken, %v", name, i, len(got), taken, err)
			}
			buf = got
		}
		if _, taken, err := readFrame(r, buf[:0]); err != io.EOF || taken != 0 {
			t.Errorf("%s: after the last frame: %d taken, %v", name, taken, err)
		}
	}
}

func TestFrameEveryPrefixFails(t *testing.T) {
	b := frameBytes([]byte("some bytes of a frame"))
	for n := range b {
		frame, taken, err := readFrame(bytes.NewReader(b[:n]), nil)
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		if frame != nil || taken != n || err != want {
			t.Errorf("%d of %d bytes: frame %q, %d taken, %v", n, len(b), frame, taken, err)
		}
	}
}

// greedyReader records the largest piece that is asked of it.
type greedyReader struct {
	r       io.Reader
	largest int
}

func (g *greedyReader) Read(p []byte) (int, error) {
	g.largest = max(g.largest, len(p))
	return g.r.Read(p)
}

func TestFrameMemoryGrowsWithItsBytes(t *testing.T) {
	for _, announced := range []uint32{MaxFrame + 1, 1 << 31, 1<<32 - 1} {
		head := binary.BigEndian.AppendUint32(nil, announced)
		if _, _, err := readFrame(bytes.NewReader(head), nil); !errors.Is(err, ErrFrameTooLarge) {
			t.Errorf("%d bytes announced: %v", announced, err)
		}
	}
	g := &greedyReader{r: bytes.NewReader(frameBytes(make([]byte, MaxFrame))[:frameHead+10])}
	if _, _, err := readFrame(g, nil); err != io.ErrUnexpectedEOF {
		t.Fatal(err)
	}
	if g.largest > 2*frameGrowth {
		t.Errorf("after 10 of %d bytes the buffer has %d bytes", MaxFrame, g.largest)
	}
}

func TestPrintable(t *testing.T) {
	got := printable("disk full\x1b[2J\n\xff" + strings.Repeat("é", 200))
	if len(got) > maxReason || !strings.HasPrefix(got, "disk full?[2J??éé") {
		t.Errorf("printable gives %q of %d bytes", got, len(got))
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add(frameBytes(nil))
	f.Add(frameBytes([]byte("frame")))
	f.Add(append(frameBytes([]byte("a")), frameBytes([]byte("b"))...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{0, 0x40, 0, 0})
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bytes.NewReader(stream)
		var buf, again []byte
		for {
			frame, _, err := readFrame(r, buf[:0])
			if err != nil {
				break
			}
			again = append(again, frameBytes(frame)...)
			buf = frame
		}
		if !bytes.HasPrefix(stream, again) {
			t.Fatalf("%x is read as the frames %x", stream, again)
		}
	})
}

func FuzzReadChannelHeader(f *testing.F) {
	f.Add(channelHeader{"control", Control}.append(nil))
	f.Add(channelHeader{strings.Repeat("d", maxName), Disk}.append(nil))
	for _, b := range junkHeaders {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readChannelHeader(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := readChannelHeader(bytes.NewReader(h.append(nil)))
		if err != nil || again != h {
			t.Fatalf("%x is read as %v, and that as %v, %v", b, h, again, err)
		}
	})
}

func FuzzReadChunkHead(f *testing.F) {
	f.Add(chunkHead{0, 0}.append(nil))
	f.Add(append(chunkHead{1 << 33, 4}.append(nil), "data"...))
	f.Add(chunkHead{math.MaxUint64, maxChunk}.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readChunkHead(bytes.NewReader(b))
		if err == nil && (!bytes.HasPrefix(b, h.append(nil)) || h.length > maxChunk || h.end() < h.offset) {
			t.Fatalf("%x is read as %v", b, h)
		}
	})
}

func FuzzReadLaneHeader(f *testing.F) {
	f.Add(laneHeader{8}.append(nil))
	for _, b := range junkLaneHeaders {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readLaneHeader(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := readLaneHeader(bytes.NewReader(h.append(nil)))
		if err != nil || again != h {
			t.Fatalf("%x is read as %v, and that as %v, %v", b, h, again, err)
		}
	})
}
