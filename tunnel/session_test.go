package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// openPair opens a channel on one side and accepts it on the other.
func openPair(t testing.TB, from, to *Session, name string, p Priority) (a, b *Channel) {
	t.Helper()
	ctx := testContext(t)
	a, err := from.Open(ctx, name, p)
	if err != nil {
		t.Fatal(err)
	}
	b, err = to.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if a.Name() != name || b.Name() != name {
		t.Fatalf("channel %q is named %q and %q", name, a.Name(), b.Name())
	}
	return a, b
}

// exchange sends a frame each way on a new channel.
func exchange(t testing.TB, from, to *Session) {
	t.Helper()
	a, b := openPair(t, from, to, "exchange", Control)
	defer a.Close()
	defer b.Close()
	for _, way := range []struct{ from, to *Channel }{{a, b}, {b, a}} {
		if err := way.from.Send(testContext(t), []byte("hello")); err != nil {
			t.Fatal(err)
		}
		got, err := way.to.Recv(testContext(t), nil)
		if err != nil || string(got) != "hello" {
			t.Fatalf("received %q, %v", got, err)
		}
	}
}

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
	sizes := []int{0, 1, leadSize - 1, leadSize, leadSize + 1, 1452, 4096, 1 << 16, 1<<20 + 7, MaxFrame}
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

func TestChannelsAreBoundedAndMakeRoom(t *testing.T) {
	from, to := pair(t)
	var a, b *Channel
	for range MaxChannels {
		a, b = openPair(t, from, to, "c", Control)
	}
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := from.Open(ctx, "c", Control); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("channel %d: %v", MaxChannels+1, err)
	}
	exchange(t, to, from) // the other side has its own
	for range MaxChannels / 2 {
		a.Close()
		b.Close()
		a, b = openPair(t, from, to, "c", Control)
	}
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
	go func() { sent <- a.Send(ctx, make([]byte, MaxFrame)) }() // more than the first window
	for from.Stats().BytesSent < streamWindowStart {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-sent; !errors.Is(err, context.Canceled) {
		t.Fatalf("Send: %v", err)
	}
	if err := a.Send(testContext(t), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after that: %v", err)
	}
	if _, err := b.Recv(testContext(t), nil); !errors.Is(err, ErrReset) || !strings.Contains(err.Error(), "middle of a frame") {
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
	from, to := pair(t)
	a, b := openPair(t, from, to, "control", Control)
	frame := pattern(1, 300<<10)
	if err := a.Send(testContext(t), frame); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseSend(); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if got, err := b.Recv(testContext(t), nil); err != nil || !bytes.Equal(got, frame) {
		t.Fatalf("received %d bytes, %v", len(got), err)
	}
	if _, err := b.Recv(testContext(t), nil); err != io.EOF {
		t.Errorf("then %v", err)
	}
}

func TestAcceptPassesOverChannelsClosedAtOnce(t *testing.T) {
	from, to := pair(t)
	for range 20 {
		c, err := from.Open(testContext(t), "gone", Disk)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if _, err := from.Open(testContext(t), "stays", Control); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := to.Accept(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if c.Name() == "stays" {
			return
		}
		c.Close()
	}
}

func TestOpenChecksItsArguments(t *testing.T) {
	from, _ := pair(t)
	for _, name := range []string{"", strings.Repeat("a", maxName+1), "Memory", "a b", "ä"} {
		if _, err := from.Open(testContext(t), name, Disk); !errors.Is(err, ErrFormat) {
			t.Errorf("Open(%q): %v", name, err)
		}
	}
	if _, err := from.Open(testContext(t), "a", Disk+1); !errors.Is(err, ErrFormat) {
		t.Errorf("Open with an unknown priority: %v", err)
	}
}

func TestSessionCloseTellsTheReason(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "control", Control)
	if from.Err() != nil || to.Err() != nil {
		t.Fatal("open sessions have errors", from.Err(), to.Err())
	}
	from.Close("move done\x1b[1m" + strings.Repeat("!", 1000))
	<-from.Done()
	<-to.Done()
	if err := from.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "closed here: move done?[1m!!") {
		t.Errorf("here: %v", err)
	}
	if err := to.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "closed by peer: move done?[1m!!") {
		t.Errorf("there: %v", err)
	}
	ctx := testContext(t)
	_, openErr := to.Open(ctx, "c", Control)
	_, acceptErr := to.Accept(ctx)
	_, recvErr := b.Recv(ctx, nil)
	for what, err := range map[string]error{
		"Open": openErr, "Accept": acceptErr, "Recv": recvErr, "Send": b.Send(ctx, nil), "CloseSend": b.CloseSend(),
	} {
		if !errors.Is(err, ErrClosedByPeer) {
			t.Errorf("%s on the closed session: %v", what, err)
		}
	}
	if err := a.Send(ctx, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after Close: %v", err)
	}
}

func TestStats(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)
	frame := make([]byte, 1<<20)
	go a.Send(testContext(t), frame)
	if _, err := b.Recv(testContext(t), nil); err != nil {
		t.Fatal(err)
	}
	if st := from.Stats(); st.BytesSent < 1<<20 || st.BytesReceived == 0 || st.RTT <= 0 || st.MinRTT <= 0 {
		t.Errorf("sender: %+v", st)
	}
	if st := to.Stats(); st.BytesReceived < 1<<20 || st.BytesSent == 0 {
		t.Errorf("receiver: %+v", st)
	}
}

// junkPeer is a trusted agent's key in the hands of a program that speaks QUIC
// but not this protocol, connected to the session.
func junkPeer(t *testing.T) (*quic.Conn, *Session) {
	t.Helper()
	id := testIdentity(t)
	e, _ := listen(t, "127.0.0.1:0", testIdentity(t), only(id.ID()))
	conn, err := rawDial(t, e.Addr(), &tls.Config{NextProtos: []string{protocol}, Certificates: []tls.Certificate{id.certificate}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := e.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return conn, s
}

func junkStream(t *testing.T, conn *quic.Conn, b []byte) *quic.Stream {
	t.Helper()
	stream, err := conn.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Write(b); err != nil {
		t.Fatal(err)
	}
	return stream
}

func TestJunkChannelHeaderEndsTheSession(t *testing.T) {
	for name, b := range junkHeaders {
		t.Run(name, func(t *testing.T) {
			conn, s := junkPeer(t)
			junkStream(t, conn, b)
			if c, err := s.Accept(testContext(t)); !errors.Is(err, ErrFormat) {
				t.Fatalf("accepted %v, %v", c, err)
			}
			<-conn.Context().Done()
			var closed *quic.ApplicationError
			if err := context.Cause(conn.Context()); !errors.As(err, &closed) || closed.ErrorCode != closeFormat {
				t.Errorf("the peer is told %v", err)
			}
			if err := s.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "channel header") {
				t.Errorf("the session ends with %v", err)
			}
		})
	}
}

func TestAcceptCancelledInAHeader(t *testing.T) {
	conn, s := junkPeer(t)
	junkStream(t, conn, []byte{1})
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Accept(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Accept: %v", err)
	}
	junkStream(t, conn, channelHeader{"next", Control}.append(nil))
	if c, err := s.Accept(testContext(t)); err != nil || c.Name() != "next" {
		t.Errorf("the next Accept: %v", err)
	}
}

func TestJunkFrames(t *testing.T) {
	for _, test := range []struct {
		name string
		junk []byte
		want error
	}{
		{"4 GiB announced", []byte{0xff, 0xff, 0xff, 0xff, 1, 2}, ErrFrameTooLarge},
		{"one byte too many announced", []byte{0, 0x40, 0, 1}, ErrFrameTooLarge},
		{"end in a length", []byte{0, 0, 1}, io.ErrUnexpectedEOF},
		{"end in a frame", []byte{0, 0, 0, 9, 1, 2}, io.ErrUnexpectedEOF},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, s := junkPeer(t)
			stream := junkStream(t, conn, channelHeader{"memory", Memory}.append(nil))
			if _, err := stream.Write(test.junk); err != nil {
				t.Fatal(err)
			}
			stream.Close()
			c, err := s.Accept(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Recv(testContext(t), nil); !errors.Is(err, test.want) {
				t.Errorf("Recv: %v", err)
			}
			var reset *quic.StreamError
			if _, err := stream.Read(make([]byte, 1)); !errors.As(err, &reset) || reset.ErrorCode != resetFormat {
				t.Errorf("the peer is told %v", err)
			}
			if s.Err() != nil {
				t.Errorf("the session ended: %v", s.Err())
			}
		})
	}
}

func TestReaderThatStopsHoldsUpTheSender(t *testing.T) {
	const frameSize, frames = 256 << 10, 256 // 64 MiB, four times the window
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
	if sent := from.Stats().BytesSent - before; sent > streamWindow*5/4 {
		t.Errorf("%d bytes were sent to a reader that had stopped, the window is %d", sent, streamWindow)
	}
	if grown := heapInUse() - heap; grown > 2*streamWindow {
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
