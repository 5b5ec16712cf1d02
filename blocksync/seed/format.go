package seed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// formatKind is an image's format, as index files number it.
type formatKind uint32

const (
	formatRaw   formatKind = 1
	formatQCOW2 formatKind = 2
)

func (k formatKind) String() string {
	if k == formatQCOW2 {
		return "qcow2"
	}
	return "raw"
}

// format reads the content of an open image. readAt may be called from several
// goroutines at once.
type format interface {
	kind() formatKind
	size() int64
	// readAt reads len(p) bytes of content, all of them within size.
	readAt(p []byte, off int64) error
	// nextData returns the next stretch at or behind off that may be other than
	// zeros; at the end one that is empty and begins at size.
	nextData(ctx context.Context, off int64) (from, to int64, err error)
	close() error
}

// errNoImage is returned for what is neither a regular file nor a block device
// that is listed by itself.
var errNoImage = errors.New("neither a regular file nor a block device that is listed by its path")

// openFile opens an image's file and tells which it is. One that was found in a
// folder is not opened through a symbolic link that has come in its place.
func openFile(path string, listed bool) (*os.File, identity, error) {
	flags := unix.O_NONBLOCK // a FIFO must not make us wait
	if !listed {
		flags |= unix.O_NOFOLLOW
	}
	f, err := os.OpenFile(path, os.O_RDONLY|flags, 0)
	if err != nil {
		return nil, identity{}, fmt.Errorf("open image: %w", err)
	}
	info, err := f.Stat()
	if err == nil {
		var id identity
		if id, err = identify(info, listed); err == nil {
			if info.Mode()&fs.ModeDevice != 0 {
				id.size, err = f.Seek(0, io.SeekEnd)
			}
			if err == nil {
				return f, id, nil
			}
		}
	}
	return nil, identity{}, errors.Join(fmt.Errorf("open image: %w", err), f.Close())
}

// identify tells which file it is. The size of a block device is not known so.
func identify(info fs.FileInfo, listed bool) (identity, error) {
	device := info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() && !(device && listed) {
		return identity{}, errNoImage
	}
	return identity{inode: st.Ino, size: info.Size(), mtime: info.ModTime().UnixNano()}, nil
}

// openFormat opens an image in the format that it has. It closes f with it.
func openFormat(f *os.File, size int64) (format, error) {
	b := make([]byte, qcowHeaderMax)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return nil, errors.Join(fmt.Errorf("read image: %w", err), f.Close())
	}
	if n < 4 || string(b[:4]) != qcowMagic {
		return &raw{f, size}, nil
	}
	h, err := parseQCOW(b[:n])
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return newQCOW(f, size, h), nil
}

// raw is an image that is its content.
type raw struct {
	f      *os.File
	length int64
}

func (r *raw) kind() formatKind { return formatRaw }
func (r *raw) size() int64      { return r.length }
func (r *raw) close() error     { return r.f.Close() }

func (r *raw) readAt(p []byte, off int64) error {
	_, err := r.f.ReadAt(p, off)
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// nextData asks the file system. Where it does not know (a block device), all is data.
func (r *raw) nextData(_ context.Context, off int64) (from, to int64, err error) {
	fd := int(r.f.Fd())
	from, err = unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no more data, or the file has become shorter
		return r.length, r.length, nil
	case errors.Is(err, unix.EINVAL):
		return off, r.length, nil
	case err != nil:
		return 0, 0, err
	}
	if to, err = unix.Seek(fd, from, unix.SEEK_HOLE); err != nil {
		return r.length, r.length, nil // it became shorter
	}
	return min(from, r.length), min(to, r.length), nil
}
