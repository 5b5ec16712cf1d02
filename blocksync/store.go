package blocksync

import "context"

// put stores content of one block, at bytes from its start.
func (o *Outbox) put(ctx context.Context, idx int64, at int, p []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		if err := o.closed(); err != nil {
			return err
		}
		var done bool
		var wait bool
		var room <-chan struct{}
		switch b := o.blocks[idx]; {
		case b == nil && o.bulk && o.stats.PendingMemory+o.stats.PendingSpool >= o.bulkRoom:
			wait = true
		case b == nil:
			done, room = o.insert(idx, at, p)
			wait = room != nil
		case b.busy || b.torn:
			wait = true // a torn block is first sent with the content it still has
		case b.buf != nil:
			copy(b.buf[at:], p)
			o.validate(b, at, len(p))
			done = true
		default:
			done = o.rewrite(b, at, p)
		}
		if done {
			o.touch(idx*blockSize+int64(at), int64(len(p)))
			o.stats.Accepted += int64(len(p))
			return nil
		}
		if wait {
			if err := o.pause(ctx, room); err != nil {
				return err
			}
		}
	}
}

// insert makes a block for content where only zeros or nothing waits. When there
// is no room it returns a channel that tells when to try again; when the spool
// has failed or another writer was here meanwhile, the next try is due at once.
func (o *Outbox) insert(idx int64, at int, p []byte) (done bool, room <-chan struct{}) {
	buf, slot, room := o.budget.reserve()
	if room != nil {
		return false, room
	}
	b := &block{buf: buf, slot: slot}
	onZeros := o.zeros.get(idx)
	switch {
	case buf != nil:
		if onZeros {
			clear(buf[:])
		}
		copy(buf[at:], p)
	case !o.spool(b, onZeros, at, p):
		return false, nil
	case o.closed() != nil || o.blocks[idx] != nil || o.zeros.get(idx) != onZeros:
		o.budget.release(nil, slot)
		return false, nil
	}

	o.blocks[idx] = b
	if onZeros {
		o.zeros.clear(idx, idx+1)
		n := o.bytes(idx, idx+1)
		o.stats.PendingZero -= n
		o.validate(b, 0, int(n))
		o.stats.Coalesced += int64(len(p))
	} else {
		o.dirty.set(idx, idx+1)
		o.order.push(idx, idx+1)
		o.validate(b, at, len(p))
	}
	o.change.broadcast()
	return true, nil
}

// spool writes the first content of a block to its slot, with the mutex
// released. A slot that can't be written is left alone from then on.
func (o *Outbox) spool(b *block, onZeros bool, at int, p []byte) bool {
	o.mu.Unlock()
	defer o.mu.Lock()
	if onZeros {
		whole := make([]byte, blockSize)
		copy(whole[at:], p)
		at, p = 0, whole
	}
	return o.budget.write(b.slot, at, p) == nil // the budget keeps the error for Stats
}

// rewrite replaces content of a block in the spool, with the mutex released.
func (o *Outbox) rewrite(b *block, at int, p []byte) bool {
	b.busy = true
	o.mu.Unlock()
	err := o.budget.write(b.slot, at, p)
	o.mu.Lock()
	b.busy = false
	o.change.broadcast()
	if err != nil {
		b.torn = true
		gone := b.sectors().clear(int64(at/sectorSize), int64((at+len(p))/sectorSize))
		o.stats.PendingSpool -= gone * sectorSize
		o.stats.Coalesced += gone * sectorSize
		return false
	}
	o.validate(b, at, len(p))
	return true
}

// validate marks content of a block as there.
func (o *Outbox) validate(b *block, at, n int) {
	added := b.sectors().set(int64(at/sectorSize), int64((at+n)/sectorSize)) * sectorSize
	*o.pending(b) += added
	o.stats.Coalesced += int64(n) - added
}

func (o *Outbox) pending(b *block) *int64 {
	if b.buf != nil {
		return &o.stats.PendingMemory
	}
	return &o.stats.PendingSpool
}

// putZeros makes whole blocks zero.
func (o *Outbox) putZeros(ctx context.Context, from, to int64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := from; i < to; {
		if err := o.closed(); err != nil {
			return err
		}
		i = o.dirty.nextSet(i, to)
		if i == to {
			break
		}
		b := o.blocks[i]
		if b == nil {
			i = o.zeros.nextClear(i, to)
			continue
		}
		if b.busy {
			if err := o.pause(ctx, nil); err != nil {
				return err
			}
			i = from
			continue
		}
		n, whole := b.size(), o.bytes(i, i+1)
		*o.pending(b) -= n
		o.forget(i, b)
		o.zeros.set(i, i+1)
		o.stats.PendingZero += whole
		o.stats.Coalesced += n - whole // the whole block is counted below
	}
	if err := o.closed(); err != nil {
		return err
	}
	o.touch(from*blockSize, o.bytes(from, to))
	o.stats.Accepted += o.bytes(from, to)
	for i := from; i < to; {
		clean := o.dirty.nextClear(i, to)
		end := o.dirty.nextSet(clean, to)
		o.stats.Coalesced += o.bytes(i, clean)
		if clean < end {
			o.stats.PendingZero += o.bytes(clean, end)
			o.dirty.set(clean, end)
			o.zeros.set(clean, end)
			o.order.push(clean, end)
		}
		i = end
	}
	o.change.broadcast()
	return nil
}

// size returns how much content the block has.
func (b *block) size() int64 {
	var n int64
	for s := int64(0); s < sectors; {
		from := b.sectors().nextSet(s, sectors)
		s = b.sectors().nextClear(from, sectors)
		n += s - from
	}
	return n * sectorSize
}

// forget frees a block's room.
func (o *Outbox) forget(idx int64, b *block) {
	delete(o.blocks, idx)
	if !b.torn {
		o.budget.release(b.buf, b.slot)
	}
	o.change.broadcast()
}
