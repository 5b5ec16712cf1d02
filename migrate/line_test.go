package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// far is an agent of another site that a test answers for.
type far struct {
	endpoint *tunnel.Endpoint
	id       tunnel.ID
	sessions chan *control // greeted
	ended    chan struct{} // one for each session that the caller ended
}

func newEndpoint(t *testing.T) (*tunnel.Endpoint, tunnel.ID) {
	t.Helper()
	identity, err := tunnel.LoadOrCreateIdentity(filepath.Join(t.TempDir(), "identity.pem"))
	if err != nil {
		t.Fatal(err)
	}
	e, err := tunnel.Listen("127.0.0.1:0", identity, func(tunnel.ID) bool { return true }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e, identity.ID()
}

func newFar(t *testing.T) *far {
	f := &far{sessions: make(chan *control, 4), ended: make(chan struct{}, 4)}
	f.endpoint, f.id = newEndpoint(t)
	go func() {
		for {
			session, err := f.endpoint.Accept(t.Context())
			if err != nil {
				return
			}
			go func() { <-session.Done(); f.ended <- struct{}{} }()
			ch, err := session.Accept(t.Context())
			if err != nil {
				continue
			}
			c := &control{ch: ch}
			var theirs hello
			if c.expect(t.Context(), kindHello, &theirs) == nil && c.send(t.Context(), kindHello, hello{Protocol: Protocol}) == nil {
				f.sessions <- c
			}
		}
	}()
	return f
}

// question takes the next one.
func question(t *testing.T, c *control) redirectRequest {
	t.Helper()
	var ask redirectRequest
	if err := c.expect(t.Context(), kindRedirect, &ask); err != nil {
		t.Fatal(err)
	}
	return ask
}

func tell(t *testing.T, c *control, a redirectAnswer) {
	t.Helper()
	if err := c.send(t.Context(), kindRedirected, a); err != nil {
		t.Fatal(err)
	}
}

// caller is an engine that finds the agents of other sites.
func caller(t *testing.T, at func() *far) *Engine {
	own, _ := newEndpoint(t)
	dial := func(ctx context.Context, _ string, o tunnel.DialOptions) (*tunnel.Session, error) {
		f := at()
		return own.Dial(ctx, f.endpoint.Addr().String(), f.id, o)
	}
	log := slog.New(slog.DiscardHandler)
	return &Engine{Config: Config{Host: hypervisor.New(filepath.Join(t.TempDir(), "no-libvirtd"), log), Dial: dial, Log: log}, lines: map[string]*line{}}
}

// asking asks and passes on what came of it.
func asking(ctx context.Context, e *Engine, peer tunnel.ID, op string) chan error {
	done := make(chan error, 1)
	go func() {
		var reply string
		err := e.CallRedirect(ctx, "there", string(peer), "mv-1", op, op, &reply)
		if err == nil && reply != op {
			err = errors.New("the reply is " + reply)
		}
		done <- err
	}()
	return done
}

func wait(t *testing.T, done chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(30 * time.Second):
		t.Fatal("no end")
		return nil
	}
}

func quoted(s string) json.RawMessage { return json.RawMessage(`"` + s + `"`) }

// TestLineIsKept asks twice in one session, the second time after an error that
// the other side tells, and once more where an answer comes late.
func TestLineIsKept(t *testing.T) {
	f := newFar(t)
	e := caller(t, func() *far { return f })
	done := asking(t.Context(), e, f.id, "one")
	c := <-f.sessions
	ask := question(t, c)
	if ask.Seq != 1 || ask.Move != "mv-1" || ask.Op != "one" || string(ask.Body) != `"one"` {
		t.Errorf("asked %+v", ask)
	}
	tell(t, c, redirectAnswer{Seq: ask.Seq, Error: "not now"})
	if err := wait(t, done); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("told an error: %v", err)
	}
	done = asking(t.Context(), e, f.id, "two")
	tell(t, c, redirectAnswer{Seq: question(t, c).Seq, Unknown: true})
	if err := wait(t, done); !errors.Is(err, netredirect.ErrUnknown) {
		t.Errorf("told of no redirect: %v", err)
	}
	done = asking(t.Context(), e, f.id, "three")
	ask = question(t, c)
	tell(t, c, redirectAnswer{Seq: ask.Seq - 1, Body: quoted("late")})
	tell(t, c, redirectAnswer{Seq: ask.Seq, Body: quoted("three")})
	if err := wait(t, done); err != nil {
		t.Error(err)
	}
	if len(f.ended) != 0 || len(f.sessions) != 0 {
		t.Error("the session was not kept")
	}
	e.hangUp()
	<-f.ended
}

// TestLineIsDialledAnew after anything that is no answer.
func TestLineIsDialledAnew(t *testing.T) {
	f := newFar(t)
	e := caller(t, func() *far { return f })
	spoil := map[string]func(*control, redirectRequest, context.CancelFunc){
		"an answer to a later question": func(c *control, ask redirectRequest, _ context.CancelFunc) {
			tell(t, c, redirectAnswer{Seq: ask.Seq + 1, Body: quoted("x")})
		},
		"another message": func(c *control, _ redirectRequest, _ context.CancelFunc) {
			_ = c.send(t.Context(), kindPong, ping{})
		},
		"a refusal": func(c *control, _ redirectRequest, _ context.CancelFunc) {
			_ = c.send(t.Context(), kindRefused, reason{"no"})
		},
		"no JSON": func(c *control, _ redirectRequest, _ context.CancelFunc) {
			_ = c.ch.Send(t.Context(), []byte{kindRedirected, '{'})
		},
		"no answer":  func(_ *control, _ redirectRequest, giveUp context.CancelFunc) { giveUp() },
		"no channel": func(c *control, _ redirectRequest, _ context.CancelFunc) { c.ch.Close() },
	}
	for name, spoil := range spoil {
		ctx, cancel := context.WithCancel(t.Context())
		done := asking(ctx, e, f.id, "a")
		c := <-f.sessions
		spoil(c, question(t, c), cancel)
		if err := wait(t, done); err == nil {
			t.Errorf("%s: no error", name)
		}
		cancel()
		<-f.ended
	}
}

// TestLineToAnotherAgent asks the agent that has taken a site's name.
func TestLineToAnotherAgent(t *testing.T) {
	old, young := newFar(t), newFar(t)
	at := old
	e := caller(t, func() *far { return at })
	done := asking(t.Context(), e, old.id, "a")
	c := <-old.sessions
	tell(t, c, redirectAnswer{Seq: question(t, c).Seq, Body: quoted("a")})
	if err := wait(t, done); err != nil {
		t.Fatal(err)
	}
	at = young
	done = asking(t.Context(), e, young.id, "b")
	<-old.ended
	c = <-young.sessions
	tell(t, c, redirectAnswer{Seq: question(t, c).Seq, Body: quoted("b")})
	if err := wait(t, done); err != nil {
		t.Error(err)
	}
	done = asking(t.Context(), e, old.id, "c")
	if err := wait(t, done); err == nil || !strings.Contains(err.Error(), "another agent now") {
		t.Errorf("the agent that is gone: %v", err)
	}
}

// TestLineQueue gives up in the queue, which is no fault of the session's.
func TestLineQueue(t *testing.T) {
	f := newFar(t)
	e := caller(t, func() *far { return f })
	first := asking(t.Context(), e, f.id, "first")
	c := <-f.sessions
	ask := question(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	second := asking(ctx, e, f.id, "second")
	cancel()
	if err := wait(t, second); !errors.Is(err, context.Canceled) {
		t.Errorf("in the queue: %v", err)
	}
	tell(t, c, redirectAnswer{Seq: ask.Seq, Body: quoted("first")})
	if err := wait(t, first); err != nil {
		t.Error(err)
	}
	third := asking(ctx, e, f.id, "third")
	if err := wait(t, third); !errors.Is(err, context.Canceled) {
		t.Errorf("asked when it was too late already: %v", err)
	}
	if len(f.ended) != 0 {
		t.Error("the session was closed")
	}
}
