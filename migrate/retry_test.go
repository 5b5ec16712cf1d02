package migrate

import (
	"context"
	"testing"
)

// A destination whose agent is stopped comes back with it; one that an operator has
// cancelled does not.
func TestMoveIsTriedAgainWhenTheAgentStops(t *testing.T) {
	life, stop := context.WithCancel(t.Context())
	in := &incoming{Engine: &Engine{ctx: life}}
	cancelled, cancel := context.WithCancelCause(life)
	cancel(ErrCancelled)
	if in.comesBack(cancelled) {
		t.Error("a cancelled move is tried again")
	}
	stop()
	if !in.comesBack(life) {
		t.Error("a move is not tried again whose destination's agent was restarted")
	}
}
