package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
)

// packetsPair returns the two ends of a connection for packets from a to b.
func packetsPair(t testing.TB, a, b *Endpoint, tag []byte) (from, to *Packets) {
	t.Helper()
	var accepted sync.WaitGroup
	accepted.Go(func() {
		var err error
		if to, err = b.AcceptPackets(testContext(t)); err != nil {
			t.Error(err)
		}
	})
	from, err := a.DialPackets(testContext(t), b.Addr().String(), b.id.ID(), tag)
	if err != nil {
		t.Fatal(err)
	}
	accepted.Wait()
	if to == nil {
		t.FailNow()
	}
	return from, to
}

func twoEndpoints(t testing.TB) (a, b *Endpoint) {
	t.Helper()
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ = listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ = listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	return a, b
}

// carry sends one packet, again if it was lost, and expects it at the other end.
func carry(t *testing.T, from, to *Packets, b []byte) {
	t.Helper()
	ctx, stop := context.WithCancel(testContext(t))
	var sending sync.WaitGroup
	sending.Go(func() {
		for ctx.Err() == nil {
			if err := from.Send(b); err != nil {
				t.Error(err)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
	got, err := to.Receive(ctx)
	stop()
	sending.Wait()
	if err != nil || !bytes.Equal(got, b) {
		t.Fatalf("received %d bytes, %v; sent %d", len(got), err, len(b))
	}
}

func TestPackets(t *testing.T) {
	a, b := twoEndpoints(t)
	tag := bytes.Repeat([]byte{0, 0xff}, MaxTag/2)
	from, to := packetsPair(t, a, b, tag)
	for _, p := range []*Packets{from, to} {
		if !bytes.Equal(p.Tag(), tag) {
			t.Errorf("tag %x", p.Tag())
		}
		if p.Err() != nil {
			t.Errorf("a live connection has the error %v", p.Err())
		}
	}
	if from.Peer() != b.id.ID() || to.Peer() != a.id.ID() {
		t.Errorf("peers %s and %s", from.Peer(), to.Peer())
	}
	if from.LocalAddr().String() != to.RemoteAddr().String() || to.LocalAddr().String() != from.RemoteAddr().String() {
		t.Errorf("addresses %s to %s, and %s to %s", from.LocalAddr(), from.RemoteAddr(), to.LocalAddr(), to.RemoteAddr())
	}
	if err := from.Send(nil); err != nil { // not a packet
		t.Error(err)
	}
	for _, size := range []int{1, 28, 576, 1159} {
		carry(t, from, to, bytes.Repeat([]byte{byte(size)}, size))
		carry(t, to, from, bytes.Repeat([]byte{byte(size)}, size))
	}
}

func TestPacketsOfTwoConnectionsAndASessionStayApart(t *testing.T) {
	a, b := twoEndpoints(t)
	from1, to1 := packetsPair(t, a, b, []byte("one"))
	from2, to2 := packetsPair(t, b, a, nil)
	session, peer := connect(t, a, b)
	if string(to1.Tag()) != "one" || len(to2.Tag()) != 0 {
		t.Errorf("tags %q and %q", to1.Tag(), to2.Tag())
	}
	carry(t, from1, to1, []byte("first"))
	carry(t, from2, to2, []byte("second"))
	exchange(t, session, peer)
	from1.Close("one is enough")
	<-to1.Done()
	carry(t, from2, to2, []byte("second still"))
	exchange(t, session, peer)
}

func TestPacketsGrowWithThePath(t *testing.T) {
	a, b := twoEndpoints(t)
	from, to := packetsPair(t, a, b, nil)
	// Keep-alives alone would make it grow as well, but in five steps or more.
	late := time.After(2 * KeepAlive)
	for _, p := range []*Packets{from, to} {
		for p.MaxSize() < 1380 {
			select {
			case <-late:
				t.Fatalf("packets have %d bytes after %v: %v", p.MaxSize(), 2*KeepAlive, p.Err())
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	size := from.MaxSize()
	carry(t, from, to, make([]byte, size))
	for _, n := range []int{size + 1, 1 << 14, 1 << 20} {
		err := from.Send(make([]byte, n))
		if !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), fmt.Sprint("at most ", size)) {
			t.Errorf("packet of %d bytes: %v", n, err)
		}
	}
}

func TestPacketsClose(t *testing.T) {
	a, b := twoEndpoints(t)
	from, to := packetsPair(t, a, b, nil)
	received := make(chan error, 1)
	go func() {
		_, err := to.Receive(context.Background())
		received <- err
	}()
	from.Close("the guest\nhas moved on")
	from.Close("again")
	<-from.Done()
	<-to.Done()
	if err := from.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "has moved on") {
		t.Errorf("our side ends with %v", err)
	}
	if err := to.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "the guest?has moved on") {
		t.Errorf("the peer's side ends with %v", err)
	}
	if err := <-received; !errors.Is(err, ErrClosedByPeer) {
		t.Errorf("Receive: %v", err)
	}
	if err := to.Send([]byte("late")); !errors.Is(err, ErrClosedByPeer) {
		t.Errorf("Send: %v", err)
	}
	if err := from.Send([]byte("late")); !errors.Is(err, ErrClosed) {
		t.Errorf("Send here: %v", err)
	}
}

func TestPacketsUseAllCarriers(t *testing.T) {
	a, b := twoEndpoints(t)
	from, to := packetsPair(t, a, b, nil)
	for _, p := range []*Packets{from, to} {
		carriers := awaitCarriers(t, p, packetCarriers)
		before := make([]uint64, len(carriers))
		for i, c := range carriers {
			before[i] = c.ConnectionStats().BytesSent
		}
		for _, c := range carriers {
			for sent := c.ConnectionStats().BytesSent; c.ConnectionStats().BytesSent < sent+100_000; {
				if err := p.Send(make([]byte, 1000)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if st := to.Stats(); st.BytesSent < packetCarriers*100_000 || st.BytesReceived < 100_000 || st.MinRTT == 0 {
		t.Errorf("counted %+v", st)
	}
}

func TestPacketsEndWithAnyCarrier(t *testing.T) {
	a, b := twoEndpoints(t)
	from, to := packetsPair(t, a, b, nil)
	carriers := awaitCarriers(t, to, packetCarriers)
	carriers[3].CloseWithError(closeLost, "gone")
	<-to.Done()
	<-from.Done()
	if err := from.Err(); !errors.Is(err, ErrLost) {
		t.Errorf("the peer's side ends with %v", err)
	}
}

func TestReceiveEndsWithItsContext(t *testing.T) {
	a, b := twoEndpoints(t)
	from, to := packetsPair(t, a, b, nil)
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("no more")
	cancel(why)
	if _, err := to.Receive(ctx); !errors.Is(err, why) {
		t.Errorf("Receive: %v", err)
	}
	carry(t, from, to, []byte("still there"))
}

func TestEndpointCloseEndsPackets(t *testing.T) {
	a, b := twoEndpoints(t)
	from, to := packetsPair(t, a, b, nil)
	accepted := make(chan error, 1)
	go func() {
		_, err := b.AcceptPackets(context.Background())
		accepted <- err
	}()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	<-from.Done()
	if err := from.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "the agent is stopping") {
		t.Errorf("the peer's side ends with %v", err)
	}
	<-to.Done()
	if err := to.Err(); !errors.Is(err, ErrClosed) {
		t.Errorf("our side ends with %v", err)
	}
	if err := <-accepted; !errors.Is(err, ErrClosed) {
		t.Errorf("AcceptPackets: %v", err)
	}
	if _, err := b.DialPackets(testContext(t), a.Addr().String(), a.id.ID(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("DialPackets: %v", err)
	}
}

func TestDialPacketsErrors(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, book := listen(t, "127.0.0.1:0", idB, only())
	addr := b.Addr().String()
	if _, err := a.DialPackets(testContext(t), addr, idB.ID(), make([]byte, MaxTag+1)); err == nil || !strings.Contains(err.Error(), "tag of 65 bytes") {
		t.Errorf("large tag: %v", err)
	}
	if _, err := a.DialPackets(testContext(t), addr, idB.ID(), nil); !errors.Is(err, ErrRefused) {
		t.Errorf("a listener that does not trust us: %v", err)
	}
	book.await(t, "level=WARN", "not trusted", "peer="+string(idA.ID()))
	if _, err := a.DialPackets(testContext(t), addr, testID(t), nil); !errors.Is(err, ErrUntrusted) {
		t.Errorf("another agent than expected: %v", err)
	}
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := b.AcceptPackets(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("AcceptPackets: %v", err)
	}
}

// A dialer that nobody accepts has nothing, whatever its TLS handshake said.
func TestDialPacketsWaitsForAccept(t *testing.T) {
	a, b := twoEndpoints(t)
	ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
	defer cancel()
	if p, err := a.DialPackets(ctx, b.Addr().String(), b.id.ID(), nil); err == nil {
		t.Fatalf("dialled %v without AcceptPackets", p)
	}
	for b.handshakes.Load() > 0 { // until the listener has heard of it
		time.Sleep(time.Millisecond)
	}
	ctx, cancel = context.WithTimeout(testContext(t), 100*time.Millisecond)
	defer cancel()
	if p, err := b.AcceptPackets(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("accepted %v, %v of a dialer that has given up", p, err)
	}
	packetsPair(t, a, b, nil)
}

// packetsJunkPeer is a trusted agent's key in the hands of a program that speaks
// QUIC but not this protocol.
func packetsJunkPeer(t *testing.T) (*quic.Conn, *Endpoint, *logBook) {
	t.Helper()
	id := testIdentity(t)
	e, book := listen(t, "127.0.0.1:0", testIdentity(t), only(id.ID()))
	conn, err := rawDial(t, e.Addr(), &tls.Config{NextProtos: []string{packetsProtocol}, Certificates: []tls.Certificate{id.certificate}})
	if err != nil {
		t.Fatal(err)
	}
	return conn, e, book
}

func TestJunkRequestsForPackets(t *testing.T) {
	for name, b := range junkTags {
		t.Run(name, func(t *testing.T) {
			conn, e, book := packetsJunkPeer(t)
			junkStream(t, conn, b).Close()
			<-conn.Context().Done()
			var closed *quic.ApplicationError
			if err := context.Cause(conn.Context()); !errors.As(err, &closed) || !strings.Contains(closed.ErrorMessage, "not taken up") {
				t.Errorf("the peer is told %v", err)
			}
			book.await(t, "level=WARN", "refused a connection for packets", "peer=")
			if n := e.handshakes.Load(); n != 0 {
				t.Errorf("%d handshakes are still counted", n)
			}
		})
	}
}

func TestPeerWithoutDatagramsIsRefused(t *testing.T) {
	id := testIdentity(t)
	e, book := listen(t, "127.0.0.1:0", testIdentity(t), only(id.ID()))
	conn, err := rawDialAs(t, e.Addr(), &tls.Config{NextProtos: []string{packetsProtocol}, Certificates: []tls.Certificate{id.certificate}}, &quic.Config{})
	if err != nil {
		t.Fatal(err)
	}
	junkStream(t, conn, appendTag(nil, nil)).Close()
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	go func() {
		<-conn.Context().Done()
		cancel()
	}()
	if p, err := e.AcceptPackets(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("accepted %v, %v", p, err)
	}
	book.await(t, "before it was accepted", "takes no QUIC datagrams")
}

func TestPacketsOfLaterVersion(t *testing.T) {
	conn, e, _ := packetsJunkPeer(t)
	b := appendTag(nil, []byte("later"))
	b[0] = 9
	stream := junkStream(t, conn, append(b, make([]byte, maxGreeting-1)...))
	stream.Close()
	p, err := e.AcceptPackets(testContext(t))
	if err != nil || string(p.Tag()) != "later" {
		t.Fatalf("accepted %v, %v", p, err)
	}
	if _, err := readGreeting(testContext(t), stream); err != nil {
		t.Errorf("the answer: %v", err)
	}
	if err := conn.SendDatagram(nil); err != nil { // not delivered
		t.Fatal(err)
	}
	if err := conn.SendDatagram([]byte("\x00\x00\x00\x00packet")); err != nil {
		t.Fatal(err)
	}
	if got, err := p.Receive(testContext(t)); err != nil || string(got) != "packet" {
		t.Errorf("received %q, %v", got, err)
	}
}

// overWANPackets runs test in virtual time with the two ends of a connection for
// packets over w.
func overWANPackets(t *testing.T, w *wan, test func(t *testing.T, from, to *Packets)) {
	idA, idB := testIdentity(t), testIdentity(t)
	synctest.Test(t, func(t *testing.T) {
		a, b := wanEndpoints(t, w, idA, idB)
		from, to := packetsPair(t, a, b, nil)
		test(t, from, to)
		from.Close("test done")
		<-to.Done()
	})
}

func TestPacketsOutliveSilenceAndNotTheLink(t *testing.T) {
	w := slowWAN()
	overWANPackets(t, w, func(t *testing.T, from, to *Packets) {
		time.Sleep(10 * IdleTimeout) // keep-alives hold it, also through NAT
		if from.Err() != nil || to.Err() != nil {
			t.Fatalf("an idle connection ended: %v, %v", from.Err(), to.Err())
		}
		w.mu.Lock()
		w.cut = true
		w.mu.Unlock()
		cut := time.Now()
		<-from.Done()
		if took := time.Since(cut); took < IdleTimeout-KeepAlive || took > IdleTimeout+KeepAlive {
			t.Errorf("noticed after %v", took)
		}
		for _, p := range []*Packets{from, to} {
			<-p.Done()
			if err := p.Err(); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "no answer from 192.0.2.") {
				t.Errorf("the connection ends with %v", err)
			}
		}
	})
}

// One connection would get a tenth of this link.
func TestPacketsFillALinkThatLosesPackets(t *testing.T) {
	w := slowWAN()
	w.queue, w.loss = 250_000, 0.003
	overWANPackets(t, w, func(t *testing.T, from, to *Packets) {
		ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
		defer stop()
		var sending sync.WaitGroup
		sending.Go(func() {
			packet := make([]byte, 1100)
			for ctx.Err() == nil && from.Send(packet) == nil {
			}
		})
		got := 0
		for {
			b, err := to.Receive(ctx)
			if err != nil {
				break
			}
			got += len(b)
		}
		sending.Wait()
		if got < 20*w.rate*6/10 {
			t.Errorf("%d bytes in 20 s are below 60 %% of the link", got)
		}
		t.Logf("%d bytes, %d %% of the link", got, got*100/(20*w.rate))
	})
}

// A dialer that says nothing, and one that nobody accepts, keep their place for
// headerTimeout.
func TestPacketsRequestsThatWait(t *testing.T) {
	for _, test := range []struct{ name, request string }{
		{"silent", ""},
		{"half said", "\x01"},
		{"not accepted", "\x01\x00"},
	} {
		t.Run(test.name, func(t *testing.T) {
			idA, idB := testIdentity(t), testIdentity(t)
			synctest.Test(t, func(t *testing.T) {
				a, b := wanEndpoints(t, slowWAN(), idA, idB)
				conn, err := a.dialConn(context.Background(), addrPort(b.Addr()), idB.ID(), packetsProtocol)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				stream := junkStream(t, conn, []byte(test.request))
				if test.name == "not accepted" {
					stream.Close()
				}
				<-conn.Context().Done()
				if took := time.Since(began); took > headerTimeout+time.Second {
					t.Errorf("the dialer is sent away after %v", took)
				}
				if n := b.handshakes.Load(); n != 0 {
					t.Errorf("%d handshakes are still counted", n)
				}
			})
		})
	}
}

func TestLocalAddrIsWhatThePeerSees(t *testing.T) {
	for _, test := range []struct{ dialer, listener, host string }{
		{":0", ":0", "127.0.0.1"},
		{":0", ":0", "::1"},
		{"0.0.0.0:0", ":0", "127.0.0.1"},
		{"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"},
	} {
		idA, idB := testIdentity(t), testIdentity(t)
		a, _ := listen(t, test.dialer, idA, only(idB.ID()))
		b, _ := listen(t, test.listener, idB, only(idA.ID()))
		accepted := make(chan *Session, 1)
		go func() {
			s, err := b.Accept(testContext(t))
			if err != nil {
				t.Error(err)
			}
			accepted <- s
		}()
		addr := net.JoinHostPort(test.host, fmt.Sprint(addrPort(b.Addr()).Port()))
		from, err := a.Dial(testContext(t), addr, idB.ID(), DialOptions{})
		to := <-accepted
		if err != nil || to == nil {
			t.Fatal(err)
		}
		for _, end := range [][2]*Session{{from, to}, {to, from}} {
			local, seen := addrPort(end[0].LocalAddr()), addrPort(end[1].RemoteAddr())
			if local.Addr().Unmap() != seen.Addr().Unmap() || local.Port() != seen.Port() {
				t.Errorf("%s to %s: local address %s, the peer sees %s", test.dialer, addr, local, seen)
			}
		}
	}
}

// awaitCarriers waits until packets have n connections.
func awaitCarriers(t testing.TB, p *Packets, n int) []*quic.Conn {
	t.Helper()
	for range 1000 {
		if carriers := p.all(); len(carriers) == n {
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
