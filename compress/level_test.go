package compress

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestControl plays testdata/control.txt: what windows of one second say, and
// the level after them.
func TestControl(t *testing.T) {
	script, err := os.ReadFile("testdata/control.txt")
	if err != nil {
		t.Fatal(err)
	}
	var c control
	lines := 0
	for i, line := range strings.Split(string(script), "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		lines++
		var busy, link, idle, room float64
		var times, cores int
		var want string
		if words[0] == "stream" {
			if _, err := fmt.Sscan(strings.Join(words[1:], " "), &cores, &room); err != nil {
				t.Fatalf("line %d: %v", i+1, err)
			}
			c = newControl(cores, room)
			continue
		}
		if len(words) == 4 {
			words = slices.Insert(words, 3, "0")
		}
		if _, err := fmt.Sscan(strings.Join(words, " "), &times, &busy, &link, &idle, &want); err != nil {
			t.Fatalf("line %d: %v", i+1, err)
		}
		second := float64(time.Second)
		for range times {
			c.follow(window{elapsed: time.Second, encoding: time.Duration(busy * second), sending: time.Duration(link * second), awaited: time.Duration(idle * second)})
		}
		if c.level.String() != want {
			t.Errorf("line %d: %s is at %v", i+1, line, c.level)
		}
	}
	if lines < 20 {
		t.Errorf("only %d lines in the script", lines)
	}
}

// model is how fast a core encodes, in bytes a second, and to what part of its size.
var model = [levels]struct{ speed, size float64 }{{390e6, .279}, {230e6, .267}, {110e6, .263}, {21e6, .249}}

// pipeline is a window of a stream whose blocks are encoded beside being sent.
func pipeline(c *control, link float64) window {
	m := model[c.level]
	encoders := c.may(c.level)
	content := min(encoders*m.speed, link/m.size) // per second
	return window{elapsed: time.Second, encoding: time.Duration(content / m.speed * 1e9), sending: time.Duration(content * m.size / link * 1e9)}
}

// inTurn is the same for one that encodes a block, sends it, and so on.
func inTurn(c *control, link float64) window {
	m := model[c.level]
	encode, send := 1/m.speed, m.size/link
	return window{elapsed: time.Second, encoding: time.Duration(encode / (encode + send) * 1e9), sending: time.Duration(send / (encode + send) * 1e9)}
}

// A stream comes to the level that fits its link, and stays there.
func TestControlSettles(t *testing.T) {
	for _, tt := range []struct {
		cores int
		room  float64
		goes  func(*control, float64) window
		mbit  float64
		want  level
	}{
		{2, 2, pipeline, 5, best},
		{2, 2, pipeline, 20, best},
		{2, 2, pipeline, 100, better},
		{2, 2, pipeline, 200, normal},
		{2, 2, pipeline, 700, normal},
		{2, 2, pipeline, 1500, fastest},
		{2, 2, pipeline, 1e6, fastest},
		{8, 8, pipeline, 20, best},
		{8, 8, pipeline, 200, better},
		{8, 8, pipeline, 1000, normal},
		{8, 8, pipeline, 1e6, fastest},
		{2, 0.5, inTurn, 5, best},
		{2, 0.5, inTurn, 20, better},
		{2, 0.5, inTurn, 100, normal},
		{2, 0.5, inTurn, 1000, fastest},
	} {
		c := newControl(tt.cores, tt.room)
		changes := 0
		for i := range 1000 {
			before := c.level
			c.follow(tt.goes(&c, tt.mbit*1e6/8))
			if c.level != before && i >= 10 {
				changes++
			}
		}
		if c.level != tt.want || changes > 0 {
			t.Errorf("%g cores of %d at %g Mbit/s: at %v after %d late changes, want %v", tt.room, tt.cores, tt.mbit, c.level, changes, tt.want)
		}
	}
}

// at is an encoder at a level, which it keeps as it is not told of a link.
func at(l level) *Encoder {
	e := &Encoder{control: newControl(2, 2), since: time.Now()}
	e.control.level = l
	e.choose()
	return e
}

func TestLevelsRoundTrip(t *testing.T) {
	blocks := corpus(t)
	var sizes [levels]int
	for l := range levels {
		e := at(l)
		for kind, bs := range blocks {
			enc, m := e.Encode(nil, bs[0])
			dec, err := Decode(nil, m, enc, len(bs[0]))
			if err != nil || !bytes.Equal(dec, bs[0]) {
				t.Errorf("%v: %s: error %v", l, kind, err)
			}
			if (m == Raw) != (kind == "noise") {
				t.Errorf("%v: %s is sent %v", l, kind, m)
			}
			sizes[l] += len(enc)
		}
		if l > 0 && sizes[l] >= sizes[l-1] {
			t.Errorf("%v makes %d bytes, %v %d", l, sizes[l], l-1, sizes[l-1])
		}
	}
}

func TestHurry(t *testing.T) {
	e := at(best)
	e.Hurry(true)
	if e.level != normal {
		t.Errorf("in a hurry, the level is %v", e.level)
	}
	e.Hurry(false)
	if e.level != best {
		t.Errorf("with time, the level is %v", e.level)
	}
	e = at(fastest)
	if e.Hurry(true); e.level != fastest {
		t.Errorf("in a hurry, the level rises to %v", e.level)
	}
}

// The tables of a strong level take memory while a stream is at it, and are
// shared by those that are.
func TestTablesAreShared(t *testing.T) {
	a, b := at(best), at(best)
	if a.zstd != b.zstd {
		t.Error("two streams at one level have two encoders")
	}
	a.Hurry(true)
	b.Hurry(true)
	runtime.GC()
	if shared.of[best].Value() != nil {
		t.Error("the encoder that no stream uses is kept")
	}
	runtime.KeepAlive(a)
	runtime.KeepAlive(b)
}
