package seed

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"github.com/wanmig/wanmig/compress"
)

const (
	qcowMagic     = "QFI\xfb"
	qcowHeaderV2  = 72
	qcowHeaderV3  = 104
	qcowHeaderMax = 112
	minClusterBit = 9
	maxClusterBit = 21
	maxL1Entries  = 4 << 20 // as in QEMU
	level1Part    = 4 << 10 // entries that are read at once
	cacheBytes    = 1 << 20 // of clusters, and of level 2 tables, of one image

	offsetMask = 1<<56 - 1<<9 // of an entry in a table
)

// Incompatible features of version 3.
const (
	featureDirty       = 1 << 0 // reference counts, which are not read here
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3 // the header tells the type of compression
	featureExtendedL2  = 1 << 4
)

var (
	// errQCOW is returned when an image is not a qcow2 image that can be read here.
	errQCOW = errors.New("qcow2 image not readable")
	// errRepeated is returned when an image's tables lead to its clusters again and again.
	errRepeated = errors.New("qcow2 image not readable: its tables lead to more content than the file has")
)

// qcowHeader is what is needed of the header of a qcow2 image.
type qcowHeader struct {
	bits    uint  // of an offset in a cluster
	size    int64 // of the content
	l1      int64 // where the level 1 table is in the file
	l1Size  int64 // its entries
	zeroBit bool  // an entry can say that its cluster is zero (version 3)
	zstd    bool  // compressed clusters are zstd, not deflate
}

func parseQCOW(b []byte) (h qcowHeader, err error) {
	bad := func(what string, args ...any) (qcowHeader, error) {
		return qcowHeader{}, fmt.Errorf("%w: %s", errQCOW, fmt.Sprintf(what, args...))
	}
	if len(b) < qcowHeaderV2 || string(b[:4]) != qcowMagic {
		return bad("no whole header")
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(b[at:]) }
	version := u32(4)
	h = qcowHeader{bits: uint(u32(20)), l1Size: int64(u32(36)), zeroBit: version == 3}
	size, l1 := u64(24), u64(40)
	switch {
	case version != 2 && version != 3:
		return bad("version %d: there are 2 and 3", version)
	case version == 3 && len(b) < qcowHeaderV3:
		return bad("no whole header")
	case h.bits < minClusterBit || h.bits > maxClusterBit:
		return bad("clusters of 2^%d bytes", h.bits)
	case u32(32) != 0:
		return bad("it is encrypted")
	case h.l1Size > maxL1Entries:
		return bad("a level 1 table of %d entries", h.l1Size)
	case size > math.MaxInt64-1<<maxClusterBit || l1 > math.MaxInt64-maxL1Entries*8:
		return bad("sizes out of bounds")
	}
	h.size, h.l1 = int64(size), int64(l1)
	if version == 2 {
		return h, nil
	}
	switch features := u64(72); {
	case features&featureDataFile != 0:
		return bad("its content is in another file")
	case features&featureExtendedL2 != 0:
		return bad("it has subclusters (extended_l2)")
	case features&^(featureDirty|featureCorrupt|featureCompression) != 0:
		return bad("unknown features %#x", features)
	case features&featureCompression != 0:
		if u32(100) < qcowHeaderV3+1 || len(b) < qcowHeaderV3+1 {
			return bad("no type of compression in the header")
		}
		if b[qcowHeaderV3] > 1 {
			return bad("compression of type %d: there are 0 and 1", b[qcowHeaderV3])
		}
		h.zstd = b[qcowHeaderV3] == 1
	}
	return h, nil
}

// qcow reads a qcow2 image.
type qcow struct {
	qcowHeader
	f      *os.File
	length int64 // of the file

	mu       sync.Mutex
	level1   []byte // a part of the table
	first    int64  // its first entry
	tables   *cache // level 2, by their offset in the file
	clusters *cache // decompressed, by their descriptor
	packed   []byte // for what is read to be decompressed
	unpack   decompressor
	walked   int64 // bytes of clusters that nextData has led to
}

func newQCOW(f *os.File, length int64, h qcowHeader) *qcow {
	most := max(cacheBytes>>h.bits, 1)
	return &qcow{qcowHeader: h, f: f, length: length, tables: newCache(most), clusters: newCache(most), unpack: decompressor{isZstd: h.zstd}}
}

func (q *qcow) kind() formatKind { return formatQCOW2 }
func (q *qcow) size() int64      { return q.qcowHeader.size }

func (q *qcow) close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.unpack.close()
	return q.f.Close()
}

// place is where a cluster is in the file.
type place struct {
	data       bool // not zeros
	compressed bool
	off        int64
	length     int64 // of what is compressed, at most
}

// find looks up where a cluster is. The mutex is held.
func (q *qcow) find(cluster int64) (place, error) {
	table, err := q.level2(cluster >> (q.bits - 3))
	if err != nil || table == nil {
		return place{}, err
	}
	return q.place(table, cluster), nil
}

// place reads the entry of a cluster in its level 2 table.
func (q *qcow) place(table []byte, cluster int64) place {
	entry := binary.BigEndian.Uint64(table[cluster&(1<<(q.bits-3)-1)*8:])
	if entry&(1<<62) != 0 {
		// The more bits in a cluster, the more tell how long it is compressed.
		split := 62 - (q.bits - 8)
		off := int64(entry & (1<<split - 1))
		sectors := int64(entry&(1<<62-1)>>split) + 1
		return place{data: true, compressed: true, off: off, length: sectors*512 - off&511}
	}
	off := int64(entry & offsetMask)
	return place{data: off != 0 && !(q.zeroBit && entry&1 != 0), off: off, length: 1 << q.bits}
}

// level2 returns a level 2 table, nil when there is none. The mutex is held.
func (q *qcow) level2(i int64) ([]byte, error) {
	if i >= q.l1Size {
		return nil, nil
	}
	if i < q.first || i >= q.first+int64(len(q.level1)/8) {
		q.first, q.level1 = i/level1Part*level1Part, nil
		part := make([]byte, min(level1Part, q.l1Size-q.first)*8)
		if _, err := q.f.ReadAt(part, q.l1+q.first*8); err != nil {
			return nil, fmt.Errorf("%w: level 1 table: %w", errQCOW, whole(err))
		}
		q.level1 = part
	}
	off := binary.BigEndian.Uint64(q.level1[(i-q.first)*8:]) & offsetMask
	if off == 0 {
		return nil, nil
	}
	if t := q.tables.get(off); t != nil {
		return t, nil
	}
	t := q.tables.room(1 << q.bits)
	if _, err := q.f.ReadAt(t, int64(off)); err != nil {
		return nil, fmt.Errorf("%w: level 2 table: %w", errQCOW, whole(err))
	}
	q.tables.put(off, t)
	return t, nil
}

// whole makes the end of a file the error that it is where more is due.
func whole(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (q *qcow) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		inside := off & (1<<q.bits - 1)
		n := min(int64(len(p)), 1<<q.bits-inside)
		if err := q.readCluster(p[:n], off>>q.bits, inside); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (q *qcow) readCluster(p []byte, cluster, inside int64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	at, err := q.find(cluster)
	switch {
	case err != nil:
		return err
	case !at.data:
		clear(p)
		return nil
	case at.compressed:
		b, err := q.decompressed(at)
		if err != nil {
			return err
		}
		copy(p, b[inside:])
		return nil
	}
	n, err := q.f.ReadAt(p, at.off+inside)
	if err == io.EOF { // the last cluster need not be there as a whole
		clear(p[n:])
		return nil
	}
	return err
}

// nextData walks the tables. It is called by one goroutine, forwards.
func (q *qcow) nextData(ctx context.Context, off int64) (from, to int64, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	size := q.qcowHeader.size
	perTable := int64(1) << (q.bits - 3)
	clusters := (min(size, maxPages*compress.PageSize) + 1<<q.bits - 1) >> q.bits
	for c := off >> q.bits; c < clusters; {
		if ctx.Err() != nil {
			return 0, 0, context.Cause(ctx)
		}
		table, err := q.level2(c / perTable)
		if err != nil {
			return 0, 0, err
		}
		if c/perTable >= q.l1Size {
			break
		}
		end := min((c/perTable+1)*perTable, clusters)
		if table == nil {
			c = end
		}
		for ; c < end; c++ {
			at := q.place(table, c)
			if !at.data {
				continue
			}
			if q.walked += at.length; q.walked > 2*q.length {
				return 0, 0, errRepeated
			}
			return max(c<<q.bits, off), min((c+1)<<q.bits, size), nil
		}
	}
	return size, size, nil
}

// cache keeps a few buffers of one length, those that were used last.
type cache struct {
	most int
	list []cached // the last used at the end
}

type cached struct {
	key uint64
	b   []byte
}

func newCache(most int) *cache { return &cache{most: most} }

func (c *cache) get(key uint64) []byte {
	for i := len(c.list) - 1; i >= 0; i-- {
		if hit := c.list[i]; hit.key == key {
			copy(c.list[i:], c.list[i+1:])
			c.list[len(c.list)-1] = hit
			return hit.b
		}
	}
	return nil
}

// room returns a buffer to fill and put, that of the oldest when there are enough.
func (c *cache) room(n int) []byte {
	if len(c.list) < c.most {
		return make([]byte, n)
	}
	b := c.list[0].b
	c.list = append(c.list[:0], c.list[1:]...)
	return b
}

func (c *cache) put(key uint64, b []byte) { c.list = append(c.list, cached{key, b}) }
