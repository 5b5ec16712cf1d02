package main

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// maxErrors is how many errors of one kind are described; the rest are counted.
const maxErrors = 8

// faults counts errors and keeps the first few descriptions.
type faults struct {
	count int64
	first []string
}

func (f *faults) add(format string, args ...any) {
	f.count++
	if len(f.first) < maxErrors {
		f.first = append(f.first, fmt.Sprintf(format, args...))
	}
}

func (f *faults) list() []string { return append([]string(nil), f.first...) }

// memory is a buffer of pages that describe themselves, and a table outside of it that says what each must hold.
type memory struct {
	seed uint64

	mu         sync.Mutex
	words      []uint64
	generation []uint64 // by page; 0 for a page not yet written
	edited     []bool   // by page: it is an edited page
	bad        map[int]bool
	filled     int // pages written at least once: a prefix
	active     int // pages of the working set, the ones rewritten; at most filled
	random     uint64
	cursor     int
	nextEdit   int
	dirtied    int64
	verified   int64
	faults     faults
}

const wordsPerPage = api.PageSize / 8

// newMemory reserves address space for the whole pages in limit bytes; they take memory when the working set reaches them.
func newMemory(limit int64, seed uint64) (*memory, error) {
	limit -= limit % api.PageSize
	b, err := unix.Mmap(-1, 0, int(limit), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes: %w", limit, err)
	}
	return &memory{
		seed:       seed,
		words:      api.Words(b),
		generation: make([]uint64, limit/api.PageSize),
		edited:     make([]bool, limit/api.PageSize),
		bad:        make(map[int]bool),
		random:     seed | 1,
	}, nil
}

func (m *memory) page(n int) []uint64 { return m.words[n*wordsPerPage : (n+1)*wordsPerPage] }

func (m *memory) cell(n int) api.Cell {
	kind := api.PageCell
	if m.edited[n] {
		kind = api.EditCell
	}
	return api.Cell{Kind: kind, Index: uint64(n), Generation: m.generation[n], Seed: m.seed}
}

// setWorkingSet makes the first size bytes the working set, or all if size is more than there is, and returns its size.
func (m *memory) setWorkingSet(size int64) int64 {
	pages := int(min(max(size/api.PageSize, 1), int64(len(m.generation))))
	for filled := false; !filled; {
		// The lock is held for a page at a time, so that growing does not hold up the rest.
		m.mu.Lock()
		if m.filled < pages {
			m.rewrite(m.filled)
			m.filled++
		}
		if filled = m.filled >= pages; filled {
			m.active = pages
		}
		m.mu.Unlock()
	}
	return int64(pages) * api.PageSize
}

// rewrite gives page n its next generation.
func (m *memory) rewrite(n int) {
	m.generation[n]++
	m.cell(n).Fill(m.page(n))
	delete(m.bad, n)
}

// check verifies page n; a page found bad is counted once, until it is rewritten.
func (m *memory) check(n int) bool {
	m.verified++
	if m.cell(n).Matches(m.page(n)) {
		return true
	}
	if !m.bad[n] {
		m.bad[n] = true
		m.faults.add("page %s", m.cell(n).Diagnose(m.page(n)))
	}
	return false
}

// dirty rewrites a page of the working set picked at random, having checked what it held.
func (m *memory) dirty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.random ^= m.random << 13
	m.random ^= m.random >> 7
	m.random ^= m.random << 17
	n := int(m.random % uint64(m.active))
	m.check(n)
	m.edited[n] = false
	m.rewrite(n)
	m.dirtied++
}

// edit changes a few words of the next page of a walk over the working set without end, having checked what it held. All
// of a page changes the first time.
func (m *memory) edit() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.nextEdit >= m.active {
		m.nextEdit = 0
	}
	m.check(m.nextEdit)
	m.edited[m.nextEdit] = true
	m.rewrite(m.nextEdit)
	m.nextEdit++
	m.dirtied++
}

// verifyNext checks the next page of a walk over all pages without end.
func (m *memory) verifyNext() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cursor >= m.filled {
		m.cursor = 0
	}
	m.check(m.cursor)
	m.cursor++
}

// verifyAll checks every page and returns how many there were and how many were bad.
func (m *memory) verifyAll() (pages, bad int64) {
	for n := 0; ; n++ {
		m.mu.Lock()
		if n >= m.filled {
			m.mu.Unlock()
			return pages, bad
		}
		pages++
		if !m.check(n) {
			bad++
		}
		m.mu.Unlock()
	}
}

func (m *memory) report() api.MemoryReport {
	m.mu.Lock()
	defer m.mu.Unlock()
	return api.MemoryReport{
		BufferBytes:   int64(m.filled) * api.PageSize,
		DirtiedPages:  m.dirtied,
		VerifiedPages: m.verified,
		Errors:        m.faults.count,
		FirstErrors:   m.faults.list(),
	}
}
