package tunnel

import (
	"crypto/tls"
	"errors"
	"strings"
	"testing"

	"github.com/quic-go/quic-go"
)

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

// greetRaw takes a connection through the greetings for a new session.
func greetRaw(t *testing.T, c conn) token {
	t.Helper()
	told, err := ask(testContext(t), c, hello{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{confirmation}); err != nil {
		t.Fatal(err)
	}
	return told
}

// junkPeer is a trusted agent's key in the hands of a program that does not
// speak this protocol behind the greetings.
func junkPeer(t *testing.T, transport Transport) (conn, *Session) {
	t.Helper()
	id := testIdentity(t)
	e, _ := listen(t, "127.0.0.1:0", testIdentity(t), only(id.ID()))
	config := &tls.Config{NextProtos: []string{sessionProtocol}, Certificates: []tls.Certificate{id.certificate}, InsecureSkipVerify: true}
	var c conn
	if transport == QUIC {
		raw, err := rawDial(t, e.Addr(), config)
		if err != nil {
			t.Fatal(err)
		}
		c = &quicConn{raw, junkStream(t, raw, nil)}
	} else {
		raw, err := tls.Dial("tcp", e.Addr().String(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		c = pipeConn{raw}
	}
	greetRaw(t, c)
	s, err := e.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

func TestJunkEndsTheSession(t *testing.T) {
	for name, junk := range map[string][]byte{
		"no frame":         {0xff, 0, 0},
		"HTTP":             []byte("GET / HTTP/1.1\r\n\r\n"),
		"a channel header": frame{kind: kindData, data: []byte{0, 0, 0, 0}}.append(nil),
	} {
		for _, transport := range bothTransports {
			t.Run(name+" over "+transport.String(), func(t *testing.T) {
				c, s := junkPeer(t, transport)
				if _, err := c.Write(junk); err != nil {
					t.Fatal(err)
				}
				<-s.Done()
				if err := s.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "malformed") {
					t.Errorf("the session ends with %v", err)
				}
				var err error
				for err == nil {
					_, err = c.Read(make([]byte, 1024))
				}
				var closed *quic.ApplicationError
				if transport == QUIC && (!errors.As(err, &closed) || closed.ErrorCode != closeFormat) {
					t.Errorf("the peer is told %v", err)
				}
			})
		}
	}
}

// A carrier that ends costs the session nothing, and it can be joined again by
// the peer that has its token, and by nobody else.
func TestSessionIsResumedByItsToken(t *testing.T) {
	for _, transport := range bothTransports {
		t.Run(transport.String(), func(t *testing.T) {
			idA, idB := testIdentity(t), testIdentity(t)
			a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
			b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
			from, to := connectOver(t, a, b, transport)
			for _, s := range []*Session{from, to} {
				s.mu.Lock()
				for _, c := range s.carriers {
					c.conn.close(closeLost, "cut by the test")
				}
				s.mu.Unlock()
				exchange(t, from, to)
			}
			if from.Err() != nil || to.Err() != nil {
				t.Errorf("the session ended: %v, %v", from.Err(), to.Err())
			}
			if a.session(from.token) != from || b.session(from.token) != to {
				t.Error("an endpoint has lost the session")
			}
		})
	}
}
