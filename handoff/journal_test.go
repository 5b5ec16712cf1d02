package handoff

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestJournalKeepsEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "journal.db")
	j, err := OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.Get("mv-aaaaaaaa"); !errors.Is(err, ErrNoEntry) {
		t.Fatalf("an empty journal gives %v", err)
	}
	want := Entry{Move: "mv-aaaaaaaa", State: Offered, VM: "a b", UUID: "u", Site: "s", Peer: "p", Started: time.Now().UTC(),
		Remove: []string{"/x y"}, Created: []string{"/z"}, Persistent: true, Paused: true, NVRAM: true}
	if err := j.Put(want); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(path); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Fatalf("a second agent gets %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, err = OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	got, err := j.Get(want.Move)
	if err != nil {
		t.Fatal(err)
	}
	if got.Changed.IsZero() {
		t.Error("no time of change")
	}
	if got.Seq == 0 {
		t.Error("no number")
	}
	got.Changed, got.Seq = want.Changed, 0
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// The order of moves is that in which they were made, whatever the clock did.
func TestJournalKnowsTheLatest(t *testing.T) {
	j, err := OpenJournal(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	noon := time.Unix(1e9, 0)
	first, second := Entry{Move: "z", UUID: "u", Started: noon}, Entry{Move: "a", UUID: "u", Started: noon.Add(-time.Hour)}
	for _, e := range []Entry{first, second, {Move: "m", UUID: "other", Started: noon}, first} { // the first one's end is recorded late
		if err := j.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	for e, want := range map[string]bool{"z": false, "a": true, "m": true} {
		entry, err := j.Get(e)
		if err != nil {
			t.Fatal(err)
		}
		if last, err := j.Latest(entry); err != nil || last != want {
			t.Errorf("%s is the latest: %v, %v", e, last, err)
		}
	}
}

func TestJournalTrimsOnlyWhatIsOver(t *testing.T) {
	j, err := OpenJournal(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for i, s := range []State{Offered, Released, Accepted, Running, Returned} {
		if err := j.Put(Entry{Move: fmt.Sprint("m", i), State: s, Started: time.Unix(int64(i), 0)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Trim(1); err != nil {
		t.Fatal(err)
	}
	all, err := j.All()
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range all {
		left = append(left, e.Move)
	}
	if fmt.Sprint(left) != "[m0 m2 m4]" {
		t.Errorf("left are %v", left)
	}
}

// A move back that failed leaves the guest where it was, and may be asked for again.
func TestJournalKnowsWhatIsGone(t *testing.T) {
	for state, want := range map[State]bool{Aborted: false, Returned: false, Receiver: true, Accepted: true, Running: true,
		Owner: true, Offered: true, Claimed: true, Released: true, Abandoned: true, Split: true} {
		j, err := OpenJournal(filepath.Join(t.TempDir(), "journal.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		left := Entry{Move: "mv-2", UUID: "u", State: Released}
		for _, e := range []Entry{{Move: "mv-1", UUID: "u", State: Running}, left, {Move: "mv-3", UUID: "other", State: Running},
			{Move: "mv-4", UUID: "u", State: state}, {Move: "mv-5", UUID: "u", State: Aborted}} {
			if err := j.Put(e); err != nil {
				t.Fatal(err)
			}
		}
		if gone, err := j.Gone(left); err != nil || gone != want {
			t.Errorf("after a move that is %s: gone %v, %v", state, gone, err)
		}
	}
}
