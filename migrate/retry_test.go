package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
)

// A destination whose agent is stopped comes back with it; one that an operator has
// cancelled does not.
func TestMoveIsTriedAgainWhenTheAgentStops(t *testing.T) {
	life, stop := context.WithCancel(t.Context())
	in := &incoming{Engine: &Engine{ctx: life}}
	cancelled, cancel := context.WithCancelCause(life)
	cancel(ErrCancelled)
	if in.comesBack(cancelled, errors.New("cancelled")) {
		t.Error("a cancelled move is tried again")
	}
	stop()
	if !in.comesBack(life, errors.New("stopped")) {
		t.Error("a move is not tried again whose destination's agent was restarted")
	}
}

// What breaks QEMU's connections is its end, which libvirt may miss for a while.
func TestMoveIsTriedAgainWhenQEMUDies(t *testing.T) {
	in := &incoming{Engine: &Engine{ctx: t.Context()}}
	if !in.comesBack(t.Context(), fmt.Errorf("disk vda: %w", io.EOF)) {
		t.Error("a move is not tried again whose QEMU has died")
	}
	if in.comesBack(t.Context(), errors.New("no space left")) {
		t.Error("a full disk is tried again")
	}
}
