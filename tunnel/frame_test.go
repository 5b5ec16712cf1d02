package tunnel

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
)

var framesOfEachKind = []frame{
	{kind: kindData, channel: 7, offset: 1 << 40, data: []byte("bytes")},
	{kind: kindData, flags: flagEnd, channel: 1<<32 - 1, offset: maxOffset, data: []byte{}},
	{kind: kindData, flags: flagEnd, channel: 2, data: bytes.Repeat([]byte{1}, maxData)},
	{kind: kindReset, channel: 3, code: uint8(resetFormat)},
	{kind: kindDone, channel: 4, code: uint8(doneAll)},
	{kind: kindCredit, channel: 5, offset: 1 << 33},
	{kind: kindGone, channel: 6, offset: 12},
	{kind: kindAck, offset: 1<<64 - 1},
	{kind: kindPing},
	{kind: kindClose, code: uint8(closeFormat), data: []byte("over")},
	{kind: kindClose, data: []byte{}},
	{kind: kindRetire},
}

// parseFrame reads a frame with its data.
func parseFrame(r *bufio.Reader) (frame, error) {
	f, length, err := readFrameHead(r)
	if err != nil || f.kind != kindData {
		return f, err
	}
	f.data = make([]byte, length)
	_, err = io.ReadFull(r, f.data)
	return f, cutShort(err)
}

func TestCarrierFrameRoundTrip(t *testing.T) {
	var all []byte
	for _, f := range framesOfEachKind {
		all = f.append(all)
	}
	r := bufio.NewReader(bytes.NewReader(all))
	for _, want := range framesOfEachKind {
		got, err := parseFrame(r)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v became %+v, %v", want, got, err)
		}
	}
	if _, err := parseFrame(r); err != io.EOF {
		t.Errorf("behind the last frame: %v", err)
	}
}

func TestCarrierFrameEveryPrefixFails(t *testing.T) {
	for _, f := range framesOfEachKind {
		whole := f.append(nil)
		for n := 1; n < min(len(whole), 100); n++ {
			if _, err := parseFrame(bufio.NewReader(bytes.NewReader(whole[:n]))); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("%d of %d bytes of kind %d: %v", n, len(whole), f.kind, err)
			}
		}
	}
}

func TestCarrierFrameJunk(t *testing.T) {
	data := frame{kind: kindData, channel: 1, data: []byte("x")}.append(nil)
	change := func(at int, b ...byte) []byte {
		junk := bytes.Clone(data)
		copy(junk[at:], b)
		return junk
	}
	for want, junk := range map[string][]byte{
		"frame of kind 0":  {0},
		"frame of kind 10": {10},
		"with flags":       change(1, 2),
		"at offset":        change(6, 0xff),
		"of no bytes":      change(14, 0, 0),
		"data of 65535":    change(14, 0xff, 0xff),
		"reason of 65535 ": {byte(kindClose), 0, 0xff, 0xff},
	} {
		_, err := parseFrame(bufio.NewReader(bytes.NewReader(junk)))
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func FuzzCarrierFrame(f *testing.F) {
	for _, seed := range framesOfEachKind {
		f.Add(seed.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseFrame(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			return
		}
		again, err := parseFrame(bufio.NewReader(bytes.NewReader(got.append(nil))))
		if err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("%+v became %+v, %v", got, again, err)
		}
	})
}
