package nbd

import (
	"context"
	"fmt"
	"math"
	"math/bits"
)

// Device is a disk: Size bytes, addressed in bytes. The server calls its methods concurrently,
// with ranges inside the disk that are not empty. Errors that wrap a syscall.Errno (ENOSPC,
// EIO, EINVAL, EPERM, ENOTSUP, ESHUTDOWN) reach a client as that error, others as EIO.
//
// A device may also have any of these methods:
//
//	BlockStatus(ctx context.Context, off, n int64) ([]Extent, error)
//	    tells what is allocated, beginning at off: consecutive extents, at least one, at
//	    most to off+n; they may end earlier. Without it, base:allocation is not offered.
//	BlockSizes() (min, preferred, max uint32)
//	    gives the bounds of a request in bytes. min is a power of two up to 64 KiB, and
//	    divides the offset and length of every request; preferred is a power of two from
//	    512; max, a multiple of min up to 32 MiB, bounds reads and writes.
//	    Without it they are 1, 4096 and 32 MiB.
//	MultiConn() bool
//	    tells whether a flush on one connection also covers writes answered on others.
//	    Without it, that is not promised.
type Device interface {
	// Size gives the size in bytes; it does not change.
	Size() int64
	// ReadAt fills p from offset off.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes p at offset off; with fua, durably before it returns. p is the
	// caller's again once WriteAt returns.
	WriteAt(ctx context.Context, p []byte, off int64, fua bool) error
	// Zero makes n bytes at offset off read as zeros.
	Zero(ctx context.Context, off, n int64, f ZeroFlags) error
	// Trim says that the content of n bytes at offset off is no longer wanted. What they
	// read as afterwards is open.
	Trim(ctx context.Context, off, n int64, fua bool) error
	// Flush makes durable every write, zeroing and trim that returned before.
	Flush(ctx context.Context) error
}

// ZeroFlags qualify a Zero.
type ZeroFlags struct {
	FUA    bool // durable before Zero returns
	NoHole bool // the range stays allocated, so that a later write to it finds space
}

// Extent is a part of a disk with one allocation state. A zero state is always true:
// allocated, content unknown.
type Extent struct {
	Offset, Length int64
	Hole           bool // not allocated
	Zero           bool // reads as zeros
}

type blockStatuser interface {
	BlockStatus(ctx context.Context, off, n int64) ([]Extent, error)
}

type blockSizer interface {
	BlockSizes() (min, preferred, max uint32)
}

type multiConner interface {
	MultiConn() bool
}

// blockSizes are the bounds of requests, in bytes.
type blockSizes struct{ min, preferred, max uint32 }

var defaultBlockSizes = blockSizes{min: 1, preferred: 4096, max: maxData}

// check holds what a device or a server says against the protocol's bounds.
func (s blockSizes) check() error {
	switch {
	case bits.OnesCount32(s.min) != 1 || s.min > maxMinBlock:
		return fmt.Errorf("minimum block size %d is not a power of two from 1 to %d", s.min, maxMinBlock)
	case bits.OnesCount32(s.preferred) != 1 || s.preferred < max(s.min, 512):
		return fmt.Errorf("preferred block size %d is not a power of two from %d", s.preferred, max(s.min, 512))
	case s.max < s.min:
		return fmt.Errorf("maximum block size %d is below the minimum of %d", s.max, s.min)
	case s.max%s.min != 0 && s.max != math.MaxUint32:
		return fmt.Errorf("maximum block size %d is not a multiple of the minimum of %d", s.max, s.min)
	}
	return nil
}
