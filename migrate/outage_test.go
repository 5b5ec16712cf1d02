package migrate

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/tunnel"
)

// A source that begins another move of a VM has forgotten the one whose session is
// kept for the link to come back; another host's move is none of its business.
func TestForgottenMoveEnds(t *testing.T) {
	e := &Engine{moves: map[string]*Move{}, busy: map[string]string{}, incoming: map[string]*incoming{}}
	var cause error
	var m *Move
	m = newMove(Status{Move: "mv-1", UUID: "u", Phase: PhaseSync}, func(err error) {
		cause = err
		close(m.done)
	})
	if err := e.claim("u", m); err != nil {
		t.Fatal(err)
	}
	e.incoming["mv-1"] = &incoming{move: m, entry: handoff.Entry{Peer: "north"}}
	e.supersede("u", "west")
	e.supersede("v", "north")
	if cause != nil {
		t.Fatalf("ended: %v", cause)
	}
	e.supersede("u", tunnel.ID("north"))
	if !errors.Is(cause, errSuperseded) {
		t.Errorf("ended: %v", cause)
	}
	m.phase(PhaseDone)
	cause = nil
	if e.supersede("u", "north"); cause != nil {
		t.Errorf("a move that is over ends again: %v", cause)
	}
}

// learning is a source that waits for the decision.
func learning() (s *source, learned func(context.Context) (time.Duration, answer, *said)) {
	s = &source{Engine: &Engine{}, move: newMove(Status{Move: "mv-1", Phase: PhaseHandoff, Started: time.Now()}, func(error) {}),
		answers: make(chan answer, 1), log: slog.New(slog.DiscardHandler), entry: handoff.Entry{Move: "mv-1", State: handoff.Offered}}
	return s, func(ctx context.Context) (time.Duration, answer, *said) {
		began := time.Now()
		a, word, _ := s.learn(ctx)
		return time.Since(began), a, word
	}
}

func TestDecisionThatComesLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, learned := learning()
		go func() {
			s.answers <- answer{kind: kindChecked} // out of turn
			time.Sleep(decisionWait - time.Second)
			if p := s.move.Status().Phase; p != PhaseHandoff {
				t.Errorf("%s too soon", p)
			}
			time.Sleep(2 * time.Second)
			if st := s.move.Status(); st.Phase != PhaseInDoubt || st.Result == nil || st.Result.Result != "in-doubt" || len(st.Result.Ways) != 2 {
				t.Errorf("without an answer the move is %s: %+v", st.Phase, st.Result)
			}
			time.Sleep(time.Hour)
			s.answers <- answer{kind: kindRunning}
		}()
		if d, a, _ := learned(t.Context()); a.kind != kindRunning || d < time.Hour {
			t.Errorf("learned %d after %v", a.kind, d)
		}
	})
}

// An operator is heard once the move is in doubt, and not before.
func TestOperatorWhoDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, learned := learning()
		go func() { s.move.inbox <- said{event: handoff.RunHere} }()
		if d, a, word := learned(t.Context()); word == nil || word.event != handoff.RunHere || a.kind != 0 || d != decisionWait {
			t.Errorf("heard %+v after %v, learned %d", word, d, a.kind)
		}
	})
}

func TestDecisionWhenTheAgentStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s, learned := learning()
		go func() {
			time.Sleep(time.Second)
			cancel()
			time.Sleep(time.Second)
			s.answers <- answer{kind: kindAborted}
		}()
		if d, a, _ := learned(ctx); a.kind != kindAborted || d != 2*time.Second {
			t.Errorf("learned %d after %v", a.kind, d)
		}
		_, learned = learning()
		if d, a, word := learned(ctx); a.kind != 0 || word != nil || d != decisionWait {
			t.Errorf("gives up after %v: %d", d, a.kind)
		}
	})
}
