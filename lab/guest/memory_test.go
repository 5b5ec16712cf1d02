package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/lab/guest/api"
)

func testMemory(t *testing.T, pages int) *memory {
	t.Helper()
	m, err := newMemory(int64(pages)*api.PageSize+123, 42)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.setWorkingSet(1 << 40); got != int64(pages)*api.PageSize {
		t.Fatalf("the working set has %d bytes, want %d pages", got, pages)
	}
	return m
}

func TestMemoryUnderLoadHasNoErrors(t *testing.T) {
	m := testMemory(t, 64)
	for range 1000 {
		m.dirty()
		m.edit()
		m.verifyNext()
	}
	if pages, bad := m.verifyAll(); pages != 64 || bad != 0 {
		t.Errorf("%d of %d pages are bad", bad, pages)
	}
	if r := m.report(); r.Errors != 0 || r.DirtiedPages != 2000 || r.VerifiedPages != 3064 || r.BufferBytes != 64*api.PageSize {
		t.Errorf("report %+v", r)
	}
}

func TestMemoryFindsWhatIsWrong(t *testing.T) {
	for _, test := range []struct {
		name   string
		breaks func(m *memory)
		bad    int64
		want   string
	}{
		{"a corrupted byte", func(m *memory) { m.page(5)[77] ^= 1 << 40 }, 1, "page 5: generation 1 damaged in 1 of 4096 bytes, first at offset 621:"},
		{"a stale generation", func(m *memory) {
			old := slices.Clone(m.page(9))
			m.rewrite(9)
			copy(m.page(9), old)
		}, 1, "page 9: expected generation 2, holds the stale generation 1"},
		{"swapped pages", func(m *memory) {
			one := slices.Clone(m.page(3))
			copy(m.page(3), m.page(4))
			copy(m.page(4), one)
		}, 2, "page 3: expected generation 1, holds 4 of generation 1"},
		{"a zeroed page", func(m *memory) { clear(m.page(0)) }, 1, "page 0: generation 1 damaged in "},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := testMemory(t, 16)
			test.breaks(m)
			for range 2 {
				if _, bad := m.verifyAll(); bad != test.bad {
					t.Errorf("%d pages are bad, want %d", bad, test.bad)
				}
			}
			r := m.report()
			if r.Errors != test.bad {
				t.Errorf("%d errors after two passes, want %d: each counts once", r.Errors, test.bad)
			}
			if len(r.FirstErrors) == 0 || !strings.HasPrefix(r.FirstErrors[0], test.want) {
				t.Errorf("described as %q, want %q", r.FirstErrors, test.want)
			}
			for range 1000 {
				m.dirty()
			}
			if _, bad := m.verifyAll(); bad != 0 {
				t.Errorf("%d pages are bad after all were rewritten", bad)
			}
			if got := m.report().Errors; got != test.bad {
				t.Errorf("%d errors after rewriting, want the %d from before", got, test.bad)
			}
		})
	}
}

func TestDirtyingChecksFirst(t *testing.T) {
	m := testMemory(t, 1)
	m.page(0)[8]++
	m.dirty()
	if got := m.report().Errors; got != 1 {
		t.Errorf("%d errors, want 1", got)
	}
}

func TestErrorsAreDescribedUpToALimit(t *testing.T) {
	m := testMemory(t, 100)
	for n := range 100 {
		m.page(n)[10]++
	}
	m.verifyAll()
	if r := m.report(); r.Errors != 100 || len(r.FirstErrors) != maxErrors {
		t.Errorf("%d errors with %d descriptions, want 100 with %d", r.Errors, len(r.FirstErrors), maxErrors)
	}
}

func TestShrunkWorkingSetStaysVerified(t *testing.T) {
	m := testMemory(t, 16)
	m.setWorkingSet(4 * api.PageSize)
	for range 100 {
		m.dirty()
	}
	for n := 4; n < 16; n++ {
		if m.generation[n] != 1 {
			t.Errorf("page %d outside of the working set was rewritten", n)
		}
	}
	m.page(15)[20]++
	if pages, bad := m.verifyAll(); pages != 16 || bad != 1 {
		t.Errorf("%d of %d pages are bad, want 1 of 16", bad, pages)
	}
}
