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
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/wanmig/wanmig/compress"
)

const testDisk = 4 << 20

var coder = compress.NewEncoder(1)

// script is one valid transfer to a disk of testDisk bytes.
func script() [][]byte {
	list := []extent{{blockSize, blockSize}, {testDisk - 512, 512}}
	content := append(fill(blockSize, 5), fill(512, 6)...)
	return [][]byte{
		appendOpen(nil, testDisk, false),
		dataOf(list, content),
		appendZero(appendZero([]byte{frameZero}, extent{0, 1 << 20}), extent{2 << 20, 2 << 20}),
		dataOf([]extent{{0, maxContent}}, fill(maxContent, 7)),
		appendBarrier(nil, 1, false),
		offerOf(3, page, []extent{{2 << 20, 2 * page}}, append(fill(page, 7), fill(page, 8)...)),
		appendApply(nil, 3),
		offerOf(4, blockUnit, []extent{{2 << 20, 2 * blockUnit}}, append(fill(blockUnit, 0), fill(blockUnit, 8)...)),
		appendApply(nil, 4),
		appendBarrier(nil, 2, true),
	}
}

func offerOf(id uint32, unit int64, list []extent, content []byte) []byte {
	var sums []compress.Fingerprint
	unitsOf(list, page, func(_, at int64) { sums = append(sums, compress.Sum(content[at:at+page])) })
	return appendOffer(nil, id, unit, list, sums)
}

func dataOf(list []extent, content []byte) []byte {
	frame, _ := appendData(nil, coder.Encode, list, content)
	return frame
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
type record struct {
	mu     sync.Mutex
	frames [][]byte
}

func (r *record) Send(ctx context.Context, frame []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frames = append(r.frames, bytes.Clone(frame))
	return nil
}

func apply(tb testing.TB, d *disk, frames [][]byte) ([][]byte, error) {
	return applyTo(tb, d, false, frames)
}

func applyTo(tb testing.TB, d *disk, old bool, frames [][]byte) ([][]byte, error) {
	var acks record
	p := playback(frames)
	err := NewTarget(d, newContent(tb, d.Size()), old).Run(context.Background(), &p, &acks)
	return acks.frames, err
}

func TestScript(t *testing.T) {
	d := newDisk(testDisk)
	acks, err := apply(t, d, script())
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, testDisk)
	copy(want, fill(maxContent, 7))
	copy(want[2<<20:], fill(page, 7))
	if !bytes.Equal(d.content, want) {
		t.Error("content differs")
	}
	const applied = blockSize + 512 + 3<<20 + maxContent
	for i, ack := range [][]byte{
		appendReady(nil, false),
		appendDurable(nil, 1, applied),
		appendHeld(nil, 3, []compress.Origin{compress.OnDisk, compress.Nowhere}),
		appendHeld(nil, 4, []compress.Origin{compress.Nowhere, compress.Nowhere}),
		appendDurable(nil, 2, applied+page),
	} {
		if i >= len(acks) || !bytes.Equal(acks[i], ack) {
			t.Errorf("ack %d is % x, want % x", i, acks[i], ack)
		}
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
		{"open", "01 03 0000000000400000 00", appendOpen(nil, testDisk, false)},
		{"data", "02 0001 0000000000010000 00000003 00 616263", dataOf([]extent{{blockSize, 3}}, []byte("abc"))},
		{"offer", "05 00000009 00 0001 0000000000001000 00001001 ad7facb2586fc6e966c004d7d1d16b02", offerOf(9, page, []extent{{page, page + 1}}, make([]byte, page+1))},
		{"apply", "06 00000009", appendApply(nil, 9)},
		{"offer of blocks", "05 00000009 01 0001 000000000000f000 00010fff", offerOf(9, blockUnit, []extent{{15 * page, 17*page - 1}}, make([]byte, 17*page-1))},
		{"held", "04 00000009 3401", appendHeld(nil, 9, []compress.Origin{compress.Nowhere, compress.OnDisk, compress.OnOld, compress.Nowhere, compress.OnDisk})},
		{"ready", "05 01", appendReady(nil, true)},
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

// A block is offered by its pages' fingerprints, and by the first of them.
func TestOfferOfBlocks(t *testing.T) {
	content := noise(1, 40*page)
	frame := offerOf(9, blockUnit, []extent{{page, 35 * page}}, content[page:36*page])
	id, x, err := parseOffer(frame[1:], testDisk)
	if err != nil || id != 9 || x.unit != blockUnit || len(x.sums) != 1 || len(x.firsts) != 1 {
		t.Fatalf("%d %+v %v", id, x, err)
	}
	var sums []compress.Fingerprint
	for at := 16 * page; at < 32*page; at += page {
		sums = append(sums, compress.Sum(content[at:at+page]))
	}
	if x.sums[0] != compress.SumOf(sums) || x.firsts[0] != sums[0] {
		t.Errorf("fingerprints %x, %x", x.sums[0], x.firsts[0])
	}
}

func TestEveryPrefixFails(t *testing.T) {
	frames := script()
	for i, frame := range frames {
		// A zero frame may end after any of its extents.
		whole := map[int]bool{}
		for body := frame[1:]; i > 0 && len(body) > 0; {
			whole[len(frame)-len(body)] = len(body) < len(frame)-1
			var err error
			switch frame[0] {
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
			acks, err := apply(t, newDisk(testDisk), cut)
			if !errors.Is(err, ErrFrame) {
				t.Fatalf("frame %d cut to %d bytes: %v", i, n, err)
			}
			if last := acks[len(acks)-1]; last[0] != ackFailure {
				t.Fatalf("frame %d cut to %d bytes: the source was not told", i, n)
			}
		}
		// Nor does the transfer end early.
		if _, err := apply(t, newDisk(testDisk), frames[:i]); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			t.Fatalf("%d frames only: %v", i, err)
		}
	}
}

func TestHostileFrames(t *testing.T) {
	extentAt := func(off uint64, size uint32, method byte, payload string) []byte {
		f := binary.BigEndian.AppendUint64([]byte{frameData, 0, 1}, off)
		f = binary.BigEndian.AppendUint32(f, size)
		return append(append(f, method), payload...)
	}
	offerAt := func(off uint64, size uint32, sums int) []byte {
		f := binary.BigEndian.AppendUint64([]byte{frameOffer, 0, 0, 0, 1, 0, 0, 1}, off)
		f = binary.BigEndian.AppendUint32(f, size)
		return append(f, make([]byte, 16*sums)...)
	}
	zeroAt := func(off, length uint64) []byte {
		return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{frameZero}, off), length)
	}
	for name, frame := range map[string][]byte{
		"empty":               {},
		"unknown type":        {9, 1, 2, 3},
		"second open":         appendOpen(nil, testDisk, false),
		"no extents":          {frameData},
		"no zeros":            {frameZero},
		"beyond the end":      extentAt(testDisk-2, 3, 0, "abc"),
		"offset overflows":    extentAt(math.MaxUint64-1, 3, 0, "abc"),
		"negative offset":     extentAt(1<<63, 3, 0, "abc"),
		"empty extent":        extentAt(0, 0, 0, ""),
		"too large":           extentAt(0, maxContent+1, 0, "abc"),
		"size is not content": extentAt(0, 4, 0, "abc"),
		"too much together":   append([]byte{frameData, 0, 2}, bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 1}, 3)...),
		"more than there is":  append([]byte{frameData, 255, 255}, make([]byte, 100)...),
		"offer beyond":        offerAt(testDisk-page, 2*page, 2),
		"offer too large":     offerAt(0, maxContent+page, 257),
		"sums missing":        offerAt(0, 2*page, 1),
		"sums too many":       offerAt(0, 2*page, 3),
		"offer of nothing":    {frameOffer, 0, 0, 0, 1, 0, 0, 0},
		"offer of a unit":     {frameOffer, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0},
		"not offered":         appendApply(nil, 1),
		"unknown method":      extentAt(0, 3, 77, "abc"),
		"not zstd":            extentAt(0, 16, 1, "0123456789abcdef"),
		"zeros beyond":        zeroAt(testDisk-1, 2),
		"zeros overflow":      zeroAt(512, math.MaxUint64),
		"zeros negative":      zeroAt(1<<63, 1<<63),
		"no zeros at all":     zeroAt(0, 0),
		"barrier flag":        {frameBarrier, 0, 0, 0, 0, 0, 0, 0, 1, 2},
		"huge":                make([]byte, maxFrame+1),
	} {
		d := newDisk(testDisk)
		if _, err := apply(t, d, [][]byte{appendOpen(nil, testDisk, false), frame}); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
		if d.writes > 0 {
			t.Errorf("%s: written", name)
		}
	}
	for name, frame := range map[string][]byte{
		"newer version": {frameOpen, version + 1, 0, 0, 0, 0, 0, 64, 0, 0, 0},
		"other size":    appendOpen(nil, testDisk+512, false),
		"trailing byte": append(appendOpen(nil, testDisk, false), 0),
		"not open":      appendBarrier(nil, 1, true),
	} {
		if _, err := apply(t, newDisk(testDisk), [][]byte{frame}); !errors.Is(err, ErrFrame) {
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
		"ready":             {{ackReady, 2}},
		"ready, long":       {{ackReady, 0, 0}},
		"not offered":       {appendHeld(nil, 0, []compress.Origin{compress.OnDisk})},
		"long answer":       {append(appendHeld(nil, 0, nil), make([]byte, maxPages/4+1)...)},
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
	same := offerOf(1, page, []extent{{page, 2 * page}}, fill(2*page, 3))
	f.Add(pack([][]byte{same, appendApply(nil, 1), dataOf([]extent{{page, 2 * page}}, fill(2*page, 3)), same, appendApply(nil, 1), appendBarrier(nil, 1, true)}))
	f.Add(pack([][]byte{appendZero([]byte{frameZero}, extent{0, testDisk}), appendBarrier(nil, 1, true)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		frames := [][]byte{appendOpen(nil, testDisk, false)}
		for len(b) >= 2 {
			n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
			frames = append(frames, b[2:2+n])
			b = b[2+n:]
		}
		d := newDisk(testDisk)
		acks, err := apply(t, d, frames)
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
	for _, b := range [][]byte{appendDurable(nil, 1, 2), appendProgress(nil, 3), appendFailure(nil, "no space"), appendHeld(nil, 5, []compress.Origin{compress.OnSeed, compress.Nowhere}), appendReady(nil, true), {}} {
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
		case ackHeld:
			again = append(binary.BigEndian.AppendUint32([]byte{ackHeld}, uint32(a.id)), a.held...)
		case ackReady:
			again = appendReady(nil, a.blocks)
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
