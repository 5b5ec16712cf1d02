package tunnel

import (
	"context"
	"errors"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// simChannel opens a channel over a simulated session.
func simChannel(t *testing.T, from, to *Session, p Priority) (out, in *Channel) {
	t.Helper()
	out, err := from.Open(context.Background(), "channel", p)
	if err != nil {
		t.Fatal(err)
	}
	in, err = to.Accept(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return out, in
}

// pump sends frames until ctx ends, and counts what arrives.
func pump(ctx context.Context, out, in *Channel) (got *atomic.Int64, done chan struct{}) {
	got, done = new(atomic.Int64), make(chan struct{})
	go func() {
		frame := make([]byte, 64<<10)
		for out.Send(ctx, frame) == nil {
		}
	}()
	go func() {
		defer close(done)
		var buf []byte
		var err error
		for err == nil {
			if buf, err = in.Recv(ctx, buf); err == nil {
				got.Add(int64(len(buf)))
			}
		}
	}()
	return got, done
}

func TestSessionHoldsThroughACut(t *testing.T) {
	for _, cut := range []time.Duration{2 * time.Second, 10 * time.Second, time.Minute, 5 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			l := &line{rate: 2_500_000, delay: 50 * time.Millisecond, forgets: true}
			from, to := sessionsOver(t, l, 4)
			out, in := simChannel(t, from, to, Memory)
			ctx, cancel := context.WithCancel(context.Background())
			got, done := pump(ctx, out, in)
			time.Sleep(20 * time.Second)
			if !from.Link().LostSince.IsZero() {
				t.Errorf("lost since %v", from.Link().LostSince)
			}
			l.setCut(true)
			time.Sleep(cut)
			if since := from.Link().LostSince; cut > silence+time.Second && (since.IsZero() || time.Since(since) < cut-time.Second) {
				t.Errorf("%v into a cut it is lost since %v", cut, since)
			}
			before := got.Load()
			l.setCut(false)
			began := time.Now()
			for got.Load() == before {
				time.Sleep(10 * time.Millisecond)
			}
			if waited := time.Since(began); waited > longestWait+redialTimeout+time.Second {
				t.Errorf("the first frame comes %v after the end of a cut of %v", waited, cut)
			}
			time.Sleep(3 * time.Second)
			after := got.Load()
			time.Sleep(3 * time.Second)
			if rate := (got.Load() - after) / 3; rate < int64(l.rate) {
				t.Errorf("%v after a cut of %v there are %d bytes a second, a carrier takes %d", time.Since(began), cut, rate, l.rate)
			}
			time.Sleep(20 * time.Second)
			if !from.Link().LostSince.IsZero() || !to.Link().LostSince.IsZero() {
				t.Errorf("lost since %v, there %v", from.Link().LostSince, to.Link().LostSince)
			}
			cancel()
			<-done
			st := from.Stats()
			if st.BytesResent > uint64(got.Load())/100 {
				t.Errorf("%d of %d bytes sent again", st.BytesResent, got.Load())
			}
			t.Logf("cut of %v: back after %v, %d of %d bytes again", cut, time.Since(began)-20*time.Second, st.BytesResent, got.Load())
		})
	}
}

func TestOutageEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{rate: 2_500_000, delay: 50 * time.Millisecond}
		from, to := sessionsOver(t, l, 4)
		time.Sleep(time.Hour) // an idle session lives
		if from.Err() != nil || to.Err() != nil || !from.Link().LostSince.IsZero() {
			t.Fatal(from.Err(), to.Err(), from.Link())
		}
		l.setCut(true)
		began := time.Now()
		for _, s := range []*Session{from, to} {
			<-s.Done()
			if err := s.Err(); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "for 10m0s") {
				t.Errorf("it ends with %v", err)
			}
		}
		if took := time.Since(began); took < DefaultOutage-2*pingAfter || took > DefaultOutage+2*pingAfter {
			t.Errorf("after %v", took)
		}
	})
}

func TestRestartedPeerEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{delay: 50 * time.Millisecond, forgets: true}
		from, to := sessionsOver(t, l, 2)
		l.setCut(true) // so that its farewell is not heard
		to.Close("restarting")
		time.Sleep(time.Minute)
		l.setCut(false)
		began := time.Now()
		<-from.Done()
		if err := from.Err(); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "restarted") {
			t.Errorf("it ends with %v", err)
		}
		if took := time.Since(began); took > longestWait+redialTimeout {
			t.Errorf("after %v", took)
		}
	})
}

func TestCloseTellsThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{delay: 50 * time.Millisecond}
		from, to := sessionsOver(t, l, 3)
		from.Close("that's\x00all")
		<-to.Done()
		if err := to.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "that's?all") {
			t.Errorf("the peer has %v", err)
		}
		if err := from.Err(); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

func TestUnorderedFramesPassEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{delay: 10 * time.Millisecond}
		from, to := sessionsOver(t, l, 5)
		out, err := from.OpenUnordered(context.Background(), "measure", Disk)
		if err != nil {
			t.Fatal(err)
		}
		in, err := to.Accept(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		l.mu.Lock()
		stalled := l.ends[len(l.ends)-1] // of the last carrier
		l.mu.Unlock()
		stalled.mu.Lock()
		stalled.stall = true
		stalled.mu.Unlock()
		const frames = 10_000
		go func() {
			b := make([]byte, MaxUnordered)
			for i := range frames {
				b[0], b[1] = byte(i>>8), byte(i)
				if err := out.Send(context.Background(), b[:2+i%(MaxUnordered-2)]); err != nil {
					t.Error(err)
				}
			}
			out.CloseSend()
		}()
		seen := make([]bool, frames)
		passed := 0
		next := 0
		for {
			b, err := in.Recv(context.Background(), nil)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			i := int(b[0])<<8 | int(b[1])
			if i >= frames || seen[i] || len(b) != 2+i%(MaxUnordered-2) {
				t.Fatalf("frame %d of %d bytes", i, len(b))
			}
			if seen[i] = true; i != next {
				passed++
			}
			next = i + 1
		}
		for i, ok := range seen {
			if !ok {
				t.Fatalf("frame %d is missing", i)
			}
		}
		if passed == 0 {
			t.Error("no frame has passed another")
		}
		if err := out.Send(context.Background(), make([]byte, MaxUnordered+1)); !errors.Is(err, ErrFrameTooLarge) {
			t.Errorf("a large frame: %v", err)
		}
	})
}

// A reset overtakes what was sent before it over other carriers.
func TestDataBehindAReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{rate: 100_000, delay: 50 * time.Millisecond}
		from, to := sessionsOver(t, l, 5)
		for _, in := range []bool{false, true} { // resets come from the sender, or from the reader
			ctx, interrupt := context.WithCancel(context.Background())
			out, read := simChannel(t, from, to, Disk)
			sent := make(chan error)
			go func() {
				var err error
				for err == nil {
					err = out.Send(ctx, make([]byte, 64<<10))
				}
				sent <- err
			}()
			if _, err := read.Recv(context.Background(), nil); err != nil {
				t.Fatal(err)
			}
			if in {
				read.Close()
			} else {
				interrupt()
			}
			if err := <-sent; !errors.Is(err, ErrReset) && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			time.Sleep(time.Minute)
			interrupt()
			out.Close()
			read.Close()
			time.Sleep(time.Minute)
			if from.Err() != nil || to.Err() != nil {
				t.Fatal(from.Err(), to.Err())
			}
			for _, s := range []*Session{from, to} {
				s.mu.Lock()
				if len(s.channels) != 0 || s.flight != 0 || s.segments != 0 || s.small != 0 {
					t.Errorf("left are %d channels, %d bytes in %d segments, %d frames", len(s.channels), s.flight, s.segments, s.small)
				}
				s.mu.Unlock()
			}
		}
	})
}

// When as many carriers are there as may be and all have died unnoticed, one more
// takes the place of a dead one.
func TestResumeInACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{rate: 100_000, delay: 20 * time.Millisecond, forgets: true}
		from, to := sessionsOver(t, l, Carriers+1)
		out, in := simChannel(t, from, to, Memory)
		ctx, cancel := context.WithCancel(context.Background())
		got, done := pump(ctx, out, in)
		time.Sleep(10 * time.Second)
		a, b := l.pair(TCP)
		if err := to.carry(b, 1000); !errors.Is(err, errTooMany) || !to.crowded() {
			t.Errorf("one more carrier: %v", err)
		}
		a.kill()
		l.setCut(true)
		time.Sleep(20 * time.Second)
		l.setCut(false)
		before := got.Load()
		time.Sleep(silence + redialTimeout + longestWait)
		if got.Load() == before || !from.Link().LostSince.IsZero() {
			t.Errorf("nothing came, lost since %v", from.Link().LostSince)
		}
		cancel()
		<-done
	})
}

// A peer that acknowledges nothing has the session end before it fills the memory.
func TestPeerThatAcknowledgesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{}
		from, _ := sessionsOver(t, l, 0)
		a, b := l.pair(TCP)
		if err := from.carry(a, 0); err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, b)
		header := channelHeader{name: "brief", priority: Disk}.append(nil)
		var wire []byte
		for number := uint32(1); number <= 4*unheard; number += 2 {
			wire = frame{kind: kindData, channel: number, data: header}.append(wire[:0])
			wire = frame{kind: kindReset, channel: number}.append(wire)
			wire = frame{kind: kindDone, channel: number}.append(wire)
			if _, err := b.Write(wire); err != nil {
				break
			}
		}
		synctest.Wait()
		if err := from.Err(); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "acknowledged") {
			t.Errorf("it ends with %v", err)
		}
		from.mu.Lock()
		defer from.mu.Unlock()
		if n := len(from.accepts); n > 2*MaxChannels {
			t.Errorf("%d channels wait to be accepted", n)
		}
	})
}

// A channel that both sides have done with is gone once, however often it is closed.
func TestChannelsAreCountedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{delay: time.Millisecond}
		from, to := sessionsOver(t, l, 2)
		for range 3 * MaxChannels {
			out, in := simChannel(t, from, to, Control)
			for _, c := range []*Channel{out, in} {
				if err := c.CloseSend(); err != nil {
					t.Fatal(err)
				}
			}
			for _, c := range []*Channel{out, in} {
				if _, err := c.Recv(context.Background(), nil); err != io.EOF {
					t.Error(err)
				}
				c.Close()
				c.Close()
			}
			time.Sleep(10 * time.Millisecond)
		}
		for _, s := range []*Session{from, to} {
			s.mu.Lock()
			if s.mine != 0 || len(s.channels) != 0 || s.pieces != 0 {
				t.Errorf("of %d channels %d are its own, with %d pieces", len(s.channels), s.mine, s.pieces)
			}
			s.mu.Unlock()
		}
	})
}

// What two carriers had that have died goes again once, and the channel is whole.
func TestHedgedSegmentsOfDeadCarriers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{rate: 1 << 20, delay: 20 * time.Millisecond, forgets: true}
		from, to := sessionsOver(t, l, 4)
		out, in := simChannel(t, from, to, Memory)
		var enough atomic.Bool
		sent := make(chan int, 1)
		go func() {
			frame := make([]byte, 30<<10)
			n := 0
			for !enough.Load() && out.Send(context.Background(), frame) == nil {
				n++
			}
			sent <- n
		}()
		received := make(chan int, 1)
		go func() {
			n := 0
			for {
				if _, err := in.Recv(context.Background(), nil); err != nil {
					if err != io.EOF {
						t.Error(err)
					}
					received <- n
					return
				}
				n++
			}
		}()
		for i := range 40 {
			time.Sleep(time.Second)
			from.mu.Lock() // one of them brings nothing more, and soon the others help it
			c := from.carriers[i%len(from.carriers)].conn.(*simConn)
			from.mu.Unlock()
			for _, end := range []*simConn{c, c.peer} {
				end.mu.Lock()
				end.stall = true
				end.mu.Unlock()
			}
			time.Sleep(500 * time.Millisecond)
			l.setCut(true)
			time.Sleep(time.Second)
			l.setCut(false)
			time.Sleep(silence)
			from.SetRate(int64(50_000 * (1 + i%20)))
		}
		from.SetRate(0)
		time.Sleep(time.Minute)
		enough.Store(true)
		n := <-sent
		if err := out.CloseSend(); err != nil {
			t.Error(err)
		}
		got := <-received
		if from.Err() != nil || to.Err() != nil {
			t.Fatal(from.Err(), to.Err())
		}
		if got != n {
			t.Errorf("%d frames arrived of %d", got, n)
		}
	})
}

// A frame costs about what it has in bytes, and there is a most of them.
func TestManySmallFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{}
		_, to := sessionsOver(t, l, 0)
		a, b := l.pair(TCP)
		if err := to.carry(b, 0); err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, a)
		header := channelHeader{name: "bytes", priority: Disk}.append(nil)
		wire := frame{kind: kindData, data: header}.append(nil)
		offset := uint64(len(header))
		for range 200_000 {
			wire = frame{kind: kindData, offset: offset, data: []byte{1}}.append(wire)
			offset++
		}
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for part := range slices.Chunk(wire, 64<<10) {
			if _, err := a.Write(part); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		runtime.GC()
		runtime.ReadMemStats(&after)
		if to.Err() != nil {
			t.Fatal(to.Err())
		}
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 16<<20 {
			t.Errorf("200000 bytes take %d", grown)
		}
		// With holes between them, so that none can join another.
		for channel := uint32(2); to.Err() == nil && channel < 2*MaxChannels; channel += 2 {
			for offset := uint64(1); offset < firstCredit; offset += 2 {
				wire = frame{kind: kindData, channel: channel, offset: offset, data: []byte{1}}.append(wire[:0])
				a.Write(wire)
			}
			synctest.Wait()
		}
		if err := to.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "frames to keep") {
			t.Errorf("it ends with %v", err)
		}
	})
}

// A process that was stopped takes that time for no silence of the peer.
func TestStandstillIsNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{delay: time.Millisecond}
		from, _ := sessionsOver(t, l, 3)
		time.Sleep(10 * time.Second)
		from.look(time.Now().Add(time.Hour))
		if from.Err() != nil || !from.Link().LostSince.IsZero() || len(from.Link().Carriers) != 3 {
			t.Errorf("after an hour's standstill: %v, %+v", from.Err(), from.Link())
		}
	})
}

// A carrier that is not needed any more goes without anything being sent again, although
// both sides send.
func TestRetiredCarriers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{rate: 8 << 20, delay: 20 * time.Millisecond}
		from, to := sessionsOver(t, l, 4)
		from.mu.Lock()
		from.steering.striping.rested = 24 * time.Hour // it would begin trials of its own
		from.mu.Unlock()
		out, in := simChannel(t, from, to, Memory)
		ctx, cancel := context.WithCancel(context.Background())
		there, done := pump(ctx, out, in)
		out, in = simChannel(t, to, from, Memory)
		back, done2 := pump(ctx, out, in)
		time.Sleep(time.Second)
		from.mu.Lock()
		before := len(from.carriers)
		from.steering.failed[TCP] = time.Now() // and would make another one
		from.retire(TCP)
		from.mu.Unlock()
		time.Sleep(3 * time.Second)
		for _, s := range []*Session{from, to} {
			if n := len(s.Link().Carriers); n != before-1 {
				t.Errorf("%d carriers are left of %d", n, before)
			}
			if n := s.Stats().BytesResent; n != 0 {
				t.Errorf("%d bytes were sent again", n)
			}
		}
		if there.Load() == 0 || back.Load() == 0 {
			t.Errorf("%d and %d bytes came", there.Load(), back.Load())
		}
		cancel()
		<-done
		<-done2
	})
}
