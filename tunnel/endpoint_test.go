package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

func TestSessionsOverBothFamilies(t *testing.T) {
	for _, test := range []struct{ dialer, listener, host string }{
		{"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"},
		{"[::1]:0", "[::1]:0", "::1"},
		{":0", ":0", "127.0.0.1"},
		{":0", ":0", "::1"},
		{":0", "127.0.0.1:0", "localhost"},
		{":0", "[::1]:0", "::1"},
		{"0.0.0.0:0", ":0", "127.0.0.1"},
	} {
		t.Run(test.dialer+" to "+test.listener+" as "+test.host, func(t *testing.T) {
			idA, idB := testIdentity(t), testIdentity(t)
			a, _ := listen(t, test.dialer, idA, only(idB.ID()))
			b, _ := listen(t, test.listener, idB, only(idA.ID()))
			ctx := testContext(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				s, err := b.Accept(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				if s.Peer() != idA.ID() {
					t.Errorf("accepted %s, want %s", s.Peer(), idA.ID())
				}
			}()
			addr := net.JoinHostPort(test.host, fmt.Sprint(b.Addr().(*net.UDPAddr).Port))
			s, err := a.Dial(ctx, addr, idB.ID(), DialOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if s.Peer() != idB.ID() {
				t.Errorf("dialled %s, want %s", s.Peer(), idB.ID())
			}
			<-done
		})
	}
}

func TestOneEndpointDialsAndAccepts(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	connect(t, a, b)
	connect(t, b, a)
}

func TestListenErrors(t *testing.T) {
	id := testIdentity(t)
	a, book := listen(t, "127.0.0.1:0", id, only())
	for _, addr := range []string{a.Addr().String(), "127.0.0.1", "127.0.0.1:99999", "192.0.2.1:4000"} {
		if e, err := Listen(addr, id, only(), book.logger()); err == nil || !strings.HasPrefix(err.Error(), "listen on "+addr) {
			t.Errorf("Listen(%q): %v, %v", addr, e, err)
		}
	}
}

func TestSmallBuffersAreReported(t *testing.T) {
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	book := &logBook{}
	reportBuffers(socket, 1<<30, book.logger())
	book.await(t, "level=WARN", "sysctl -w net.core.rmem_max=", "wanted=1073741824")
	before := book.String()
	reportBuffers(socket, 1024, book.logger())
	if book.String() != before {
		t.Errorf("large buffers are reported: %s", book)
	}
}

func TestEndpointClose(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, to := connect(t, a, b)

	accepted := make(chan error, 1)
	go func() {
		_, err := b.Accept(context.Background())
		accepted <- err
	}()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := <-accepted; !errors.Is(err, ErrClosed) {
		t.Errorf("Accept returns %v", err)
	}
	<-from.Done()
	if err := from.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "the agent is stopping") {
		t.Errorf("the peer's session ends with %v", err)
	}
	if err := to.Err(); !errors.Is(err, ErrClosed) {
		t.Errorf("our session ends with %v", err)
	}
	if _, err := b.Dial(testContext(t), a.Addr().String(), idA.ID(), DialOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Dial returns %v", err)
	}
}

func TestEndpointCloseTurnsAwayWhoWaits(t *testing.T) {
	for _, transport := range bothTransports {
		idA, idB := testIdentity(t), testIdentity(t)
		a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
		b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
		s, err := a.Dial(testContext(t), b.Addr().String(), idB.ID(), DialOptions{Transport: transport}) // nobody accepts it
		if err != nil {
			t.Fatal(err)
		}
		for b.session(s.token) == nil {
			time.Sleep(time.Millisecond)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		<-s.Done()
		if err := s.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "the agent is stopping") {
			t.Errorf("over %v the session ends with %v", transport, err)
		}
		if n := b.handshakes.Load(); n != 0 {
			t.Errorf("%d handshakes are still counted", n)
		}
	}
}

func TestRestartedAgentEndsOldSessionsAtOnce(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, _ := connect(t, a, b)
	addr := b.Addr().String()
	b.socket.Close() // the agent is gone without a word
	b.Close()

	listen(t, addr, idB, only(idA.ID()))
	c, err := from.Open(testContext(t), "control", Control)
	if err != nil {
		t.Fatal(err)
	}
	for from.Err() == nil {
		c.Send(testContext(t), []byte("still there?"))
	}
	if err := from.Err(); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "was restarted") {
		t.Errorf("the session ends with %v", err)
	}
}
