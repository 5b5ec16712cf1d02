package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(key).Read(b)
	return b
}

func TestFramesOfEverySizeBothWays(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)
	sizes := []int{0, 1, 1452, 4096, maxData - frameHead - 1, maxData - frameHead, maxData, maxData + 1, 1 << 16, 1<<20 + 7, MaxFrame}
	for _, way := range []struct{ from, to *Channel }{{a, b}, {b, a}} {
		sent := make(chan error, 1)
		go func() {
			for i, n := range sizes {
				frame := pattern(uint64(i), n)
				if err := way.from.Send(testContext(t), frame); err != nil {
					sent <- err
					return
				}
				clear(frame) // the caller may use it again
			}
			sent <- way.from.CloseSend()
		}()
		var buf []byte
		for i, n := range sizes {
			got, err := way.to.Recv(testContext(t), buf)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, pattern(uint64(i), n)) {
				t.Fatalf("frame of %d bytes differs", n)
			}
			buf = got
		}
		for range 2 {
			if _, err := way.to.Recv(testContext(t), buf); err != io.EOF {
				t.Errorf("after the last frame: %v, want io.EOF", err)
			}
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		if err := way.from.Send(testContext(t), nil); !errors.Is(err, ErrClosed) {
			t.Errorf("Send after CloseSend: %v", err)
		}
	}
}

func TestManyChannelsAndSendersAtOnce(t *testing.T) {
	const senders, frames = 4, 25
	from, to := pair(t)
	var wg sync.WaitGroup
	for i := range MaxChannels {
		wg.Go(func() {
			c, err := from.Open(testContext(t), fmt.Sprintf("disk/%d", i), Priority(i%3))
			if err != nil {
				t.Error(err)
				return
			}
			var each sync.WaitGroup
			for s := range senders {
				each.Go(func() {
					for f := range frames {
						frame := bytes.Repeat([]byte{byte(s)}, 10+f*400)
						frame[0], frame[1] = byte(s), byte(f)
						if err := c.Send(testContext(t), frame); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			each.Wait()
			if err := c.CloseSend(); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			c, err := to.Accept(testContext(t))
			if err != nil {
				t.Error(err)
				return
			}
			var next [senders]int
			var buf []byte
			for {
				buf, err = c.Recv(testContext(t), buf)
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Error(err)
					return
				}
				s, f := int(buf[0]), int(buf[1])
				if f != next[s] || len(buf) != 10+f*400 || bytes.Count(buf[2:], buf[:1]) != len(buf)-2 {
					t.Errorf("%s: sender %d: frame %d of %d bytes, expected is frame %d", c.Name(), s, f, len(buf), next[s])
					return
				}
				next[s]++
			}
			for s, n := range next {
				if n != frames {
					t.Errorf("%s: %d frames of sender %d", c.Name(), n, s)
				}
			}
		})
	}
	wg.Wait()
}

func TestSendAndRecvEndWithTheirContext(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)

	ctx, cancel := context.WithCancelCause(testContext(t))
	why := errors.New("the move was aborted")
	received := make(chan error, 1)
	go func() {
		_, err := b.Recv(ctx, nil)
		received <- err
	}()
	cancel(why)
	if err := <-received; !errors.Is(err, why) {
		t.Errorf("Recv ends with %v", err)
	}
	if _, err := b.Recv(ctx, nil); !errors.Is(err, why) {
		t.Errorf("Recv with an ended context: %v", err)
	}
	if err := a.Send(ctx, []byte("x")); !errors.Is(err, why) {
		t.Errorf("Send with an ended context: %v", err)
	}
	// Nothing was sent or received, so the channel still works.
	if err := a.Send(testContext(t), []byte("frame")); err != nil {
		t.Fatal(err)
	}
	if got, err := b.Recv(testContext(t), nil); err != nil || string(got) != "frame" {
		t.Fatalf("received %q, %v", got, err)
	}
}

func TestSendInterruptedInAFrameBreaksTheChannelCleanly(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)
	ctx, cancel := context.WithCancel(testContext(t))
	sent := make(chan error, 1)
	go func() {
		var err error
		for err == nil { // until the windows are full
			err = a.Send(ctx, make([]byte, MaxFrame))
		}
		sent <- err
	}()
	for before := uint64(0); ; {
		time.Sleep(50 * time.Millisecond)
		now := from.Stats().BytesSent
		if now > firstCredit/2 && now-before < maxData {
			break
		}
		before = now
	}
	cancel()
	if err := <-sent; !errors.Is(err, context.Canceled) {
		t.Fatalf("Send: %v", err)
	}
	if err := a.Send(testContext(t), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after that: %v", err)
	}
	var err error
	for err == nil { // perhaps whole frames before it
		_, err = b.Recv(testContext(t), nil)
	}
	if !errors.Is(err, ErrReset) || !strings.Contains(err.Error(), "middle of a frame") {
		t.Errorf("the peer's Recv: %v", err)
	}
	exchange(t, from, to)
}

func TestChannelClose(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)
	waiting := make(chan error, 1)
	go func() {
		_, err := a.Recv(testContext(t), nil)
		waiting <- err
	}()
	a.Close()
	if err := <-waiting; !errors.Is(err, ErrClosed) {
		t.Errorf("our Recv: %v", err)
	}
	if err := a.CloseSend(); !errors.Is(err, ErrClosed) {
		t.Errorf("our CloseSend: %v", err)
	}
	if _, err := b.Recv(testContext(t), nil); !errors.Is(err, ErrReset) {
		t.Errorf("the peer's Recv: %v", err)
	}
	for {
		if err := b.Send(testContext(t), nil); err != nil {
			if !errors.Is(err, ErrReset) {
				t.Errorf("the peer's Send: %v", err)
			}
			break
		}
	}
	exchange(t, from, to)
}

func TestCloseAfterCloseSendDelivers(t *testing.T) {
	for _, p := range []Priority{Control, Memory} {
		from, to := pair(t)
		a, b := openPair(t, from, to, "closing", p)
		frame := pattern(1, firstCredit-10_000) // fits where nobody reads
		if err := a.Send(testContext(t), frame); err != nil {
			t.Fatal(err)
		}
		if err := a.CloseSend(); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if got, err := b.Recv(testContext(t), nil); err != nil || !bytes.Equal(got, frame) {
			t.Fatalf("priority %d: received %d bytes, %v", p, len(got), err)
		}
		if _, err := b.Recv(testContext(t), nil); err != io.EOF {
			t.Errorf("priority %d: then %v", p, err)
		}
	}
}

func TestReaderThatStopsHoldsUpTheSender(t *testing.T) {
	const frameSize, frames = 256 << 10, 256 // 64 MiB
	const most = channelWindow
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)
	frame := pattern(1, frameSize)
	send := func(n int) chan error {
		done := make(chan error, 1)
		go func() {
			for range n {
				if err := a.Send(testContext(t), frame); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		return done
	}
	receive := func(n int) {
		var buf []byte
		var err error
		for range n {
			if buf, err = b.Recv(testContext(t), buf); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(buf, frame) {
				t.Fatal("a frame differs")
			}
		}
	}
	done := send(frames) // lets the window grow
	receive(frames)
	if err := <-done; err != nil {
		t.Fatal(err)
	}

	before, heap := from.Stats().BytesSent, heapInUse()
	done = send(frames)
	select {
	case err := <-done:
		t.Fatalf("64 MiB went into a channel that nobody reads: %v", err)
	case <-time.After(time.Second):
	}
	if sent := from.Stats().BytesSent - before; sent > most*5/4 {
		t.Errorf("%d bytes were sent to a reader that had stopped, its windows are %d", sent, most)
	}
	if grown := heapInUse() - heap; grown > 2*most {
		t.Errorf("memory has grown by %d bytes", grown)
	}
	exchange(t, from, to) // the control channel passes
	receive(frames)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkChannel(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			from, to := pair(b)
			out, in := openPair(b, from, to, "memory", Memory)
			frame := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			received := make(chan error, 1)
			go func() {
				var buf []byte
				var err error
				for err == nil {
					buf, err = in.Recv(context.Background(), buf)
				}
				received <- err
			}()
			for b.Loop() {
				if err := out.Send(context.Background(), frame); err != nil {
					b.Fatal(err)
				}
			}
			if err := out.CloseSend(); err != nil {
				b.Fatal(err)
			}
			if err := <-received; err != io.EOF {
				b.Fatal(err)
			}
		})
	}
}
