package handoff

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"github.com/wanmig/wanmig/faults"
)

// Entry is the durable record of one side of a move.
type Entry struct {
	Move    string    `json:"move"`
	State   State     `json:"state"`
	VM      string    `json:"vm"`
	UUID    string    `json:"uuid"`
	Site    string    `json:"site"` // the other side's site
	Peer    string    `json:"peer"` // the other side's ID
	Started time.Time `json:"started"`
	Changed time.Time `json:"changed"`
	Seq     uint64    `json:"seq"` // orders the entries, whatever the clock does; Put sets it

	// Source: what is left to do once the guest is released.
	Persistent bool     `json:"persistent,omitempty"`
	Paused     bool     `json:"paused,omitempty"` // it was paused before the move
	NVRAM      bool     `json:"nvram,omitempty"`  // it has UEFI variables of its own
	Remove     []string `json:"remove,omitempty"` // disks to remove after release
	Autostart  bool     `json:"autostart,omitempty"`
	Boot       string   `json:"boot,omitempty"` // of the host, when it began

	// XML is the domain's definition, of a transient one its description: what it
	// is started from when its host was down. At the source of a persistent domain
	// it is the only one from the handoff on, until the move is over.
	XML string `json:"xml,omitempty"`

	Keep []Copy `json:"keep,omitempty"` // disks that stay, as an operator asked
	Back Back   `json:"back,omitzero"`

	// Destination: what the move made there, removed when it is aborted (then there
	// is none any more), and the images that are kept for a next attempt instead.
	// Those that stood there before are in the second only.
	Created  []string `json:"created,omitempty"`
	Arriving []Copy   `json:"arriving,omitempty"`

	// Outcome is the move's status as last shown, opaque here.
	Outcome json.RawMessage `json:"outcome,omitempty"`
}

// Back tells what of a guest has another name at the source than at the
// destination: of files and devices, and of bridges and networks, there = here.
type Back struct {
	Storage  map[string]string `json:"storage,omitempty"`
	Networks map[string]string `json:"networks,omitempty"`
}

// IsZero reports that there is nothing.
func (b Back) IsZero() bool { return len(b.Storage)+len(b.Networks) == 0 }

// ErrNoEntry is returned when the journal holds nothing of a move.
var ErrNoEntry = errors.New("no such move in the journal")

// Journal is the durable memory of an agent's moves.
type Journal struct{ db *bbolt.DB }

var bucket, copies = []byte("moves"), []byte("copies")

// OpenJournal opens or makes the journal at path. It is locked: a second agent
// with the same state folder is refused.
func OpenJournal(path string) (*Journal, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 2 * time.Second})
	if errors.Is(err, bbolt.ErrTimeout) {
		return nil, fmt.Errorf("open journal %s: another agent uses it: stop that one or set another state folder", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open journal %s: %w", path, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucket, copies} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("open journal %s: %w", path, err)
	}
	return &Journal{db}, nil
}

// Room is how many bytes the journal's file system has for it.
func (j *Journal) Room() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(j.db.Path(), &st); err != nil {
		return 0, fmt.Errorf("journal %s: %w", j.db.Path(), err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// Path is the journal's file.
func (j *Journal) Path() string { return j.db.Path() }

// Close closes the journal.
func (j *Journal) Close() error { return j.db.Close() }

// Put makes an entry durable: it is on the disk when Put returns nil.
func (j *Journal) Put(e Entry) error {
	e.Changed = time.Now().UTC()
	err := faults.Err(string(e.State) + "-recording")
	if err == nil {
		err = j.put(e)
	}
	if err == nil {
		err = faults.Err(string(e.State) + "-recorded")
	}
	if err != nil {
		return fmt.Errorf("journal move %s: %w", e.Move, err)
	}
	return nil
}

func (j *Journal) put(e Entry) error {
	return j.db.Update(func(tx *bbolt.Tx) error {
		moves := tx.Bucket(bucket)
		before, err := seqOf(moves.Get([]byte(e.Move)))
		if e.Seq = before; e.Seq == 0 && err == nil {
			e.Seq, err = moves.NextSequence()
		}
		if err != nil {
			return err
		}
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		return moves.Put([]byte(e.Move), b)
	})
}

// seqOf reads the number of an entry that is there, or gives 0.
func seqOf(b []byte) (uint64, error) {
	var e struct{ Seq uint64 }
	if b == nil {
		return 0, nil
	}
	return e.Seq, json.Unmarshal(b, &e)
}

// Get returns the entry of a move, or ErrNoEntry.
func (j *Journal) Get(move string) (Entry, error) {
	var e Entry
	err := j.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket).Get([]byte(move))
		if b == nil {
			return ErrNoEntry
		}
		return json.Unmarshal(b, &e)
	})
	if err != nil {
		return e, fmt.Errorf("read move %s: %w", move, err)
	}
	return e, nil
}

// Latest reports whether no later move of the entry's guest is in the journal.
func (j *Journal) Latest(e Entry) (bool, error) {
	all, err := j.All()
	later := false
	for _, o := range all {
		if o.UUID == e.UUID {
			later = o.Move != e.Move
		}
	}
	return !later, err
}

// Gone reports whether a later move has taken the entry's guest on, or may yet.
// One after which it stayed where it was has not.
func (j *Journal) Gone(e Entry) (bool, error) {
	all, err := j.All()
	i := slices.IndexFunc(all, func(o Entry) bool { return o.Move == e.Move })
	return slices.ContainsFunc(all[i+1:], func(o Entry) bool {
		return o.UUID == e.UUID && o.State != Returned && o.State != Aborted
	}), err
}

// All returns every entry, oldest first.
func (j *Journal) All() ([]Entry, error) {
	var all []Entry
	err := j.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(k, b []byte) error {
			var e Entry
			if err := json.Unmarshal(b, &e); err != nil {
				return fmt.Errorf("move %s: %w", k, err)
			}
			all = append(all, e)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	slices.SortFunc(all, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Seq, b.Seq), a.Started.Compare(b.Started))
	})
	return all, nil
}

// Trim removes the oldest final entries beyond keep.
func (j *Journal) Trim(keep int) error {
	all, err := j.All()
	if err != nil {
		return err
	}
	return j.db.Update(func(tx *bbolt.Tx) error {
		for _, e := range all[:max(0, len(all)-keep)] {
			if !e.State.Final() {
				continue
			}
			if err := tx.Bucket(bucket).Delete([]byte(e.Move)); err != nil {
				return err
			}
		}
		return nil
	})
}
