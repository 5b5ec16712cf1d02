package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/blocksync/nbd"
)

// sourceImage opens a disk of the guest here, to be compared with its copy. A
// raw one is read as it is: what QEMU has written is seen at once.
func (s *source) sourceImage(d wireDisk) func(context.Context) (blocksync.Image, error) {
	path := s.plan.source[d.Target]
	return func(ctx context.Context) (blocksync.Image, error) {
		if d.Format == "raw" && !s.backed(d.Target) {
			return openRaw(path)
		}
		conn, stop, err := s.Host.ServeImage(ctx, path, d.Format)
		if err != nil {
			return nil, err
		}
		client, err := nbd.NewClient(ctx, conn, "")
		if err != nil {
			return nil, errors.Join(fmt.Errorf("read image %s: %w", path, err), conn.Close(), stop())
		}
		return &servedImage{client, stop}, nil
	}
}

// backed reports whether a disk stands on another image.
func (s *source) backed(target string) bool {
	for _, d := range s.dom.Disks {
		if d.Target == target {
			return d.HasBacking
		}
	}
	return false
}

// servedImage is one that qemu-nbd reads.
type servedImage struct {
	*nbd.Client
	stop func() error
}

func (i *servedImage) Close() error {
	return errors.Join(i.Client.Close(), i.stop())
}

// rawImage is a raw file or device.
type rawImage struct {
	*os.File
	size int64
}

func openRaw(path string) (*rawImage, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &rawImage{f, size}, nil
}

func (i *rawImage) Size() int64 { return i.size }

func (i *rawImage) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := i.File.ReadAt(p, off)
	return err
}

// BlockStatus tells where the file has a hole, at off or from there on.
func (i *rawImage) BlockStatus(_ context.Context, off, n int64) ([]nbd.Extent, error) {
	data, err := unix.Seek(int(i.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, syscall.ENXIO): // none to the end
		data = off + n
	case err != nil: // no file system that can tell
		data = off
	}
	if data = min(data, off+n); data > off {
		return []nbd.Extent{{Offset: off, Length: data - off, Hole: true, Zero: true}}, nil
	}
	return []nbd.Extent{{Offset: off, Length: n}}, nil
}
