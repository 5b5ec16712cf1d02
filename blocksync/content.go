package blocksync

import (
	"context"
	"sync"

	"github.com/wanmig/wanmig/compress"
)

// Content is what the destination of a move holds: its new disks as they fill,
// and older copies of them. Blocks of it are not sent again. The index tells where a page
// may be; what is read there counts only if it has the page's fingerprint.
type Content struct {
	index *compress.Index

	mu      sync.Mutex
	sources []readerAt
}

// readerAt is where content can be read: a disk, or an image.
type readerAt interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// NewContent makes the content of a move whose disks have size bytes together.
func NewContent(size int64) (*Content, error) {
	index, err := compress.NewIndex((size + page - 1) / page)
	if err != nil {
		return nil, err
	}
	return &Content{index: index}, nil
}

// Close gives the index's memory back.
func (c *Content) Close() error { return c.index.Close() }

// sourceBits are those of a place that tell the page; the others the source.
const sourceBits = 44

// add takes a source in and returns the place of its first page.
func (c *Content) add(r readerAt) compress.Place {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sources = append(c.sources, r)
	return compress.Place(len(c.sources)-1) << sourceBits
}

func (c *Content) source(p compress.Place) readerAt {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sources[p>>sourceBits]
}

// search looks for pages, whose content it puts one after the other into buf.
type search struct {
	*Content
	sums []compress.Fingerprint
	held []bool
	buf  []byte // nil when nothing is held
}

// run finds what it can. Pages lie beside each other again where they did
// before, so each that is found tells where the next one may be; that also
// finds those that the index has forgotten.
func (s *search) run(ctx context.Context) {
	places := make([]compress.Place, len(s.sums))
	known := make([]bool, len(s.sums))
	any := false
	for i, sum := range s.sums {
		places[i], known[i] = s.index.Get(sum)
		any = any || known[i]
	}
	if !any {
		return
	}
	s.buf = make([]byte, len(s.sums)*page)
	for i := 0; i < len(s.sums); {
		if !known[i] && i > 0 && s.held[i-1] {
			places[i], known[i] = places[i-1]+1, true
		}
		if !known[i] {
			i++
			continue
		}
		end := i + 1 // of what may be read together
		for end < len(s.sums) && known[end] && places[end] == places[end-1]+1 {
			end++
		}
		s.read(ctx, places[i], i, end)
		i = end
	}
}

// read looks whether pages [i, end) are at a place.
func (s *search) read(ctx context.Context, at compress.Place, i, end int) {
	src, first := s.source(at), int64(at&(1<<sourceBits-1))
	whole := src.Size() / page
	if first >= whole {
		return
	}
	end = min(end, i+int(whole-first))
	// What can't be read is not held.
	if src.ReadAt(ctx, s.buf[i*page:end*page], first*page) != nil {
		return
	}
	for ; i < end; i++ {
		s.held[i] = compress.Sum(s.buf[i*page:(i+1)*page]) == s.sums[i]
	}
}
