package migrate

import (
	"path/filepath"
	"testing"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/netredirect"
)

func TestHasGone(t *testing.T) {
	for _, c := range []struct {
		move     handoff.State // "": not in the journal any more
		redirect netredirect.State
		gone     bool
	}{
		{handoff.Released, netredirect.Standing, true},
		{handoff.Running, netredirect.Armed, true},
		{handoff.Returned, netredirect.Standing, false},
		{handoff.Aborted, netredirect.Armed, false},
		{"", netredirect.Opening, false},
		{"", netredirect.Armed, false},
		{"", netredirect.Standing, true},
		{"", netredirect.Draining, true},
		{"", netredirect.Resident, true},
	} {
		if got := hasGone(c.move, c.redirect); got != c.gone {
			t.Errorf("move %q, redirect %s: gone %v", c.move, c.redirect, got)
		}
	}
}

// A move whose first record was said not to be written, and was, is not ended once more
// when its guest has been moved since: it would be defined again where it has left.
func TestOvertakenMoveIsOnlyForgotten(t *testing.T) {
	j, err := handoff.OpenJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for _, e := range []handoff.Entry{
		{Move: "mv-1", UUID: "u", State: handoff.Owner},
		{Move: "mv-2", UUID: "u", State: handoff.Receiver},
		{Move: "mv-3", UUID: "u", State: handoff.Running},
		{Move: "mv-4", UUID: "another", State: handoff.Owner},
	} {
		if err := j.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	e := &Engine{Config: Config{Journal: j}, moves: map[string]*Move{}} // without libvirt
	entries, err := j.All()
	if err != nil {
		t.Fatal(err)
	}
	for i, entry := range entries {
		if overtaken(entry, entries[i+1:]) {
			e.endOvertaken(entry)
		}
	}
	for move, want := range map[string]handoff.State{"mv-1": handoff.Returned, "mv-2": handoff.Aborted, "mv-3": handoff.Running, "mv-4": handoff.Owner} {
		if got, err := j.Get(move); err != nil || got.State != want {
			t.Errorf("%s is %v, %v, want %v", move, got.State, err, want)
		}
	}
	if m, ok := e.Move("mv-1"); !ok || m.Status().Phase != PhaseRolledBack {
		t.Error("the move that was overtaken is not shown as rolled back")
	}
}
