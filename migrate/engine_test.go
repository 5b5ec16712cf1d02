package migrate

import (
	"testing"
	"testing/synctest"
	"time"
)

// Whoever is told that a move is over may begin the next at once, though its host
// has something left to clear; one that is not over is in the way.
func TestNextMoveBeginsWhenTheLastHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &Engine{moves: map[string]*Move{}, busy: map[string]string{}}
		move := func(id string, p Phase) *Move {
			return newMove(Status{Move: id, UUID: "u", VM: "web", Phase: p}, func(error) {})
		}
		last, next := move("mv-1", PhaseSync), move("mv-2", PhaseCheck)
		if err := e.claim("u", last); err != nil {
			t.Fatal(err)
		}
		e.awaitEnding(t.Context(), "u")
		if e.claim("u", next) == nil {
			t.Error("two moves have the VM")
		}
		last.phase(PhaseDone)
		go func() {
			time.Sleep(time.Second)
			e.release("u", last)
		}()
		e.awaitEnding(t.Context(), "u")
		if err := e.claim("u", next); err != nil {
			t.Error(err)
		}
		e.release("u", last) // again, late
		if e.busy["u"] != "mv-2" {
			t.Errorf("the VM is with %q", e.busy["u"])
		}
	})
}
