package tunnel

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestTagRoundTrip(t *testing.T) {
	for _, want := range [][]byte{{}, {0}, []byte("redirect 7"), bytes.Repeat([]byte{0xff}, MaxTag)} {
		r := bytes.NewReader(append(appendTag(nil, want), "later"...))
		got, err := readTag(r)
		if err != nil || !bytes.Equal(got, want) || r.Len() != len("later") {
			t.Errorf("%x is read as %x, %v, %d bytes left", want, got, err, r.Len())
		}
		b := appendTag(nil, want)
		for n := range b {
			if got, err := readTag(bytes.NewReader(b[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%d of %d bytes give %x, %v", n, len(b), got, err)
			}
		}
	}
}

var junkTags = map[string][]byte{
	"version 0":        {0, 1, 'a'},
	"tag of 65":        append([]byte{1, 65}, make([]byte, 65)...),
	"tag of 255":       append([]byte{1, 255}, make([]byte, 255)...),
	"cut short":        {1, 4, 'a', 'b'},
	"nothing":          {},
	"much behind":      append([]byte{1, 0}, make([]byte, maxGreeting)...),
	"HTTP":             []byte("GET / HTTP/1.1\r\nHost: wanmig.example.org\r\n\r\n"),
	"a channel header": channelHeader{name: "control"}.append(nil)[:3],
}

func FuzzReadTag(f *testing.F) {
	f.Add(appendTag(nil, nil))
	f.Add(appendTag(nil, bytes.Repeat([]byte{'t'}, MaxTag)))
	for _, b := range junkTags {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		tag, err := readTag(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := readTag(bytes.NewReader(appendTag(nil, tag)))
		if err != nil || !bytes.Equal(again, tag) || len(tag) > MaxTag {
			t.Fatalf("%x is read as %x, and that as %x, %v", b, tag, again, err)
		}
	})
}
