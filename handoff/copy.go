package handoff

import (
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// Copy is a disk image at this host of a guest that has left it, or has not
// arrived. A move of that guest to here starts from it.
type Copy struct {
	Path   string    `json:"path"`
	VM     string    `json:"vm"`
	UUID   string    `json:"uuid"`
	Format string    `json:"format"`
	Size   int64     `json:"size"`  // bytes, as the guest sees it
	Since  time.Time `json:"since"` //

	// Whole tells that it is the disk as the guest left it. A move that did not
	// end has changed a part of it.
	Whole bool `json:"whole,omitempty"`
	// Until is when the agent removes it. What an operator has asked to keep has
	// none, and stays.
	Until time.Time `json:"until,omitzero"`

	// What the file was when it was kept. If it is anything else now it is not
	// the move's to write to.
	Inode    uint64 `json:"inode"`
	Length   int64  `json:"length"`
	Modified int64  `json:"modified"` // Unix nanoseconds
}

// Kept reports that an operator has asked to keep the copy.
func (c Copy) Kept() bool { return c.Until.IsZero() }

// PutCopy makes the record of a copy durable.
func (j *Journal) PutCopy(c Copy) error {
	b, err := json.Marshal(c)
	if err == nil {
		err = j.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(copies).Put([]byte(c.Path), b) })
	}
	if err != nil {
		return fmt.Errorf("journal copy %s: %w", c.Path, err)
	}
	return nil
}

// DropCopy forgets a copy.
func (j *Journal) DropCopy(path string) error {
	if err := j.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(copies).Delete([]byte(path)) }); err != nil {
		return fmt.Errorf("forget copy %s: %w", path, err)
	}
	return nil
}

// Copies returns every copy, in the order of their paths.
func (j *Journal) Copies() ([]Copy, error) {
	var all []Copy
	err := j.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(copies).ForEach(func(k, b []byte) error {
			var c Copy
			if err := json.Unmarshal(b, &c); err != nil {
				return fmt.Errorf("copy %s: %w", k, err)
			}
			all = append(all, c)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	return all, nil
}
