package blocksync

import (
	"context"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/wanmig/wanmig/compress"
)

// Content is what the destination of a move holds: its disks as they fill, and
// the images that its operator has listed. Pages of it are not sent again. An
// index tells where a page may be; what is read there counts only if it has the
// page's fingerprint.
type Content struct {
	index *compress.Index

	mu      sync.Mutex
	sources []readerAt
	seeds   []seed
}

// readerAt is where content can be read: a disk, or an image.
type readerAt interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// Seed is an image that has an index of its own. Find tells where a page may
// be, as a number of pages from the image's start.
type Seed interface {
	readerAt
	Find(compress.Fingerprint) (page int64, ok bool)
}

type seed struct {
	Seed
	origin compress.Origin
	place  compress.Place // of its first page
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
	return c.addLocked(r)
}

func (c *Content) addLocked(r readerAt) compress.Place {
	c.sources = append(c.sources, r)
	return compress.Place(len(c.sources)-1) << sourceBits
}

// Seed lets content be found in an image, which may change or end meanwhile.
func (c *Content) Seed(s Seed, o compress.Origin) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seeds = append(c.seeds, seed{s, o, c.addLocked(s)})
}

func (c *Content) source(p compress.Place) readerAt {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sources[p>>sourceBits]
}

// Search tells of each page where it was found, and returns the content of those
// that were, each where it stands among the pages: nil when there is none.
func (c *Content) Search(ctx context.Context, sums []compress.Fingerprint) (found []compress.Origin, content []byte) {
	s := search{Content: c, sums: sums, found: make([]compress.Origin, len(sums))}
	s.run(ctx)
	return s.found, s.buf
}

// searchBlock reads into block what follows a page, wherever that may be, until
// it is what is looked for.
func (c *Content) searchBlock(ctx context.Context, first compress.Fingerprint, block []byte, is func() bool) compress.Origin {
	if at, ok := c.index.Get(first); ok && c.readAt(ctx, at, block) && is() {
		return compress.OnDisk
	}
	for _, x := range c.allSeeds() {
		at, ok := x.find(first)
		if ok && c.readAt(ctx, at, block) && is() {
			return x.origin
		}
	}
	return compress.Nowhere
}

// readAt reads whole pages at a place, if they are there.
func (c *Content) readAt(ctx context.Context, at compress.Place, p []byte) bool {
	src, first := c.source(at), int64(at&(1<<sourceBits-1))
	return first+int64(len(p)/page) <= src.Size()/page && src.ReadAt(ctx, p, first*page) == nil
}

func (c *Content) allSeeds() []seed {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seeds
}

// find tells where a page may be.
func (s seed) find(f compress.Fingerprint) (compress.Place, bool) {
	at, ok := s.Find(f)
	return s.place + compress.Place(at), ok && at >= 0 && at < 1<<sourceBits
}

// search looks for pages that are not found yet.
type search struct {
	*Content
	sums   []compress.Fingerprint
	found  []compress.Origin
	places []compress.Place // of those that are found here
	buf    []byte           // the pages' content; nil when nothing is found
}

// run finds what it can: on the disks, then in each image. Pages lie beside each
// other again where they did before, so each that is found tells where the next
// one may be; that also finds those that an index has forgotten.
func (s *search) run(ctx context.Context) {
	s.places = make([]compress.Place, len(s.sums))
	s.look(ctx, compress.OnDisk, s.index.Get)
	for _, x := range s.allSeeds() {
		s.look(ctx, x.origin, x.find)
	}
}

// reads is how many places a search reads at once: memory's pages lie on a disk
// in another order, and QEMU answers one request in some 100 µs.
const reads = 16

// look asks an index for the pages that are not found yet, and reads them there.
func (s *search) look(ctx context.Context, o compress.Origin, find func(compress.Fingerprint) (compress.Place, bool)) {
	known := make([]bool, len(s.sums))
	any := false
	for i, sum := range s.sums {
		if s.found[i] == compress.Nowhere {
			s.places[i], known[i] = find(sum)
			any = any || known[i]
		}
	}
	if !any {
		return
	}
	if s.buf == nil {
		s.buf = make([]byte, len(s.sums)*page)
	}
	var g errgroup.Group
	g.SetLimit(reads)
	for i := 0; i < len(s.sums); {
		if !known[i] {
			i++
			continue
		}
		end := i + 1 // of what may be read together
		for end < len(s.sums) && known[end] && s.places[end] == s.places[end-1]+1 {
			end++
		}
		from := i
		g.Go(func() error { s.read(ctx, o, s.places[from], from, end); return nil })
		i = end
	}
	_ = g.Wait() // what can't be read is not found
	for i := 1; i < len(s.sums); i++ {
		if s.found[i] == compress.Nowhere && s.found[i-1] == o {
			s.places[i] = s.places[i-1] + 1
			s.read(ctx, o, s.places[i], i, i+1)
		}
	}
}

// read looks whether pages [i, end) are at a place.
func (s *search) read(ctx context.Context, o compress.Origin, at compress.Place, i, end int) {
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
		if compress.Sum(s.buf[i*page:(i+1)*page]) == s.sums[i] {
			s.found[i] = o
		}
	}
}
