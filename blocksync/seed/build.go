package seed

import (
	"bufio"
	"bytes"
	"container/heap"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/wanmig/wanmig/compress"
)

const (
	stretch    = 1 << 20   // of content that is read at once
	runEntries = 2 << 20   // that are sorted in memory: 32 MiB, for 8 GiB of content
	mergeRead  = 64 << 10  // of each run at once when they are merged
	maxBad     = 16        // stretches of an image that may be unreadable
	tempPrefix = ".making" // of files in the state folder that are not done
)

// entry is a page of an image.
type entry struct {
	tag  uint64
	page uint32
}

func (e entry) encode(b []byte) {
	binary.LittleEndian.PutUint64(b, e.tag)
	binary.LittleEndian.PutUint32(b[8:], e.page)
}

// builder makes the index file of one image. Entries are sorted in runs of bounded size;
// when there is more than one they go to a file beside and are merged.
type builder struct {
	folder string
	pace   func(ctx context.Context, n int) error // before n bytes are read
	done   func(bytes, of int64)                  // how far it is
	most   int                                    // entries of a run
	fault  func(step string) error                // before each step of writing: where tests fail it
	run    []entry
	runs   *os.File
	ends   []int64 // of the runs in the file
}

// build reads an image and writes its index in place of an older one. It returns
// what of the image could not be read, if it could do without, as unread.
func (b *builder) build(ctx context.Context, path string, began time.Time, file identity, img format) (unread, err error) {
	defer b.discard()
	unread, err = b.collect(ctx, img)
	if err != nil {
		return nil, err
	}
	h := header{path: path, format: img.kind(), file: file, size: img.size(), indexed: began}
	return unread, b.write(h)
}

// collect reads all content.
func (b *builder) collect(ctx context.Context, img format) (unread, err error) {
	size := min(img.size(), maxPages*compress.PageSize) / compress.PageSize * compress.PageSize
	buf := make([]byte, stretch)
	bad := 0
	for off := int64(0); off < size; {
		from, to, err := img.nextData(ctx, off)
		if err != nil {
			return nil, fmt.Errorf("find data of the image: %w", err)
		}
		b.done(min(from, size), size)
		// Whole pages from here on, each read once.
		from, to = max(from/compress.PageSize*compress.PageSize, off), min((to+compress.PageSize-1)/compress.PageSize*compress.PageSize, size)
		for off = from; off < to; off += stretch {
			part := buf[:min(stretch, to-off)]
			if err := b.pace(ctx, len(part)); err != nil {
				return nil, err
			}
			if err := img.readAt(part, off); err != nil {
				if bad++; bad == maxBad {
					return nil, fmt.Errorf("read image at %d, the %dth time in vain: %w", off, bad, err)
				}
				unread = fmt.Errorf("left out: read image at %d: %w", off, err)
				continue
			}
			if err := b.add(part, off/compress.PageSize); err != nil {
				return nil, err
			}
			b.done(off, size)
		}
		off = max(to, from)
	}
	return unread, nil
}

var zeros [compress.PageSize]byte

// add takes the pages of content in.
func (b *builder) add(content []byte, page int64) error {
	for p := range slices.Chunk(content, compress.PageSize) {
		if !bytes.Equal(p, zeros[:]) {
			b.run = append(b.run, entry{tagOf(compress.Sum(p)), uint32(page)})
		}
		page++
		if len(b.run) == b.most {
			if err := b.spill(); err != nil {
				return err
			}
		}
	}
	return nil
}

// sorted ends a run: its entries by tag, each tag once, with its first page.
func (b *builder) sorted() []entry {
	slices.SortFunc(b.run, func(x, y entry) int {
		switch {
		case x.tag < y.tag || x.tag == y.tag && x.page < y.page:
			return -1
		case x == y:
			return 0
		}
		return 1
	})
	return slices.CompactFunc(b.run, func(x, y entry) bool { return x.tag == y.tag })
}

// spill writes the run to the file of runs.
func (b *builder) spill() (err error) {
	if b.runs == nil {
		if b.runs, err = os.CreateTemp(b.folder, tempPrefix); err != nil {
			return fmt.Errorf("write index: %w", err)
		}
	}
	w := bufio.NewWriterSize(b.runs, mergeRead)
	var one [entrySize]byte
	for _, e := range b.sorted() {
		e.encode(one[:])
		if _, err := w.Write(one[:]); err != nil {
			return fmt.Errorf("write index: %w", err)
		}
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	end, err := b.runs.Seek(0, io.SeekCurrent)
	if err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	b.ends, b.run = append(b.ends, end), b.run[:0]
	return nil
}

// discard removes what is not the index.
func (b *builder) discard() {
	if b.runs != nil {
		_ = os.Remove(b.runs.Name()) // the next start of the agent does it otherwise
		_ = b.runs.Close()
	}
}

// write writes the index file: a new file, its content and then its name.
func (b *builder) write(h header) error {
	f, err := os.CreateTemp(b.folder, tempPrefix)
	if err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	defer os.Remove(f.Name())
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"WRITE", func() error { return b.fill(f, h) }},
		{"SYNC", func() error { return errors.Join(f.Sync(), f.Close()) }},
		{"RENAME", func() error { return os.Rename(f.Name(), indexPath(b.folder, h.path)) }},
		{"SYNC FOLDER", func() error { return syncFolder(b.folder) }},
	} {
		err := b.fault(step.name)
		if err == nil {
			err = step.do()
		}
		if err != nil {
			_ = f.Close() // perhaps for the second time
			return fmt.Errorf("write index: %w", err)
		}
	}
	return nil
}

// fill writes entries and then the header before them.
func (b *builder) fill(f *os.File, h header) error {
	if _, err := f.Seek(headerSize, io.SeekStart); err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, mergeRead)
	var one [entrySize]byte
	put := func(e entry) error {
		e.encode(one[:])
		h.sum = crc32.Update(h.sum, castagnoli, one[:])
		h.count++
		_, err := w.Write(one[:])
		return err
	}
	if err := b.each(put); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := f.WriteAt(h.encode(), 0)
	return err
}

// each calls put for every entry, by tag, each tag once.
func (b *builder) each(put func(entry) error) error {
	if b.runs == nil {
		for _, e := range b.sorted() {
			if err := put(e); err != nil {
				return err
			}
		}
		return nil
	}
	if err := b.spill(); err != nil {
		return err
	}
	b.run = nil
	var all merge
	from := int64(0)
	for _, end := range b.ends {
		r := &run{r: bufio.NewReaderSize(io.NewSectionReader(b.runs, from, end-from), mergeRead)}
		if more, err := r.next(); err != nil {
			return err
		} else if more {
			all = append(all, r)
		}
		from = end
	}
	heap.Init(&all)
	last := entry{page: math.MaxUint32}
	for first := true; len(all) > 0; {
		r := all[0]
		if first || r.entry.tag != last.tag {
			if err := put(r.entry); err != nil {
				return err
			}
		}
		first, last = false, r.entry
		more, err := r.next()
		if err != nil {
			return err
		}
		if more {
			heap.Fix(&all, 0)
		} else {
			heap.Pop(&all)
		}
	}
	return nil
}

// run is a sorted run that is read back.
type run struct {
	r     *bufio.Reader
	entry entry // the next one
}

func (r *run) next() (bool, error) {
	var one [entrySize]byte
	_, err := io.ReadFull(r.r, one[:])
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	r.entry = entry{binary.LittleEndian.Uint64(one[:]), binary.LittleEndian.Uint32(one[8:])}
	return err == nil, err
}

// merge is a heap of runs, by their next entry.
type merge []*run

func (m merge) Len() int { return len(m) }
func (m merge) Less(i, j int) bool {
	a, b := m[i].entry, m[j].entry
	return a.tag < b.tag || a.tag == b.tag && a.page < b.page
}
func (m merge) Swap(i, j int) { m[i], m[j] = m[j], m[i] }
func (m *merge) Push(x any)   { *m = append(*m, x.(*run)) }
func (m *merge) Pop() any {
	last := (*m)[len(*m)-1]
	*m = (*m)[:len(*m)-1]
	return last
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// indexPath is where the index of an image is.
func indexPath(folder, image string) string { return filepath.Join(folder, indexName(image)) }
