package seed

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/compress"
)

const (
	magic      = "wmigseed"
	version    = 1
	headerSize = 4096
	entrySize  = 8 + 4 // tag, page
	maxPath    = headerSize - 72 - 4
	maxPages   = 1<<32 - 1 // that an entry can tell, and starts count
)

// errIndex is returned when a file is not a whole index file of this version.
var errIndex = errors.New("not a whole index file")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// identity tells whether an image's file is the one that was indexed. The number of
// its file system is no part of it: some have another one after each mount.
type identity struct {
	inode uint64
	size  int64
	mtime int64 // ns since 1970
}

// header is what an index file says of its image.
type header struct {
	path    string
	format  formatKind
	file    identity
	size    int64 // of the content
	indexed time.Time
	count   int64  // of entries
	sum     uint32 // CRC-32C of the entries
}

func (h header) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], uint32(h.format))
	binary.LittleEndian.PutUint64(b[16:], h.file.inode)
	binary.LittleEndian.PutUint64(b[24:], uint64(h.file.size))
	binary.LittleEndian.PutUint64(b[32:], uint64(h.file.mtime))
	binary.LittleEndian.PutUint64(b[40:], uint64(h.size))
	binary.LittleEndian.PutUint64(b[48:], uint64(h.indexed.UnixNano()))
	binary.LittleEndian.PutUint64(b[56:], uint64(h.count))
	binary.LittleEndian.PutUint32(b[64:], h.sum)
	binary.LittleEndian.PutUint32(b[68:], uint32(len(h.path)))
	copy(b[72:], h.path)
	binary.LittleEndian.PutUint32(b[headerSize-4:], checksum(b[:headerSize-4]))
	return b
}

func parseHeader(b []byte) (h header, err error) {
	bad := func(what string) (header, error) { return header{}, fmt.Errorf("%w: %s", errIndex, what) }
	switch {
	case len(b) < headerSize:
		return bad("shorter than its header")
	case string(b[:8]) != magic:
		return bad("another begin")
	case binary.LittleEndian.Uint32(b[8:]) != version:
		return bad("another version")
	case binary.LittleEndian.Uint32(b[headerSize-4:]) != checksum(b[:headerSize-4]):
		return bad("wrong checksum of the header")
	}
	h = header{
		format: formatKind(binary.LittleEndian.Uint32(b[12:])),
		file: identity{
			inode: binary.LittleEndian.Uint64(b[16:]),
			size:  int64(binary.LittleEndian.Uint64(b[24:])),
			mtime: int64(binary.LittleEndian.Uint64(b[32:])),
		},
		size:    int64(binary.LittleEndian.Uint64(b[40:])),
		indexed: time.Unix(0, int64(binary.LittleEndian.Uint64(b[48:]))),
		count:   int64(binary.LittleEndian.Uint64(b[56:])),
		sum:     binary.LittleEndian.Uint32(b[64:]),
	}
	n := binary.LittleEndian.Uint32(b[68:])
	switch {
	case n > maxPath:
		return bad("path too long")
	case h.format != formatRaw && h.format != formatQCOW2:
		return bad("unknown format")
	case h.size < 0 || h.count < 0 || h.count > min(h.size/compress.PageSize, maxPages):
		return bad("size out of bounds")
	case len(bytes.Trim(b[72+n:headerSize-4], "\x00")) != 0:
		return bad("bytes after the path")
	}
	h.path = string(b[72 : 72+n])
	return h, nil
}

// tagOf is the part of a fingerprint that an index keeps.
func tagOf(f compress.Fingerprint) uint64 { return binary.BigEndian.Uint64(f[:8]) }

// index is an index file, mapped. It lives until nobody uses it any more.
type index struct {
	header
	entries []byte
	shift   uint     // of a tag, what remains being its place in starts
	starts  []uint32 // the first entry whose tag begins so, and the end

	mu     sync.Mutex
	users  int
	mapped []byte
}

// openIndex maps an index file and checks all of it. The caller is its first user.
func openIndex(path string) (*index, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	if size := info.Size(); size < headerSize || size > headerSize+maxPages*entrySize {
		return nil, fmt.Errorf("%w: it has %d bytes", errIndex, size)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map index: %w", err)
	}
	x, err := parseIndex(b)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(b))
	}
	return x, nil
}

// parseIndex checks all of an index file and makes the table of its tags' begins.
func parseIndex(b []byte) (_ *index, err error) {
	defer faulted(debug.SetPanicOnFault(true), &err)
	h, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	x := &index{header: h, entries: b[headerSize:], users: 1, mapped: b}
	if int64(len(x.entries)) != h.count*entrySize {
		return nil, fmt.Errorf("%w: %d bytes for %d entries", errIndex, len(x.entries), h.count)
	}
	if checksum(x.entries) != h.sum {
		return nil, fmt.Errorf("%w: wrong checksum of the entries", errIndex)
	}
	begins := max(bits.Len64(uint64(h.count)/64), 1) // one for some 64 entries
	x.shift = uint(64 - begins)
	x.starts = make([]uint32, 0, 1<<begins+1)
	var last uint64
	for i := range int(h.count) {
		tag, page := x.at(i)
		if i > 0 && tag <= last || page >= h.size/compress.PageSize {
			return nil, fmt.Errorf("%w: entry %d is out of place", errIndex, i)
		}
		for len(x.starts) <= int(tag>>x.shift) {
			x.starts = append(x.starts, uint32(i))
		}
		last = tag
	}
	for len(x.starts) < cap(x.starts) {
		x.starts = append(x.starts, uint32(h.count))
	}
	return x, nil
}

func (x *index) at(i int) (tag uint64, page int64) {
	e := x.entries[i*entrySize:][:entrySize]
	return binary.LittleEndian.Uint64(e), int64(binary.LittleEndian.Uint32(e[8:]))
}

// find tells where a page may be.
func (x *index) find(f compress.Fingerprint) (page int64, ok bool) {
	var err error // what can't be read is not found
	defer faulted(debug.SetPanicOnFault(true), &err)
	tag := tagOf(f)
	begin := int(tag >> x.shift)
	from, to := int(x.starts[begin]), int(x.starts[begin+1])
	for from < to {
		mid := (from + to) / 2
		switch there, page := x.at(mid); {
		case there == tag:
			return page, true
		case there < tag:
			from = mid + 1
		default:
			to = mid
		}
	}
	return 0, false
}

// faulted ends what reads the mapped file: a page of it that can't be read, on a
// bad sector, is an error and not the end of the agent.
func faulted(before bool, err *error) {
	debug.SetPanicOnFault(before)
	if r := recover(); r != nil {
		fault, ok := r.(interface{ Addr() uintptr })
		if !ok {
			panic(r)
		}
		*err = fmt.Errorf("read index: fault at %#x", fault.Addr())
	}
}

// retain takes another user in; false says that the last one has gone.
func (x *index) retain() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.users == 0 {
		return false
	}
	x.users++
	return true
}

// release ends a use; the last one gives the memory back.
func (x *index) release() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.users--
	if x.users > 0 {
		return nil
	}
	return unix.Munmap(x.mapped)
}
