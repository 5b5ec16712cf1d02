package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math"
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
	chunk := func(b []byte) []byte { return append(chunkHead{0, uint16(len(b))}.append(nil), b...) }
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
			junkOnChannel(t, Control, test.junk, test.want)
			junkOnChannel(t, Memory, chunk(test.junk), test.want)
			junkOnChannel(t, Disk, append(chunk(test.junk), chunkHead{uint64(len(test.junk)), 0}.append(nil)...), test.want)
		})
	}
}

func TestJunkChunks(t *testing.T) {
	head := func(offset uint64, length uint16) []byte { return chunkHead{offset, length}.append(nil) }
	whole := append(head(0, 5), 0, 0, 0, 1, 'x')
	for _, test := range []struct {
		name string
		junk []byte
		want error
	}{
		{"too long", head(0, maxChunk+1), ErrFormat},
		{"beyond the last offset", head(math.MaxUint64, 1), ErrFormat},
		{"end in a head", whole[:9], io.ErrUnexpectedEOF},
		{"end in a chunk", whole[:12], io.ErrUnexpectedEOF},
		{"no end", head(0, 0)[:0], io.ErrUnexpectedEOF},
		{"data after the end", append(head(0, 0), 1), ErrFormat},
	} {
		t.Run(test.name, func(t *testing.T) { junkOnChannel(t, Memory, test.junk, test.want) })
	}
}

// junkOnChannel expects want of Recv, and that the peer alone is told.
func junkOnChannel(t *testing.T, p Priority, junk []byte, want error) {
	t.Helper()
	conn, s := junkPeer(t)
	stream := junkStream(t, conn, channelHeader{"bulk", p}.append(nil))
	if _, err := stream.Write(junk); err != nil {
		t.Fatal(err)
	}
	stream.Close()
	c, err := s.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Recv(testContext(t), nil); !errors.Is(err, want) {
		t.Errorf("Recv: %v", err)
	}
	var reset *quic.StreamError
	if _, err := io.Copy(io.Discard, stream); !errors.As(err, &reset) || reset.ErrorCode != resetFormat {
		t.Errorf("the peer is told %v", err)
	}
	if s.Err() != nil {
		t.Errorf("the session ended: %v", s.Err())
	}
}
