package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// scriptedInlet is a carrier's stream whose bytes arrive when the test says so.
type scriptedInlet struct {
	mu      sync.Mutex
	changed *sync.Cond
	bytes   []byte
	ended   bool
	late    bool
}

func newScriptedInlet() *scriptedInlet {
	in := &scriptedInlet{}
	in.changed = sync.NewCond(&in.mu)
	return in
}

func (in *scriptedInlet) arrive(b []byte) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.bytes = append(in.bytes, b...)
	in.changed.Broadcast()
}

func (in *scriptedInlet) end() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ended = true
	in.changed.Broadcast()
}

func (in *scriptedInlet) left() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.bytes)
}

func (in *scriptedInlet) Read(p []byte) (int, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case in.late:
			return 0, os.ErrDeadlineExceeded
		case len(in.bytes) > 0:
			n := copy(p, in.bytes)
			in.bytes = in.bytes[n:]
			return n, nil
		case in.ended:
			return 0, io.EOF
		}
		in.changed.Wait()
	}
}

func (in *scriptedInlet) SetReadDeadline(t time.Time) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.late = !t.IsZero()
	in.changed.Broadcast()
	return nil
}

// byteAt is the content of the test channels, so that a misplaced byte shows.
func byteAt(offset uint64) byte { return byte(offset*0x9e3779b1>>24) ^ byte(offset) }

func contentAt(offset uint64, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byteAt(offset + uint64(i))
	}
	return b
}

func chunkBytes(offset uint64, n int) []byte {
	return append(chunkHead{offset, uint16(n)}.append(nil), contentAt(offset, n)...)
}

// readMerged reads until the merger or ctx ends.
func readMerged(ctx context.Context, m *merger, piece int) ([]byte, error) {
	var got []byte
	p := make([]byte, piece)
	for {
		n, err := m.read(ctx, p)
		got = append(got, p[:n]...)
		if err != nil {
			return got, err
		}
	}
}

// inBubble hides what a test in a bubble must not be asked, its deadline.
type inBubble struct{ rapid.TB }

func TestMergeRestoresTheOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(inBubble{t}, func(t *rapid.T) {
			inlets := make([]*scriptedInlet, rapid.IntRange(1, Carriers).Draw(t, "carriers"))
			m := newMerger(context.Background())
			var followers sync.WaitGroup
			for i := range inlets {
				inlets[i] = newScriptedInlet()
				followers.Go(func() { m.follow(inlets[i]) })
			}
			// Cut some content, and give each chunk to some carrier.
			streams := make([][]byte, len(inlets))
			var end uint64
			for _, n := range rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 40), rapid.Just(maxChunk)), 0, 40).Draw(t, "chunks") {
				i := rapid.IntRange(0, len(inlets)-1).Draw(t, "carrier")
				streams[i] = append(streams[i], chunkBytes(end, n)...)
				end += uint64(n)
			}
			var script sync.WaitGroup
			for i, in := range inlets {
				stream := append(streams[i], chunkHead{offset: end}.append(nil)...)
				cuts := rapid.SliceOfN(rapid.IntRange(1, 40_000), 0, 5).Draw(t, "arrivals")
				delays := rapid.SliceOfN(rapid.IntRange(0, 9), len(cuts)+1, len(cuts)+1).Draw(t, "delays")
				script.Go(func() {
					for j, n := range cuts {
						time.Sleep(time.Duration(delays[j]) * time.Millisecond)
						n = min(n, len(stream))
						in.arrive(stream[:n])
						stream = stream[n:]
					}
					time.Sleep(time.Duration(delays[len(cuts)]) * time.Millisecond)
					in.arrive(stream)
					in.end()
				})
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			got, err := readMerged(ctx, m, rapid.IntRange(1, 100_000).Draw(t, "piece"))
			script.Wait()
			followers.Wait()
			if err != io.EOF || !bytes.Equal(got, contentAt(0, int(end))) {
				t.Fatalf("%d of %d bytes, %v", len(got), end, err)
			}
		})
	})
}

func TestMergeOfHostileChunks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(inBubble{t}, func(t *rapid.T) {
			m := newMerger(context.Background())
			for range rapid.IntRange(1, Carriers).Draw(t, "carriers") {
				in := newScriptedInlet()
				for range rapid.IntRange(0, 6).Draw(t, "chunks") {
					offset := rapid.OneOf(rapid.Uint64Range(0, 30), rapid.Uint64()).Draw(t, "offset")
					n := rapid.IntRange(0, 10).Draw(t, "length")
					in.arrive(chunkBytes(offset, n))
				}
				in.arrive(rapid.SliceOfN(rapid.Byte(), 0, 12).Draw(t, "junk"))
				if rapid.Bool().Draw(t, "ended") {
					in.end()
				}
				go m.follow(in)
				defer in.SetReadDeadline(longAgo)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			got, err := readMerged(ctx, m, 7)
			if !bytes.Equal(got, contentAt(0, len(got))) {
				t.Fatalf("%x was merged of the bytes of %x", got, contentAt(0, len(got)))
			}
			if !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) && err != io.EOF && !interrupted(err) {
				t.Fatalf("error %v", err)
			}
			m.stop(ErrClosed)
		})
	})
}

func TestMergeRefuses(t *testing.T) {
	end := func(offset uint64) []byte { return chunkHead{offset: offset}.append(nil) }
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	gap := make([][]byte, Carriers)
	for i := range gap {
		gap[i] = chunkBytes(uint64(10+i), 1)
	}
	for _, test := range []struct {
		name    string
		inlets  [][]byte
		content int
		want    error
	}{
		{"the same chunk twice", [][]byte{join(chunkBytes(0, 9), chunkBytes(0, 9))}, 9, ErrFormat},
		{"a step back", [][]byte{join(chunkBytes(0, 9), chunkBytes(8, 9))}, 9, ErrFormat},
		{"overlap of two carriers", [][]byte{chunkBytes(0, 9), chunkBytes(8, 9)}, 0, ErrFormat},
		{"the same offset on two carriers", [][]byte{chunkBytes(0, 9), chunkBytes(0, 9)}, 0, ErrFormat},
		{"no carrier has the next chunk", gap, 0, ErrFormat},
		{"an end before the end", [][]byte{join(chunkBytes(0, 9), end(9)), end(8)}, 0, ErrFormat},
		{"an end after the end", [][]byte{join(chunkBytes(0, 9), end(9)), end(10)}, 9, ErrFormat},
		{"a chunk over the end", [][]byte{chunkBytes(0, 9), end(5)}, 0, ErrFormat},
		{"a chunk behind the end", [][]byte{join(chunkBytes(0, 9), end(9)), chunkBytes(10, 1)}, 9, ErrFormat},
		{"an end inside the carrier's bytes", [][]byte{join(chunkBytes(0, 9), end(5))}, 9, ErrFormat},
		{"no end", [][]byte{chunkBytes(0, 9)}, 9, io.ErrUnexpectedEOF},
		{"cut in a chunk", [][]byte{chunkBytes(0, 9)[:chunkSize+4]}, 4, io.ErrUnexpectedEOF},
		{"cut in a head", [][]byte{chunkBytes(0, 9)[:4]}, 0, io.ErrUnexpectedEOF},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMerger(context.Background())
				for _, b := range test.inlets {
					in := newScriptedInlet()
					in.arrive(b)
					in.end()
					go m.follow(in)
				}
				synctest.Wait() // the heads are in
				got, err := readMerged(context.Background(), m, 100)
				if !errors.Is(err, test.want) || len(got) > test.content {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				m.stop(ErrClosed)
			})
		})
	}
}

func TestMergeRefusesWhatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMerger(context.Background())
		inlets := []*scriptedInlet{newScriptedInlet(), newScriptedInlet()}
		for _, in := range inlets {
			go m.follow(in)
			defer in.SetReadDeadline(longAgo)
		}
		inlets[0].arrive(chunkBytes(0, 9))
		if n, err := m.read(context.Background(), make([]byte, 9)); n != 9 || err != nil {
			t.Fatal(n, err)
		}
		inlets[1].arrive(chunkBytes(8, 9))
		if n, err := m.read(context.Background(), make([]byte, 9)); n != 0 || !errors.Is(err, ErrFormat) {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
}

// Bytes beyond a gap stay in the carriers' own windows.
func TestMergeHoldsNoChunks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMerger(context.Background())
		defer m.stop(ErrClosed)
		missing, ahead := newScriptedInlet(), newScriptedInlet()
		ahead.arrive(chunkBytes(100, 1000))
		ahead.arrive(chunkBytes(1100, 1000))
		for _, in := range []*scriptedInlet{missing, ahead} {
			go m.follow(in)
			defer in.SetReadDeadline(longAgo)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if got, err := readMerged(ctx, m, 100); len(got) > 0 || !interrupted(err) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if n := ahead.left(); n != 2000+chunkSize {
			t.Errorf("%d bytes are left of the carrier that is ahead", n)
		}
		missing.arrive(chunkBytes(0, 100))
		ctx, cancel = context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if got, _ := readMerged(ctx, m, 100); !bytes.Equal(got, contentAt(0, 2100)) {
			t.Errorf("then %d bytes", len(got))
		}
	})
}
