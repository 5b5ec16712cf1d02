package seed

import (
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// decompressed returns the content of a compressed cluster. The mutex is held.
func (q *qcow) decompressed(at place) ([]byte, error) {
	key := uint64(at.off) // no other cluster begins there, unless the image has changed
	if b := q.clusters.get(key); b != nil {
		return b, nil
	}
	if at.off >= q.length {
		return nil, fmt.Errorf("%w: compressed cluster at %d: behind the end of the file", errQCOW, at.off)
	}
	n := int(min(at.length, q.length-at.off))
	if cap(q.packed) < n {
		q.packed = make([]byte, n)
	}
	packed := q.packed[:n]
	if _, err := q.f.ReadAt(packed, at.off); err != nil {
		return nil, fmt.Errorf("%w: compressed cluster at %d: %w", errQCOW, at.off, whole(err))
	}
	b := q.clusters.room(1 << q.bits)
	if err := q.unpack.decompress(b, packed); err != nil {
		return nil, fmt.Errorf("%w: compressed cluster at %d: %w", errQCOW, at.off, err)
	}
	q.clusters.put(key, b)
	return b, nil
}

// decompressor undoes the compression of clusters, one after the other.
type decompressor struct {
	isZstd  bool
	zstd    *zstd.Decoder
	inflate io.ReadCloser
}

// decompress fills dst; bytes behind what that takes are of no interest. The
// libraries are others' and the bytes a guest's: a panic is an error.
func (d *decompressor) decompress(dst, packed []byte) (err error) {
	defer func() {
		if r := recover(); r != nil {
			d.zstd, d.inflate = nil, nil
			err = fmt.Errorf("decompress: %v", r)
		}
	}()
	r, err := d.reader(bytes.NewReader(packed))
	if err != nil {
		return err
	}
	_, err = io.ReadFull(r, dst)
	return err
}

func (d *decompressor) reader(packed io.Reader) (r io.Reader, err error) {
	switch {
	case !d.isZstd && d.inflate == nil:
		d.inflate = flate.NewReader(packed)
	case !d.isZstd:
		err = d.inflate.(flate.Resetter).Reset(packed, nil)
	case d.zstd == nil:
		d.zstd, err = zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxWindow))
	default:
		err = d.zstd.Reset(packed)
	}
	if d.isZstd {
		return d.zstd, err
	}
	return d.inflate, err
}

func (d *decompressor) close() {
	if d.zstd != nil {
		d.zstd.Close()
	}
}

// maxWindow bounds what a zstd frame makes the decoder keep. A frame of a cluster has no more.
const maxWindow = 8 << 20
