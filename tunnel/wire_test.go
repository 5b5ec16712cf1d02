package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func frameBytes(frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

func TestChannelHeaderRoundTrip(t *testing.T) {
	for _, want := range []channelHeader{
		{"c", Control, false},
		{"disk/vda.1_x-y", Disk, true},
		{strings.Repeat("m", maxName), Background, false},
	} {
		b := want.append(nil)
		got, n, err := parseChannelHeader(append(b, "frame"...))
		if err != nil || got != want || n != len(b) {
			t.Errorf("%v is read as %v, %v, of %d bytes", want, got, err, n)
		}
	}
}

func TestChannelHeaderOfLaterVersion(t *testing.T) {
	want := channelHeader{"disk/vda", Disk, true}
	b := want.append(nil)
	b[0], b[1] = 7, b[1]+3
	if got, n, err := parseChannelHeader(append(b, 1, 2, 3, 'f')); err != nil || got != want || n != len(b)+3 {
		t.Errorf("a later header is read as %v, %v, of %d bytes", got, err, n)
	}
}

func TestChannelHeaderEveryPrefixFails(t *testing.T) {
	b := channelHeader{"disk/vda", Disk, false}.append(nil)
	for n := range b {
		if h, _, err := parseChannelHeader(b[:n]); !errors.Is(err, ErrFormat) {
			t.Errorf("%d of %d bytes give %v, %v", n, len(b), h, err)
		}
	}
}

var junkHeaders = map[string][]byte{
	"version 0":        {0, 4, 0, 0, 1, 'a'},
	"no fields":        {1, 0},
	"no name length":   {1, 2, 0, 0},
	"empty name":       {1, 3, 0, 0, 0},
	"name beyond rest": {1, 5, 0, 0, 3, 'a', 'b'},
	"name of 65":       append([]byte{1, 68, 0, 0, 65}, bytes.Repeat([]byte{'a'}, 65)...),
	"upper case":       {1, 4, 0, 0, 1, 'A'},
	"space":            {1, 4, 0, 0, 1, ' '},
	"NUL":              {1, 4, 0, 0, 1, 0},
	"UTF-8":            {1, 5, 0, 0, 2, 0xc3, 0xa9},
	"priority 5":       {1, 4, 5, 0, 1, 'a'},
	"unknown flag":     {1, 4, 0, 2, 1, 'a'},
	"HTTP":             []byte("GET / HTTP/1.1\r\nHost: wanmig.example.org\r\nAccept: text/html, text/plain, application/json\r\n\r\n"),
}

func TestChannelHeaderJunk(t *testing.T) {
	for name, b := range junkHeaders {
		if h, _, err := parseChannelHeader(b); !errors.Is(err, ErrFormat) {
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

func FuzzParseChannelHeader(f *testing.F) {
	f.Add(channelHeader{"control", Control, false}.append(nil))
	f.Add(channelHeader{strings.Repeat("d", maxName), Disk, true}.append(nil))
	for _, b := range junkHeaders {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, n, err := parseChannelHeader(b)
		if err != nil {
			return
		}
		if n > len(b) {
			t.Fatalf("%x has %d bytes of header", b, n)
		}
		again, _, err := parseChannelHeader(h.append(nil))
		if err != nil || again != h {
			t.Fatalf("%x is read as %v, and that as %v, %v", b, h, again, err)
		}
	})
}
