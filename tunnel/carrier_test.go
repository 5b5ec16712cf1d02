package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// awaitCarriers waits until a session or packets have n connections.
func awaitCarriers(t testing.TB, s bundled, n int) []*quic.Conn {
	t.Helper()
	for range 1000 {
		if carriers := s.common().all(); len(carriers) == n {
			return carriers
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%d carriers did not come", n)
	return nil
}

func awaitEnd(t testing.TB, conn *quic.Conn) {
	t.Helper()
	select {
	case <-conn.Context().Done():
	case <-testContext(t).Done():
		t.Fatal("a connection does not end")
	}
}

func awaitLanes(t testing.TB, c *Channel, n int) {
	t.Helper()
	st := c.stream.(*stripe)
	for range 1000 {
		st.mu.Lock()
		lanes := len(st.lanes)
		st.mu.Unlock()
		if lanes == n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("the channel has not got %d streams", n)
}

func TestChannelUsesAllCarriers(t *testing.T) {
	from, to := pair(t)
	early, earlyIn := openPair(t, from, to, "early", Memory) // perhaps before they join
	awaitCarriers(t, from, Carriers)
	awaitCarriers(t, to, Carriers)
	late, lateIn := openPair(t, to, from, "late", Disk)
	for _, way := range []struct {
		sender  *Session
		out, in *Channel
	}{{from, early, earlyIn}, {to, earlyIn, early}, {to, late, lateIn}, {from, lateIn, late}} {
		awaitLanes(t, way.out, Carriers)
		awaitLanes(t, way.in, Carriers)
		var before []uint64
		for _, conn := range way.sender.carriers {
			before = append(before, conn.ConnectionStats().BytesSent)
		}
		frame := pattern(7, MaxFrame)
		go way.out.Send(testContext(t), frame)
		got, err := way.in.Recv(testContext(t), nil)
		if err != nil || !bytes.Equal(got, frame) {
			t.Fatalf("received %d bytes, %v", len(got), err)
		}
		// The first one is left to control frames, after a chunk that it may hold.
		if n := way.sender.first.ConnectionStats().BytesSent - before[0]; n > 4*maxChunk {
			t.Errorf("the first carrier took %d bytes", n)
		}
		for i, conn := range way.sender.carriers[1:] {
			if n := conn.ConnectionStats().BytesSent - before[1+i]; n < maxChunk {
				t.Errorf("carrier %d took %d bytes", 2+i, n)
			}
		}
	}
}

func TestStreamsThatComeBeforeTheirChannel(t *testing.T) {
	from, to := pair(t)
	awaitCarriers(t, from, Carriers)
	awaitCarriers(t, to, Carriers)
	gone, err := from.Open(testContext(t), "gone", Disk)
	if err != nil {
		t.Fatal(err)
	}
	a, err := from.Open(testContext(t), "memory", Memory)
	if err != nil {
		t.Fatal(err)
	}
	frame := pattern(1, 1<<20)
	if err := a.Send(testContext(t), frame); err != nil {
		t.Fatal(err)
	}
	for waiting := 0; waiting < 2*(Carriers-1); {
		time.Sleep(time.Millisecond)
		waiting = 0
		to.mu.Lock()
		for _, lanes := range to.waiting {
			waiting += len(lanes)
		}
		to.mu.Unlock()
	}
	gone.Close()
	var b *Channel
	for b == nil || b.Name() != "memory" {
		if b, err = to.Accept(testContext(t)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := b.Recv(testContext(t), nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("received %d bytes, %v", len(got), err)
	}
	if len(to.waiting) != 0 {
		t.Errorf("streams of %d channels still wait", len(to.waiting))
	}
}

func TestChannelsAreForgotten(t *testing.T) {
	from, to := pair(t)
	for range 2 * MaxChannels {
		a, b := openPair(t, from, to, "short", Memory)
		for _, way := range []struct{ from, to *Channel }{{a, b}, {b, a}} {
			if err := way.from.Send(testContext(t), []byte("frame")); err != nil {
				t.Fatal(err)
			}
			if err := way.from.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if got, err := way.to.Recv(testContext(t), nil); err != nil || string(got) != "frame" {
				t.Fatalf("received %q, %v", got, err)
			}
			if _, err := way.to.Recv(testContext(t), nil); err != io.EOF {
				t.Fatalf("then %v", err)
			}
		}
	}
	for _, s := range []*Session{from, to} {
		for n := 1; n > 0; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			n = len(s.stripes) + len(s.waiting)
			s.mu.Unlock()
		}
	}
}

func TestCarrierDeathEndsTheSession(t *testing.T) {
	from, to := pair(t)
	a, _ := openPair(t, from, to, "memory", Memory)
	awaitCarriers(t, to, Carriers)
	carriers := awaitCarriers(t, from, Carriers)
	carriers[3].CloseWithError(77, "broken")
	<-from.Done()
	<-to.Done()
	// Both sides see it at once, and whoever is first tells the other.
	for _, s := range []*Session{from, to} {
		if err := s.Err(); err == nil || !strings.Contains(err.Error(), "broken") {
			t.Errorf("the session ends with %v", err)
		}
	}
	if err := a.Send(testContext(t), nil); err == nil || !strings.Contains(err.Error(), from.Err().Error()) {
		t.Errorf("Send: %v", err)
	}
	for _, conn := range carriers {
		awaitEnd(t, conn)
	}
}

// joinee is a session of an agent in the hands of the test, which can be joined.
type joinee struct {
	*Session
	endpoint *Endpoint
	book     *logBook
	client   *quic.Conn // the other end of the first connection
	token    token
}

func newJoinee(t *testing.T, id *Identity, trusted ...ID) joinee {
	t.Helper()
	b, book := listen(t, "127.0.0.1:0", testIdentity(t), only(append(trusted, id.ID())...))
	conn, err := rawDial(t, b.Addr(), &tls.Config{NextProtos: []string{protocol}, Certificates: []tls.Certificate{id.certificate}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := b.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	greeted, err := awaitGreeting(testContext(t), conn)
	if err != nil || b.joinable(greeted) != s {
		t.Fatalf("greeted with %x, %v", greeted, err)
	}
	return joinee{s, b, book, conn, greeted}
}

func rawJoin(t *testing.T, e *Endpoint, id *Identity, request []byte) (*quic.Conn, *quic.SendStream) {
	t.Helper()
	conn, err := rawDial(t, e.Addr(), &tls.Config{NextProtos: []string{joinProtocol}, Certificates: []tls.Certificate{id.certificate}})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := conn.OpenUniStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Write(request); err != nil {
		t.Fatal(err)
	}
	return conn, stream
}

func TestJoinsThatAreRefused(t *testing.T) {
	idA, idC := testIdentity(t), testIdentity(t)
	s := newJoinee(t, idA, idC.ID())
	wrong := s.token
	wrong[7] ^= 1
	for _, test := range []struct {
		name    string
		id      *Identity
		request []byte
		want    string
	}{
		{"wrong token", idA, wrong.append(nil), "no such session"},
		{"no token", idA, token{}.append(nil), "no such session"},
		{"another agent that is trusted", idC, s.token.append(nil), "no such session"},
		{"version 0", idA, append([]byte{0}, s.token[:]...), "malformed"},
		{"short", idA, s.token.append(nil)[:9], "malformed"},
		{"long", idA, append(s.token.append(nil), make([]byte, maxGreeting)...), "malformed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, stream := rawJoin(t, s.endpoint, test.id, test.request)
			stream.Close()
			awaitEnd(t, conn)
			var closed *quic.ApplicationError
			if err := context.Cause(conn.Context()); !errors.As(err, &closed) || !strings.Contains(err.Error(), "not joined") {
				t.Errorf("the joiner is told %v", err)
			}
			s.book.await(t, "refused a carrier", "peer="+string(test.id.ID()), test.want)
		})
	}
	if n := s.endpoint.handshakes.Load(); n != 0 {
		t.Errorf("%d handshakes are still counted", n)
	}
	if s.Err() != nil || len(s.carriers) != 1 {
		t.Errorf("the session has %d carriers, %v", len(s.carriers), s.Err())
	}
}

func TestJoinersBeyondTheLimit(t *testing.T) {
	id := testIdentity(t)
	s := newJoinee(t, id)
	for n := 2; n <= Carriers; n++ {
		_, stream := rawJoin(t, s.endpoint, id, s.token.append(nil))
		stream.Close()
		awaitCarriers(t, s.Session, n)
	}
	conn, stream := rawJoin(t, s.endpoint, id, s.token.append(nil))
	stream.Close()
	awaitEnd(t, conn)
	s.book.await(t, "refused a carrier", "all carriers are there")
	if s.Err() != nil {
		t.Error(s.Err())
	}
}

func TestJoinerThatGivesUp(t *testing.T) {
	id := testIdentity(t)
	s := newJoinee(t, id)
	conn, _ := rawJoin(t, s.endpoint, id, s.token.append(nil))
	if got, err := awaitGreeting(testContext(t), conn); err != nil || got != s.token {
		t.Fatalf("greeted with %x, %v", got, err)
	}
	conn.CloseWithError(0, "changed its mind")
	s.book.await(t, "handshake ended", "changed its mind")
	if s.Err() != nil || len(s.carriers) != 1 {
		t.Errorf("the session has %d carriers, %v", len(s.carriers), s.Err())
	}
}

func TestJunkOnACarrierEndsTheSession(t *testing.T) {
	junk := map[string][]byte{
		"a channel that only this side opens": laneHeader{channel: 1}.append(nil),
		"a unidirectional stream":             laneHeader{channel: 2}.append(nil),
	}
	for name, b := range junkLaneHeaders {
		junk[name] = b
	}
	for name, b := range junk {
		t.Run(name, func(t *testing.T) {
			id := testIdentity(t)
			s := newJoinee(t, id)
			conn, stream := rawJoin(t, s.endpoint, id, s.token.append(nil))
			stream.Close()
			awaitCarriers(t, s.Session, 2)
			junkStream(t, conn, b)
			<-s.Done()
			if err := s.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "malformed") {
				t.Errorf("the session ends with %v", err)
			}
			awaitEnd(t, conn)
			var closed *quic.ApplicationError
			if err := context.Cause(conn.Context()); !errors.As(err, &closed) || closed.ErrorCode != closeFormat {
				t.Errorf("the peer is told %v", err)
			}
		})
	}
}

func TestStreamThatComesAfterItsChannel(t *testing.T) {
	for _, p := range []Priority{Control, Memory} {
		id := testIdentity(t)
		s := newJoinee(t, id)
		conn, request := rawJoin(t, s.endpoint, id, s.token.append(nil))
		request.Close()
		awaitCarriers(t, s.Session, 2)
		channel := junkStream(t, s.client, channelHeader{"over", p}.append(nil))
		c, err := s.Accept(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		for n := 1; n > 0; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			n = len(s.stripes)
			s.mu.Unlock()
		}
		late := junkStream(t, conn, laneHeader{channel: channel.StreamID()}.append(nil))
		late.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := late.Read(make([]byte, 1)); !tooLate(err) {
			t.Errorf("priority %d: the peer is told %v", p, err)
		}
		if s.Err() != nil {
			t.Errorf("priority %d: the session ends with %v", p, s.Err())
		}
	}
}

func TestSecondStreamOfAChannelOnACarrier(t *testing.T) {
	for _, early := range []bool{false, true} {
		id := testIdentity(t)
		s := newJoinee(t, id)
		conn, stream := rawJoin(t, s.endpoint, id, s.token.append(nil))
		stream.Close()
		awaitCarriers(t, s.Session, 2)
		channel := junkStream(t, s.client, channelHeader{"memory", Memory}.append(nil))
		if !early {
			if _, err := s.Accept(testContext(t)); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			junkStream(t, conn, laneHeader{channel: channel.StreamID()}.append(nil))
		}
		if early {
			for n := 0; n < 2; time.Sleep(time.Millisecond) {
				s.mu.Lock()
				n = len(s.waiting[channel.StreamID()])
				s.mu.Unlock()
			}
			if c, err := s.Accept(testContext(t)); !errors.Is(err, ErrFormat) {
				t.Errorf("accepted %v, %v", c, err)
			}
		}
		<-s.Done()
		if err := s.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "second stream") {
			t.Errorf("the session ends with %v", err)
		}
	}
}
