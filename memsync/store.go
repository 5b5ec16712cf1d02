package memsync

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	storeBits = 12 // pages of other sizes are sent as data
	storePage = 1 << storeBits

	// maxSlots keeps a slot's number, and one more, within 32 bits, and the
	// store's bytes within an int.
	maxSlots = 1 << 30
)

// slotsIn returns how many pages a store of so many bytes holds.
func slotsIn(limit int64) uint32 { return uint32(min(max(limit, 0)/storePage, maxSlots)) }

// store holds pages that both sides have. The source says which slot each page
// goes to, so the two are equal wherever the destination is in the stream.
// Slots are filled in order first, and written again in any order then.
//
// Its memory is mapped: a collector neither moves it nor counts it, and a slot
// takes none before it is filled.
type store struct {
	mem    []byte
	slots  uint32
	filled uint32 // slots that were ever written
}

// newStore takes address space for slots pages. close gives it back.
func newStore(slots uint32) (*store, error) {
	s := &store{slots: slots}
	if slots == 0 {
		return s, nil
	}
	var err error
	s.mem, err = unix.Mmap(-1, 0, int(slots)*storePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("page store of %d MiB: %w: set reduction.memory lower", int64(slots)*storePage>>20, err)
	}
	_ = unix.Madvise(s.mem, unix.MADV_HUGEPAGE) // only for speed: a kernel may have none
	return s, nil
}

func (s *store) close() error {
	if s.mem == nil {
		return nil
	}
	mem := s.mem
	s.mem, s.filled = nil, 0
	return unix.Munmap(mem)
}

// page is the content of a filled slot, valid until the slot is written.
func (s *store) page(slot uint32) []byte {
	at := int(slot) * storePage
	return s.mem[at : at+storePage : at+storePage]
}

// holds tells whether slot can be read.
func (s *store) holds(slot uint32) bool { return slot < s.filled }

// takes tells whether slot can be written: it is filled, or the next to be.
func (s *store) takes(slot uint32) bool { return slot < s.slots && slot <= s.filled }

// put writes a slot that takes allows.
func (s *store) put(slot uint32, page []byte) {
	s.filled = max(s.filled, slot+1)
	copy(s.page(slot), page)
}
