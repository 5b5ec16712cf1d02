package handoff

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A host that loses power in the middle of a Put leaves any part of what bbolt writes:
// pages in any order, each of them in sectors, then the meta page. Whatever part it
// is, the journal opens, and has the move as it was before or after.
func TestJournalAfterATornWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	j, err := OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	read := func() []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	put := func(s State) {
		e := Entry{Move: "mv-1", State: s, UUID: "u", Started: time.Unix(1, 0), XML: string(bytes.Repeat([]byte(s), 2000))}
		if err := j.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	put(Receiver)
	for range 20 { // pages that are free, and used again
		put(Receiver)
	}
	before := read()
	put(Accepted)
	after := read()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}

	const page, sector = 4096, 512
	var data []int // pages that differ, but the meta pages
	for at := 2 * page; at < len(after); at += page {
		if at >= len(before) || !bytes.Equal(before[at:at+page], after[at:at+page]) {
			data = append(data, at)
		}
	}
	if len(data) < 3 {
		t.Fatalf("only the pages %v were written", data)
	}
	tried, old := 0, 0
	try := func(what string, b []byte) {
		t.Helper()
		torn := filepath.Join(t.TempDir(), fmt.Sprint(tried))
		tried++
		if err := os.WriteFile(torn, b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := OpenJournal(torn)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		defer j.Close()
		e, err := j.Get("mv-1")
		if err != nil || e.State != Receiver && e.State != Accepted || e.XML != string(bytes.Repeat([]byte(e.State), 2000)) {
			t.Errorf("%s: %q, %v", what, e.State, err)
		}
		if e.State == Receiver {
			old++
		}
	}
	grown := append(bytes.Clone(before), make([]byte, max(0, len(after)-len(before)))...)
	for _, at := range data {
		for n := sector; n <= page; n += sector {
			one := bytes.Clone(grown)
			copy(one[at:at+n], after[at:at+n])
			try(fmt.Sprintf("%d bytes of the page at %d", n, at), one)
			most := bytes.Clone(after)
			copy(most[:2*page], before)
			copy(most[at:at+n], grown[at:at+n])
			try(fmt.Sprintf("all but %d bytes of the page at %d", n, at), most)
		}
	}
	if tried != old {
		t.Errorf("%d of %d without the meta page have the new state", tried-old, tried)
	}
	for n := 0; n <= 2*page; n += 64 { // every other page is on the disk by then
		meta := bytes.Clone(after)
		copy(meta[n:2*page], before[n:])
		try(fmt.Sprintf("%d bytes of the meta pages", n), meta)
	}
	if old == tried {
		t.Error("the new state was never found")
	}
}
