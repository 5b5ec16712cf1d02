package migrate

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/netredirect"
)

// live counts what a move does to its redirect.
type live struct{ switched, undone int }

func (l *live) Switch()     { l.switched++ }
func (l *live) Undo(string) { l.undone++ }

// redirected is a source whose redirect becomes ready when the test says so.
func redirected() (*source, *live) {
	l := &live{}
	s := &source{Engine: &Engine{}, move: newMove(Status{}, func(error) {}), log: slog.New(slog.DiscardHandler)}
	s.redirect = redirecting{ready: make(chan struct{}), end: func() {}, live: l}
	return s, l
}

func TestSwitchOfAReadyRedirectOnly(t *testing.T) {
	s, l := redirected()
	s.switchRedirect()
	if l.switched != 0 {
		t.Error("switched before it was ready")
	}
	close(s.redirect.ready)
	s.switchRedirect()
	if l.switched != 1 {
		t.Error("not switched")
	}
}

func TestUndoGivesUpWhatIsNotReady(t *testing.T) {
	s, l := redirected()
	s.redirect.end = func() { close(s.redirect.ready) }
	s.undoRedirect("test")
	if l.undone != 1 {
		t.Error("not undone")
	}
	new(source).undoRedirect("there is none")
}

// TestUndoOfWhatDoesNotEnd goes on with the rollback, and undoes later.
func TestUndoOfWhatDoesNotEnd(t *testing.T) {
	s, l := redirected()
	s.standRedirect()
	if l.undone != 0 {
		t.Error("undone while it was being made")
	}
	if found := s.move.Status().Findings; len(found) != 1 || !strings.Contains(found[0].Problem, "not ready") {
		t.Errorf("the operator is told %+v", found)
	}
	close(s.redirect.ready)
	s.work.Wait()
	if l.undone != 1 {
		t.Error("left when it was ready")
	}
}

// TestRedirectByNameFails ends the sync at once, and only where it was asked for
// by name.
func TestRedirectByNameFails(t *testing.T) {
	f := newFar(t)
	e := caller(t, func() *far { return f })
	session, err := e.Dial(t.Context(), "there", asks)
	if err != nil {
		t.Fatal(err)
	}
	ctl, _, err := e.greet(t.Context(), session)
	if err != nil {
		t.Fatal(err)
	}
	for kind, fails := range map[netredirect.Kind]bool{netredirect.QUIC: true, netredirect.Auto: false} {
		s, _ := redirected()
		s.session, s.ctl, s.redirect.err, s.redirect.ask.Options.Kind = session, ctl, errors.New("no packet comes back"), kind
		ctx, end := context.WithCancelCause(t.Context())
		sy := &syncer{s: s, ctx: ctx, end: end}
		if !sy.mayRead() {
			t.Errorf("%s: the stream's header is not read", kind)
		}
		close(s.redirect.ready)
		sy.watchRedirect()
		if cause := context.Cause(ctx); (cause != nil) != fails || fails && !strings.Contains(cause.Error(), "--redirect quic: no packet comes back") {
			t.Errorf("%s: %v", kind, cause)
		}
		end(nil)
	}
}

func TestFarFromStop(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		load
		far bool
	}{
		{load{}, true}, // the header
		{load{RAM: gib, FirstPassLeft: gib}, true},
		{load{RAM: gib, FirstPassLeft: tailBytes}, false},
		{load{RAM: gib}, false},
		{load{RAM: tailBytes / 2, FirstPassLeft: tailBytes / 2}, false}, // all of it fits where we don't see it
	} {
		if farFromStop(c.load) != c.far {
			t.Errorf("%+v: far from the stop: %v", c.load, !c.far)
		}
	}
}
