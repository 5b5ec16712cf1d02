package compress

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Place tells where a page's content is, in the terms of the index's user.
type Place uint64

// Index finds the place of a page by its fingerprint. It is a cache: a bucket
// that is full forgets one of its pages, and a place may hold something else by
// now, or the page of a fingerprint that begins alike. Whoever is told a place
// reads it and compares. Guests choose content, and so could fill a bucket: that
// costs bytes on the link and nothing else.
//
// A page takes 16 bytes of memory outside of Go's heap, in buckets of eight that
// are four fifths full: 20 bytes for each page that the index is made for. 10^8
// pages, 400 GiB of disks, take 2 GB and no time of the garbage collector. A
// look-up reads two cache lines.
type Index struct {
	mu      sync.RWMutex
	table   []byte
	buckets uint64
	turn    int
}

const (
	entrySize  = 8 + 8 // the fingerprint's first half, place + 1
	bucketSize = 8 * entrySize
)

// NewIndex makes an index for a number of pages; beyond it forgets.
func NewIndex(pages int64) (*Index, error) {
	if pages < 0 || pages > 1<<36 {
		return nil, fmt.Errorf("index of %d pages is out of bounds", pages)
	}
	buckets := uint64(pages)*5/4/8 + 1
	table, err := unix.Mmap(-1, 0, int(buckets*bucketSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("index of %d pages: %w", pages, err)
	}
	return &Index{table: table, buckets: buckets}, nil
}

// Close gives the memory back. The index is empty then.
func (x *Index) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	table := x.table
	x.table = nil
	if table == nil {
		return nil
	}
	return unix.Munmap(table)
}

func (x *Index) bucket(tag uint64) []byte { return x.table[tag%x.buckets*bucketSize:][:bucketSize] }

// find returns where in a bucket a fingerprint stands, or else a free entry, or -1.
func find(b []byte, tag uint64) (at int, there bool) {
	at = -1
	for i := 0; i < bucketSize; i += entrySize {
		switch {
		case binary.LittleEndian.Uint64(b[i+8:]) == 0:
			if at < 0 {
				at = i
			}
		case binary.LittleEndian.Uint64(b[i:]) == tag:
			return i, true
		}
	}
	return at, false
}

// Put notes where a page is, in place of where it was.
func (x *Index) Put(f Fingerprint, p Place) {
	tag := binary.LittleEndian.Uint64(f[:])
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.table == nil {
		return
	}
	b := x.bucket(tag)
	at, _ := find(b, tag)
	if at < 0 {
		x.turn = (x.turn + 1) % 8
		at = x.turn * entrySize
	}
	binary.LittleEndian.PutUint64(b[at:], tag)
	binary.LittleEndian.PutUint64(b[at+8:], uint64(p)+1)
}

// Get returns where a page may be.
func (x *Index) Get(f Fingerprint) (Place, bool) {
	tag := binary.LittleEndian.Uint64(f[:])
	x.mu.RLock()
	defer x.mu.RUnlock()
	if x.table == nil {
		return 0, false
	}
	b := x.bucket(tag)
	at, there := find(b, tag)
	if !there {
		return 0, false
	}
	return Place(binary.LittleEndian.Uint64(b[at+8:]) - 1), true
}
