package handoff

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
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

	// Source: what is left to do once the guest is released.
	Persistent bool     `json:"persistent,omitempty"`
	Paused     bool     `json:"paused,omitempty"` // it was paused before the move
	NVRAM      bool     `json:"nvram,omitempty"`  // it has UEFI variables of its own
	Remove     []string `json:"remove,omitempty"` // disks to remove after release

	Keep []Copy `json:"keep,omitempty"` // disks that stay, as an operator asked

	// Destination: what the move made there, removed when it is aborted, and the
	// images that are kept for a next attempt instead. Those that stood there
	// before are in the second only.
	Created  []string `json:"created,omitempty"`
	Arriving []Copy   `json:"arriving,omitempty"`

	// Outcome is the move's status as last shown, opaque here.
	Outcome json.RawMessage `json:"outcome,omitempty"`
}

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

// Close closes the journal.
func (j *Journal) Close() error { return j.db.Close() }

// Put makes an entry durable: it is on the disk when Put returns nil.
func (j *Journal) Put(e Entry) error {
	e.Changed = time.Now().UTC()
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal move %s: %w", e.Move, err)
	}
	if err = faults.Err(string(e.State) + "-recording"); err == nil {
		err = j.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte(e.Move), b) })
	}
	if err == nil {
		err = faults.Err(string(e.State) + "-recorded")
	}
	if err != nil {
		return fmt.Errorf("journal move %s: %w", e.Move, err)
	}
	return nil
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
	sort.Slice(all, func(a, b int) bool { return all[a].Started.Before(all[b].Started) })
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
