package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/compress"
	"github.com/wanmig/wanmig/handoff"
)

// memoryFormat is that of a handoff.Copy of a guest's memory: its pages, each at
// its place, the last that was sent of it. What it is of is not looked at: it is
// content that a move back may find something in.
const memoryFormat = "memory"

// memoryPath is where the memory of a guest is kept that has left.
func (e *Engine) memoryPath(uuid string) string { return filepath.Join(e.CopyDir, uuid+".ram") }

// memoryWriter keeps the pages of a guest that leaves. A move does not fail for it.
type memoryWriter struct {
	f   *os.File
	err error // why it is not complete
}

// keepMemory makes the file for a guest's memory; what was there is older.
func (e *Engine) keepMemory(uuid string) (*memoryWriter, error) {
	if err := os.MkdirAll(e.CopyDir, 0o700); err != nil {
		return nil, fmt.Errorf("keep the guest's memory: %w", err)
	}
	path := e.memoryPath(uuid)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("keep the guest's memory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("keep the guest's memory: %w", err)
	}
	return &memoryWriter{f: f}, nil
}

// page keeps a page.
func (m *memoryWriter) page(n uint64, content []byte) {
	if m.err == nil {
		_, m.err = m.f.WriteAt(content, int64(n)*compress.PageSize)
	}
}

// close ends it, when no page comes any more. A file that is not complete goes.
func (m *memoryWriter) close() error {
	err := errors.Join(m.err, m.f.Close())
	if err != nil {
		err = fmt.Errorf("the guest's memory is not kept: %w", errors.Join(err, os.Remove(m.f.Name())))
	}
	return err
}

// dropMemory removes the memory of a guest that stayed, or is back.
func (e *Engine) dropMemory(uuid string) {
	path := e.memoryPath(uuid)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		e.Log.Error("a copy of a guest's memory is not removed", "error", err)
		return
	}
	if err := e.Journal.DropCopy(path); err != nil {
		e.Log.Error("a copy of a guest's memory is not forgotten", "error", err)
	}
}

// dropStrayMemory removes what an agent that was killed left of memory that
// belongs to no copy and no move.
func (e *Engine) dropStrayMemory(entries []handoff.Entry) {
	known := map[string]bool{}
	for _, entry := range entries {
		known[e.memoryPath(entry.UUID)] = !entry.State.Final() || known[e.memoryPath(entry.UUID)]
	}
	all, err := e.Journal.Copies()
	if err != nil {
		e.Log.Error("copies of disks not known", "error", err)
		return
	}
	for _, c := range all {
		known[c.Path] = true
	}
	list, err := filepath.Glob(filepath.Join(e.CopyDir, "*.ram"))
	if err != nil {
		e.Log.Error("copies of memory not known", "error", err)
	}
	for _, path := range list {
		if !known[path] {
			if err := os.Remove(path); err != nil {
				e.Log.Error("a copy of a guest's memory is not removed", "error", err)
			}
		}
	}
}

// memorySeed is the memory that a guest had when it left, in which an index is
// made while the guest's disks arrive.
type memorySeed struct {
	f     *os.File
	size  int64
	index *compress.Index
	done  sync.WaitGroup
	stop  atomic.Bool
}

// openMemory opens the memory that is kept of a guest; nil if there is none.
func (e *Engine) openMemory(uuid string) (*memorySeed, error) {
	all, err := e.Journal.Copies()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(c handoff.Copy) bool { return c.UUID == uuid && c.Format == memoryFormat })
	if i < 0 || !unchanged(all[i]) {
		return nil, nil
	}
	f, err := os.Open(all[i].Path)
	if err != nil {
		return nil, err
	}
	now := all[i]
	allocated, err := identify(&now)
	m := &memorySeed{f: f, size: all[i].Length}
	if err == nil {
		m.index, err = compress.NewIndex(allocated / compress.PageSize)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	m.done.Go(m.fill)
	return m, nil
}

// fill indexes the pages. What can't be read is not found.
func (m *memorySeed) fill() {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < m.size; {
		data, err := unix.Seek(int(m.f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, syscall.ENXIO) {
			return // nothing but holes
		}
		if err == nil {
			off = data
		}
		n, err := m.f.ReadAt(buf, off)
		if err != nil && err != io.EOF || m.stop.Load() {
			return
		}
		for at := 0; at+compress.PageSize <= n; at += compress.PageSize {
			m.index.Put(compress.Sum(buf[at:at+compress.PageSize]), compress.Place((off+int64(at))/compress.PageSize))
		}
		off += int64(n)
	}
}

func (m *memorySeed) Size() int64 { return m.size }

func (m *memorySeed) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := m.f.ReadAt(p, off)
	return err
}

func (m *memorySeed) Find(f compress.Fingerprint) (page int64, ok bool) {
	at, ok := m.index.Get(f)
	return int64(at), ok
}

func (m *memorySeed) Close() error {
	m.stop.Store(true)
	m.done.Wait()
	return errors.Join(m.index.Close(), m.f.Close())
}
