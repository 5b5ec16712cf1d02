package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

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
