package tunnel

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// logBook collects a logger's lines.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *logBook) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// await waits for a line that contains all the words.
func (b *logBook) await(t *testing.T, words ...string) {
	t.Helper()
	for range 1000 {
	lines:
		for line := range strings.Lines(b.String()) {
			for _, word := range words {
				if !strings.Contains(line, word) {
					continue lines
				}
			}
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no log line with %q in:\n%s", words, b)
}

// awaitCount waits for n times the word.
func (b *logBook) awaitCount(t testing.TB, word string, n int) {
	t.Helper()
	for range 1000 {
		if strings.Count(b.String(), word) >= n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not %d times %q in:\n%s", n, word, b)
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func only(ids ...ID) func(ID) bool {
	return func(id ID) bool {
		for _, known := range ids {
			if id == known {
				return true
			}
		}
		return false
	}
}

func listen(t testing.TB, addr string, id *Identity, trusted func(ID) bool) (*Endpoint, *logBook) {
	t.Helper()
	book := &logBook{}
	e, err := Listen(addr, id, trusted, book.logger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e, book
}

// connect opens a session from a to b.
func connect(t testing.TB, a, b *Endpoint) (from, to *Session) {
	t.Helper()
	return connectOver(t, a, b, Auto)
}

func connectOver(t testing.TB, a, b *Endpoint, transport Transport) (from, to *Session) {
	t.Helper()
	ctx := testContext(t)
	accepted := make(chan *Session, 1)
	go func() {
		defer close(accepted)
		s, err := b.Accept(ctx)
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- s
	}()
	from, err := a.Dial(ctx, b.Addr().String(), b.id.ID(), DialOptions{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	to = <-accepted
	if to == nil {
		t.FailNow()
	}
	return from, to
}

// pair returns the two ends of a session between two agents on loopback.
func pair(t testing.TB) (from, to *Session) {
	t.Helper()
	idA, idB := testIdentity(t), testIdentity(t)
	a, _ := listen(t, "127.0.0.1:0", idA, only(idB.ID()))
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	return connect(t, a, b)
}

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
