package memsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"testing/synctest"
)

func markFrame(number uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{frameMark}, number)
}

func passedFrame(number uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{framePassed}, number)
}

// A mark is answered when QEMU has taken all that was sent before it.
func TestMarkWaitsForQEMU(t *testing.T) {
	const frames, size = 64, 64 << 10 // more than a socket takes
	l := land(t, open)
	l.send(t, startFrame)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range frames {
			l.send(t, bytesFrame(make([]byte, size)))
		}
		l.send(t, markFrame(7))
	}()
	go io.Copy(io.Discard, l.qemu)
	got, err := l.returns.Recv(t.Context(), nil)
	if err != nil || !bytes.Equal(got, passedFrame(7)) {
		t.Fatalf("the source is told %x, %v", got, err)
	}
	l.dest.mu.Lock()
	if written := l.dest.written; written != frames*size {
		t.Errorf("QEMU had taken %d bytes of %d when the mark was answered", written, frames*size)
	}
	l.dest.mu.Unlock()
	<-sent
}

// In the tail it is answered all the same, and does not wait for the disks.
func TestMarkInTheTail(t *testing.T) {
	gate := make(chan struct{})
	l := land(t, func(ctx context.Context) error {
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	l.send(t, startFrame, []byte{frameTail}, bytesFrame([]byte("state")), markFrame(1))
	if got, err := l.returns.Recv(t.Context(), nil); err != nil || !bytes.Equal(got, passedFrame(1)) {
		t.Fatalf("the source is told %x, %v", got, err)
	}
	close(gate)
	l.expect(t, "state")
}

func TestBadMarks(t *testing.T) {
	for n := 1; n < numberHeader; n++ {
		l := land(t, open)
		l.send(t, startFrame, markFrame(1)[:n])
		if err := <-l.done; !errors.Is(err, ErrFrame) {
			t.Errorf("a mark of %d bytes: %v", n, err)
		}
	}
	l := land(t, open)
	l.send(t, startFrame, append(markFrame(1), 0))
	if err := <-l.done; !errors.Is(err, ErrFrame) {
		t.Errorf("a mark that is too long: %v", err)
	}
}

func TestMarks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, guest("pages"), 0)
		first, err := b.source.Mark(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second, err := b.source.Mark(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if last := b.frames[len(b.frames)-1]; !bytes.Equal(last, markFrame(2)) {
			t.Errorf("the second mark is %x", last)
		}
		if first() || second() {
			t.Error("a mark has passed that nobody answered")
		}
		b.returns.Send(t.Context(), passedFrame(1))
		b.settle()
		if !first() || second() {
			t.Errorf("after the answer to the first: %v, %v", first(), second())
		}
		b.returns.Send(t.Context(), passedFrame(2))
		b.settle()
		if !first() || !second() {
			t.Errorf("after both: %v, %v", first(), second())
		}
		b.returns.Send(t.Context(), passedFrame(2))
		b.stop(t, ErrFrame)
	})
	for name, answer := range map[string][]byte{"of nothing": passedFrame(0), "not made": passedFrame(2), "short": passedFrame(1)[:4], "long": append(passedFrame(1), 0), "empty": {framePassed}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBubble(t, guest("pages"), 0)
				if _, err := b.source.Mark(t.Context()); err != nil {
					t.Fatal(err)
				}
				b.returns.Send(t.Context(), answer)
				b.stop(t, ErrFrame)
			})
		})
	}
}
