package blocksync

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"unicode/utf8"
)

const testDisk = 4 << 20

// script is one valid transfer to a disk of testDisk bytes.
func script() [][]byte {
	data := appendData([]byte{frameData}, blockSize, fill(blockSize, 5))
	data = appendData(data, testDisk-512, fill(512, 6))
	return [][]byte{
		appendOpen(nil, testDisk),
		data,
		appendZero(appendZero([]byte{frameZero}, extent{0, 1 << 20}), extent{2 << 20, 2 << 20}),
		appendBarrier(nil, 1, false),
		appendData([]byte{frameData}, 0, fill(maxExtent, 7)),
		appendBarrier(nil, 2, true),
	}
}

// playback gives frames, then the channel's end.
type playback [][]byte

func (p *playback) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	if len(*p) == 0 {
		return nil, io.EOF
	}
	frame := (*p)[0]
	*p = (*p)[1:]
	return append(buf[:0], frame...), ctx.Err()
}

// record keeps what it is sent.
type record [][]byte

func (r *record) Send(ctx context.Context, frame []byte) error {
	*r = append(*r, bytes.Clone(frame))
	return nil
}

func apply(d *disk, frames [][]byte) (record, error) {
	var acks record
	p := playback(frames)
	err := NewTarget(d).Run(context.Background(), &p, &acks)
	return acks, err
}

func TestScript(t *testing.T) {
	d := newDisk(testDisk)
	acks, err := apply(d, script())
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, testDisk)
	copy(want, fill(maxExtent, 7))
	if !bytes.Equal(d.content, want) {
		t.Error("content differs")
	}
	const applied1 = blockSize + 512 + 3<<20
	if len(acks) != 2 || !bytes.Equal(acks[0], appendDurable(nil, 1, applied1)) || !bytes.Equal(acks[1], appendDurable(nil, 2, applied1+maxExtent)) {
		t.Errorf("acks % x", acks)
	}
	if d.flushes != 2 {
		t.Errorf("%d flushes", d.flushes)
	}
}

// The bytes of doc.go's table.
func TestWireFormat(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		frame      []byte
	}{
		{"open", "01 01 0000000000400000", appendOpen(nil, testDisk)},
		{"data", "02 0000000000010000 00000003 00 00000003 616263", appendData([]byte{frameData}, blockSize, []byte("abc"))},
		{"zero", "03 0000000000000200 0000000000000400", appendZero([]byte{frameZero}, extent{512, 1024})},
		{"barrier", "04 0000000000000007 00", appendBarrier(nil, 7, false)},
		{"final barrier", "04 0000000000000008 01", appendBarrier(nil, 8, true)},
		{"durable", "01 0000000000000007 0000000000000200", appendDurable(nil, 7, 512)},
		{"progress", "02 0000000000000200", appendProgress(nil, 512)},
		{"failure", "03 6e6f", appendFailure(nil, "no")},
	} {
		if got := hex.EncodeToString(tt.frame); got != strings.ReplaceAll(tt.want, " ", "") {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestEveryPrefixFails(t *testing.T) {
	frames := script()
	for i, frame := range frames {
		// A data or zero frame may end after any of its extents.
		whole := map[int]bool{}
		for body := frame[1:]; i > 0 && len(body) > 0; {
			whole[len(frame)-len(body)] = len(body) < len(frame)-1
			var err error
			switch frame[0] {
			case frameData:
				_, body, err = nextData(body, testDisk)
			case frameZero:
				_, body, err = nextZero(body, testDisk)
			default:
				body = nil
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		step := max(1, len(frame)/200)
		for n := 0; n < len(frame); n += step {
			if whole[n] {
				continue
			}
			cut := append(append([][]byte{}, frames[:i]...), frame[:n])
			acks, err := apply(newDisk(testDisk), cut)
			if !errors.Is(err, ErrFrame) {
				t.Fatalf("frame %d cut to %d bytes: %v", i, n, err)
			}
			if last := acks[len(acks)-1]; last[0] != ackFailure {
				t.Fatalf("frame %d cut to %d bytes: the source was not told", i, n)
			}
		}
		// Nor does the transfer end early.
		if _, err := apply(newDisk(testDisk), frames[:i]); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			t.Fatalf("%d frames only: %v", i, err)
		}
	}
}

func TestHostileFrames(t *testing.T) {
	extentAt := func(off uint64, size uint32, method byte, length uint32, payload string) []byte {
		f := binary.BigEndian.AppendUint64([]byte{frameData}, off)
		f = binary.BigEndian.AppendUint32(f, size)
		f = binary.BigEndian.AppendUint32(append(f, method), length)
		return append(f, payload...)
	}
	zeroAt := func(off, length uint64) []byte {
		return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{frameZero}, off), length)
	}
	for name, frame := range map[string][]byte{
		"empty":               {},
		"unknown type":        {9, 1, 2, 3},
		"second open":         appendOpen(nil, testDisk),
		"no extents":          {frameData},
		"no zeros":            {frameZero},
		"beyond the end":      extentAt(testDisk-2, 3, 0, 3, "abc"),
		"offset overflows":    extentAt(math.MaxUint64-1, 3, 0, 3, "abc"),
		"negative offset":     extentAt(1<<63, 3, 0, 3, "abc"),
		"empty extent":        extentAt(0, 0, 0, 0, ""),
		"too large":           extentAt(0, maxExtent+1, 0, 3, "abc"),
		"size is not content": extentAt(0, 4, 0, 3, "abc"),
		"length overflows":    extentAt(0, 3, 0, math.MaxUint32, "abc"),
		"unknown method":      extentAt(0, 3, 77, 3, "abc"),
		"not zstd":            extentAt(0, 16, 1, 16, "0123456789abcdef"),
		"zeros beyond":        zeroAt(testDisk-1, 2),
		"zeros overflow":      zeroAt(512, math.MaxUint64),
		"zeros negative":      zeroAt(1<<63, 1<<63),
		"no zeros at all":     zeroAt(0, 0),
		"barrier flag":        {frameBarrier, 0, 0, 0, 0, 0, 0, 0, 1, 2},
		"huge":                make([]byte, maxFrame+1),
	} {
		d := newDisk(testDisk)
		if _, err := apply(d, [][]byte{appendOpen(nil, testDisk), frame}); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
		if d.writes > 0 {
			t.Errorf("%s: written", name)
		}
	}
	for name, frame := range map[string][]byte{
		"newer version": {frameOpen, version + 1, 0, 0, 0, 0, 0, 64, 0, 0},
		"other size":    appendOpen(nil, testDisk+512),
		"trailing byte": append(appendOpen(nil, testDisk), 0),
		"not open":      appendBarrier(nil, 1, true),
	} {
		if _, err := apply(newDisk(testDisk), [][]byte{frame}); !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHostileAcks(t *testing.T) {
	for name, frames := range map[string][][]byte{
		"empty":             {{}},
		"unknown":           {{9, 0}},
		"short durable":     {{ackDurable, 0, 0}},
		"long progress":     {append(appendProgress(nil, 1), 0)},
		"text too long":     {append([]byte{ackFailure}, make([]byte, maxFailure+1)...)},
		"barrier not asked": {appendDurable(nil, 2, 0)},
		"barrier 0":         {appendDurable(nil, 0, 0)},
	} {
		o := newOutbox(t, testDisk, newBudget(t, 1<<20, 0))
		o.Strict(true)
		p := playback(frames)
		if err := o.Run(t.Context(), new(record), &p); !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a destination claims to have done is not more than there was.
	o := newOutbox(t, testDisk, newBudget(t, 1<<20, 0))
	mustWrite(t, o, fill(512, 1), 0)
	p := playback{appendProgress(nil, math.MaxUint64)}
	if err := o.Run(t.Context(), new(record), &p); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
	if s := o.Stats(); s.Applied != 512 {
		t.Errorf("applied %d", s.Applied)
	}
}

func TestFailureText(t *testing.T) {
	long := strings.Repeat("é", maxFailure)
	for _, text := range []string{"", "no space left", "bell \a and escape \x1b[2J", "broken \xff\xfe", long, "x" + long} {
		frame := appendFailure(nil, text)
		a, err := parseAck(frame)
		if err != nil {
			t.Fatalf("%.20q: %v", text, err)
		}
		if !utf8.ValidString(a.text) || strings.ContainsAny(a.text, "\a\x1b\x00") {
			t.Errorf("%.20q became %.20q", text, a.text)
		}
	}
}

// FuzzTarget cuts its input into frames by u16 lengths, after a valid open.
func FuzzTarget(f *testing.F) {
	pack := func(frames [][]byte) []byte {
		var b []byte
		for _, frame := range frames {
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(frame))), frame...)
		}
		return b
	}
	f.Add(pack(script()[1:]))
	f.Add(pack(script()[3:]))
	f.Add(pack([][]byte{appendZero([]byte{frameZero}, extent{0, testDisk}), appendBarrier(nil, 1, true)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		frames := [][]byte{appendOpen(nil, testDisk)}
		for len(b) >= 2 {
			n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
			frames = append(frames, b[2:2+n])
			b = b[2+n:]
		}
		d := newDisk(testDisk)
		acks, err := apply(d, frames)
		if len(acks) == 0 {
			t.Fatal("neither confirmed nor refused")
		}
		last, perr := parseAck(acks[len(acks)-1])
		if perr != nil || (err == nil) != (last.kind == ackDurable) || d.unsynced && err == nil || d.overlap != "" {
			t.Fatalf("error %v, last ack %+v %v, overlap %q", err, last, perr, d.overlap)
		}
	})
}

func FuzzAck(f *testing.F) {
	for _, b := range [][]byte{appendDurable(nil, 1, 2), appendProgress(nil, 3), appendFailure(nil, "no space"), {}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAck(b)
		if err != nil {
			return
		}
		var again []byte
		switch a.kind {
		case ackDurable:
			again = appendDurable(nil, a.id, a.applied)
		case ackProgress:
			again = appendProgress(nil, a.applied)
		case ackFailure:
			if again = appendFailure(nil, a.text); a.text != string(b[1:]) {
				return // not printable
			}
		}
		if !bytes.Equal(again, b) {
			t.Fatalf("% x became % x", b, again)
		}
	})
}
