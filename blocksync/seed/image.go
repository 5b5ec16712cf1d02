package seed

import (
	"context"
	"errors"
	"sync"

	"github.com/wanmig/wanmig/compress"
)

// errClosed is returned when an image is used after its Close.
var errClosed = errors.New("the seed image is closed")

// Image is an indexed image, open for one move. It is safe for concurrent use. Its
// file is opened when something is read for the first time: of many images few are.
type Image struct {
	path   string
	listed bool
	index  *index
	gone   func() // tells the library of the end

	mu     sync.RWMutex
	closed bool

	open    sync.Once
	content format
	err     error // why the file can't be read
}

// Path is where the image is.
func (m *Image) Path() string { return m.path }

// Size is the length of the content, in bytes, when it was indexed.
func (m *Image) Size() int64 { return m.index.size }

// Find tells where a page may be. It may have been there only when the image was
// indexed, or another page have a fingerprint that begins alike.
func (m *Image) Find(f compress.Fingerprint) (page int64, ok bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return 0, false
	}
	return m.index.find(f)
}

// ReadAt reads content as it is now.
func (m *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return errClosed
	}
	m.open.Do(func() {
		f, id, err := openFile(m.path, m.listed)
		if err == nil {
			m.content, err = openFormat(f, id.size)
		}
		m.err = err
	})
	if m.err != nil {
		return m.err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if size := m.content.size(); off < 0 || off > size || int64(len(p)) > size-off {
		return errOutside
	}
	return m.content.readAt(p, off)
}

// errOutside is returned when a read goes beyond the end of an image.
var errOutside = errors.New("beyond the end of the seed image")

// Close gives the image free.
func (m *Image) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	m.gone()
	err := m.index.release()
	if m.content != nil {
		err = errors.Join(err, m.content.close())
	}
	return err
}
