package blocksync

// extent is a range of the disk in bytes.
type extent struct{ offset, length int64 }

func (e extent) end() int64 { return e.offset + e.length }

// span is a range of blocks that wait to be sent, or a barrier between them.
type span struct {
	from, to int64
	barrier  uint64 // its id, when not 0
	final    bool
	covered  bool   // everything before it is the mirror's first pass
	check    *check // or a digest between them
	last     bool   // the digest is of a disk that changes no more
}

// queue holds spans in the order in which they became dirty. Every dirty block
// is in exactly one of them.
type queue struct {
	spans []span
	head  int
}

// push adds blocks, to the last span when they continue it.
func (q *queue) push(from, to int64) {
	if n := len(q.spans); n > q.head && q.spans[n-1].barrier == 0 && q.spans[n-1].check == nil && q.spans[n-1].to == from {
		q.spans[n-1].to = to
		return
	}
	q.pushSpan(span{from: from, to: to})
}

func (q *queue) pushSpan(s span) {
	if q.head > len(q.spans)/2 {
		q.spans = q.spans[:copy(q.spans, q.spans[q.head:])]
		q.head = 0
	}
	q.spans = append(q.spans, s)
}

// front returns the oldest span, or nil.
func (q *queue) front() *span {
	if q.head == len(q.spans) {
		return nil
	}
	return &q.spans[q.head]
}

func (q *queue) pop() { q.head++ }
