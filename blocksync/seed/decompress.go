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
	if err := decompress(b, packed, q.zstd); err != nil {
		return nil, fmt.Errorf("%w: compressed cluster at %d: %w", errQCOW, at.off, err)
	}
	q.clusters.put(key, b)
	return b, nil
}

// decompress fills dst; bytes behind what that takes are of no interest. The
// decompressors are others' and the bytes a guest's: a panic is an error.
func decompress(dst, packed []byte, isZstd bool) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("decompress: %v", r)
		}
	}()
	if !isZstd {
		r := flate.NewReader(bytes.NewReader(packed))
		_, err = io.ReadFull(r, dst)
		return err
	}
	r, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxWindow))
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.ReadFull(r, dst)
	return err
}

// maxWindow bounds what a zstd frame makes the decoder keep. A frame of a cluster has no more.
const maxWindow = 8 << 20
