package memsync

import "github.com/wanmig/wanmig/compress"

// openStore takes the memory of the page store.
func (s *Source) openStore() error {
	slots := slotsIn(s.cfg.Store)
	if slots == 0 {
		return nil
	}
	pages, err := newStore(slots)
	if err != nil {
		return err
	}
	s.index = newIndex(pages)
	return nil
}

func (s *Source) closeStore() error {
	if s.index == nil {
		return nil
	}
	return s.index.close()
}

// reduce puts a page of the current block into the batch: as a reference to
// equal content in the page store, or as a delta against its own last content,
// or as it is. What is not referred to is kept in the store. A page that would
// be sent as it is can be offered before.
func (s *Source) reduce(word uint64, block, page []byte, mayOffer bool) {
	x := s.index
	n := word >> storeBits
	if s.cfg.Keep != nil && s.pageBits == storeBits {
		s.cfg.Keep(uint64(s.current.first)+n, page)
	}
	if x == nil || s.pageBits != storeBits {
		s.batch.addPage(word, block, page)
		return
	}
	last := s.current.base(n)
	tag := x.tag(page)
	if slot, found := x.find(tag, page); found {
		x.useful[slot] = true
		*last = slot + 1
		s.batch.addReference(word, slot, block)
		return
	}
	var base uint32
	var length int
	var isDelta bool
	hasBase := *last != 0
	if hasBase {
		base = *last - 1
		length, isDelta = s.batch.tryDelta(x.page(base), page)
	}
	owner := uint32(s.current.first + n)
	slot := x.slotFor(owner, base, hasBase)
	if isDelta {
		s.batch.addDelta(word, slot, base, length, block)
	} else {
		s.batch.addKept(word, slot, block, page)
		if mayOffer {
			s.batch.offer(compress.Sum(page))
		}
	}
	x.insert(slot, owner, tag, page)
	*last = slot + 1
}
