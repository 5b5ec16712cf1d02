package blocksync

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/compress"
)

// image remembers by fingerprint what the destination's disk has on each page
// when all that is sent so far is applied. QEMU's mirror copies 64 KiB where a
// guest has written one page: the others need not cross again, and to know that
// takes no answer.
//
// It takes 16 bytes of memory, outside of Go's heap, for each page that was
// sent: 4 MiB for each GiB.
type image struct {
	sums  []byte
	known bitmap // pages whose content is that of sums
}

const sumSize = int64(len(compress.Fingerprint{}))

// newImage makes the image of a disk, of which nothing is known.
func newImage(size int64) (*image, error) {
	m, err := unix.Mmap(-1, 0, int(pagesIn(size)*sumSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("memory for the fingerprints of a disk of %d bytes: %w", size, err)
	}
	return &image{m, newBitmap(pagesIn(size))}, nil
}

func (m *image) close() error { return unix.Munmap(m.sums) }

// put notes a page's content, and reports whether it had that already.
func (m *image) put(page int64, f compress.Fingerprint) (had bool) {
	old := m.sums[page*sumSize:][:sumSize]
	had = m.known.get(page) && compress.Fingerprint(old) == f
	if !had {
		copy(old, f[:])
		m.known.set(page, page+1)
	}
	return had
}

// forget notes that an extent has changed, or a part of its pages.
func (m *image) forget(e extent) { m.known.clear(e.offset/page, (e.end()+page-1)/page) }
