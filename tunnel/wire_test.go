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

func TestGreeting(t *testing.T) {
	for _, good := range [][]byte{{1}, {2, 9, 9}, append([]byte{1}, make([]byte, maxGreeting-1)...)} {
		if err := readGreeting(bytes.NewReader(good)); err != nil {
			t.Errorf("greeting of %d bytes: %v", len(good), err)
		}
	}
	for _, bad := range [][]byte{{}, {0}, append([]byte{1}, make([]byte, maxGreeting)...)} {
		if err := readGreeting(bytes.NewReader(bad)); !errors.Is(err, ErrFormat) {
			t.Errorf("greeting of %d bytes: %v", len(bad), err)
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
