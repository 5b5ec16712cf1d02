package migrate

import (
	"context"
	"fmt"
	"os"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/blocksync/nbd"
)

// staticSize is the size of an image that is carried as a file.
func staticSize(path string) (int64, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return 0, err
	case !info.Mode().IsRegular():
		return 0, fmt.Errorf("%s is no file: eject it, or leave --copy-cdrom away", path)
	case info.Size() == 0 || info.Size()%512 != 0:
		return 0, fmt.Errorf("%s has %d bytes, which is no number of sectors: leave --copy-cdrom away", path, info.Size())
	}
	return info.Size(), nil
}

// copyStatic puts an image that does not change, a CD-ROM, into an outbox.
func copyStatic(ctx context.Context, path string, to *blocksync.Outbox) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < to.Size(); off += int64(len(buf)) {
		n := min(int64(len(buf)), to.Size()-off)
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if err := to.WriteAt(ctx, buf[:n], off, false); err != nil {
			return err
		}
	}
	to.Seal()
	return nil
}

// staticFile is the destination's side of copyStatic: a file that is filled
// before the guest runs.
type staticFile struct {
	*os.File
	size int64
}

func openStatic(path string) (*staticFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &staticFile{f, info.Size()}, nil
}

func (f *staticFile) Size() int64 { return f.size }

func (f *staticFile) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := f.File.ReadAt(p, off)
	return err
}

func (f *staticFile) WriteAt(_ context.Context, p []byte, off int64, fua bool) error {
	if _, err := f.File.WriteAt(p, off); err != nil {
		return err
	}
	if fua {
		return f.Sync()
	}
	return nil
}

// Zero does nothing: the file was made empty, and each part is written once.
func (f *staticFile) Zero(context.Context, int64, int64, nbd.ZeroFlags) error { return nil }

// Trim does nothing, for the same reason.
func (f *staticFile) Trim(context.Context, int64, int64, bool) error { return nil }

func (f *staticFile) Flush(context.Context) error { return f.Sync() }
