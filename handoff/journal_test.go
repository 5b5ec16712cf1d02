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
	got.Changed = want.Changed
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %+v, want %+v", got, want)
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
