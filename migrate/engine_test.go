package migrate

import (
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wanmig/wanmig/handoff"
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

// What of an entry never changes may be read while a record of it fails.
func TestRecordThatFailsChangesNothing(t *testing.T) {
	j, err := handoff.OpenJournal(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	j.Close()
	e := &Engine{Config: Config{Journal: j}}
	entry := handoff.Entry{Move: "mv-1", UUID: "u", State: handoff.Accepted, Outcome: []byte("{}")}
	var reader sync.WaitGroup
	reader.Go(func() {
		if entry.UUID != "u" {
			t.Error("the UUID has changed")
		}
	})
	if e.record(&entry, handoff.Running, newMove(Status{Move: "mv-1"}, func(error) {})) == nil {
		t.Error("a closed journal takes a record")
	}
	reader.Wait()
	if entry.State != handoff.Accepted || string(entry.Outcome) != "{}" {
		t.Errorf("the entry is %+v", entry)
	}
}
