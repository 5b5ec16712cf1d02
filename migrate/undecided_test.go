package migrate

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
)

// A libvirtd that does not answer says nothing of a guest that was accepted here: it may
// run, and neither a peer's claim nor an operator's word ends it then.
func TestNoWordEndsAGuestThatMayRun(t *testing.T) {
	host := hypervisor.New(filepath.Join(t.TempDir(), "nobody"), slog.New(slog.DiscardHandler))
	for _, word := range []handoff.Event{handoff.Overruled, handoff.AbandonHere, handoff.RunHere, handoff.Asked} {
		entry := handoff.Entry{Move: "mv-1", UUID: "u", State: handoff.Accepted}
		u := &undecided{Engine: &Engine{Config: Config{Host: host}}, entry: &entry,
			step: func(_ context.Context, ev handoff.Event, _ error) error {
				t.Errorf("%v is carried out", ev)
				return nil
			}}
		if h := u.hear(t.Context(), word); h.kind != kindUndecided || h.err == nil {
			t.Errorf("%v is answered with %d, %v", word, h.kind, h.err)
		}
	}
}

// What an operator says may take longer than the command waits.
func TestOperatorIsToldOfAnEndThatTakesLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMove(Status{Move: "mv-1", Phase: PhaseInDoubt}, func(error) {})
		e := &Engine{moves: map[string]*Move{"mv-1": m}}
		go func() { <-m.inbox }() // and it is busy with libvirtd from now on
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := e.Resolve(ctx, "mv-1", WordRunHere); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// A word that does not fit is refused as such, whatever the state.
func TestWordThatDoesNotFitIsRefused(t *testing.T) {
	entry := handoff.Entry{Move: "mv-1", State: handoff.Owner}
	u := &undecided{Engine: &Engine{}, entry: &entry}
	if h := u.hear(t.Context(), handoff.RunHere); !errors.Is(h.err, ErrNotOpen) {
		t.Errorf("got %v", h.err)
	}
}
