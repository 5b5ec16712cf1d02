package nbd

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

func TestRequestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := request{
			flags:  rapid.Uint16().Draw(t, "flags"),
			cmd:    command(rapid.Uint16().Draw(t, "cmd")),
			cookie: rapid.Uint64().Draw(t, "cookie"),
			offset: rapid.Uint64().Draw(t, "offset"),
			length: rapid.Uint32().Draw(t, "length"),
		}
		got, err := parseRequest((*[requestSize]byte)(want.append(nil)))
		if err != nil || got != want {
			t.Fatalf("parsed %+v, %v; want %+v", got, err, want)
		}
	})
}

func TestOptionDataRoundTrip(t *testing.T) {
	text := rapid.StringN(0, 50, 200).Filter(func(s string) bool { return checkName(s) == nil })
	rapid.Check(t, func(t *rapid.T) {
		name := text.Draw(t, "name")
		infos := rapid.SliceOfN(rapid.Uint16(), 0, 20).Draw(t, "infos")
		gotName, gotInfos, err := parseGo(appendGo(nil, name, infos...))
		if err != nil || gotName != name || len(infos)+len(gotInfos) > 0 && !reflect.DeepEqual(gotInfos, infos) {
			t.Fatalf("parsed %q, %v, %v; want %q, %v", gotName, gotInfos, err, name, infos)
		}
		queries := rapid.SliceOfN(text, 0, 10).Draw(t, "queries")
		gotName, gotQueries, err := parseMetaContext(appendMetaContext(nil, name, queries...))
		if err != nil || gotName != name || len(queries)+len(gotQueries) > 0 && !reflect.DeepEqual(gotQueries, queries) {
			t.Fatalf("parsed %q, %q, %v; want %q, %q", gotName, gotQueries, err, name, queries)
		}
	})
}

func TestOptionDataPrefixes(t *testing.T) {
	whole := appendGo(nil, "disk", infoExport, infoName, infoBlockSize)
	for n := range whole {
		if _, _, err := parseGo(whole[:n]); !errors.Is(err, ErrProtocol) {
			t.Errorf("GO cut to %d bytes: %v", n, err)
		}
	}
	if _, _, err := parseGo(append(whole, 0)); !errors.Is(err, ErrProtocol) {
		t.Errorf("GO with a byte too many: %v", err)
	}
	whole = appendMetaContext(nil, "disk", contextAllocation, "x-test:y")
	for n := range whole {
		if _, _, err := parseMetaContext(whole[:n]); !errors.Is(err, ErrProtocol) {
			t.Errorf("META_CONTEXT cut to %d bytes: %v", n, err)
		}
	}
	if _, _, err := parseMetaContext(append(whole, 0)); !errors.Is(err, ErrProtocol) {
		t.Errorf("META_CONTEXT with a byte too many: %v", err)
	}
}

func TestNames(t *testing.T) {
	for name, good := range map[string]bool{
		"":                        true,
		"drive-virtio-disk0":      true,
		"Größe":                   true,
		"a\x00b":                  false,
		"\xff":                    false,
		strings.Repeat("a", 4096): true,
		strings.Repeat("a", 4097): false,
	} {
		if err := checkName(name); (err == nil) != good {
			t.Errorf("name %.20q: %v", name, err)
		}
	}
}

func TestErrorCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		code uint32
		back syscall.Errno
	}{
		{syscall.EPERM, 1, syscall.EPERM},
		{syscall.EROFS, 1, syscall.EPERM},
		{syscall.EACCES, 1, syscall.EPERM},
		{syscall.EIO, 5, syscall.EIO},
		{errors.New("anything"), 5, syscall.EIO},
		{context.DeadlineExceeded, 5, syscall.EIO},
		{syscall.ENOMEM, 12, syscall.ENOMEM},
		{syscall.EINVAL, 22, syscall.EINVAL},
		{syscall.ENOSPC, 28, syscall.ENOSPC},
		{syscall.EDQUOT, 28, syscall.ENOSPC},
		{syscall.EFBIG, 28, syscall.ENOSPC},
		{syscall.EOVERFLOW, 75, syscall.EOVERFLOW},
		{syscall.ENOTSUP, 95, syscall.ENOTSUP},
		{errors.ErrUnsupported, 95, syscall.ENOTSUP},
		{syscall.ESHUTDOWN, 108, syscall.ESHUTDOWN},
		{context.Canceled, 108, syscall.ESHUTDOWN},
	} {
		code := codeOf(fmt.Errorf("write block 7: %w", c.err))
		if code != c.code || errnoOf(code) != c.back {
			t.Errorf("%v: code %d, back %v; want %d, %v", c.err, code, errnoOf(code), c.code, c.back)
		}
	}
	if errnoOf(4711) != syscall.EINVAL {
		t.Errorf("unknown code: %v", errnoOf(4711))
	}
}

func TestMessageText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := messageText(string(rapid.SliceOfN(rapid.Byte(), 0, 2*maxString).Draw(t, "bytes")))
		if len(text) > maxString || !utf8.ValidString(text) || strings.ContainsRune(text, 0) {
			t.Fatalf("not fit for a reply: %q", text)
		}
	})
	if messageText("disk is full") != "disk is full" {
		t.Error("good text is changed")
	}
}

func TestBlockSizes(t *testing.T) {
	for _, c := range []struct {
		sizes blockSizes
		good  bool
	}{
		{defaultBlockSizes, true},
		{blockSizes{512, 4096, 1 << 20}, true},
		{blockSizes{65536, 65536, 32 << 20}, true},
		{blockSizes{4096, 4096, 1<<32 - 1}, true},
		{blockSizes{0, 4096, 1 << 20}, false},
		{blockSizes{513, 4096, 1 << 20}, false},
		{blockSizes{131072, 131072, 1 << 20}, false},
		{blockSizes{1, 256, 1 << 20}, false},
		{blockSizes{4096, 512, 1 << 20}, false},
		{blockSizes{4096, 4096, 512}, false},
		{blockSizes{4096, 4096, 4097}, false},
		{blockSizes{1, 4096, 0}, false},
	} {
		if err := c.sizes.check(); (err == nil) != c.good {
			t.Errorf("%+v: %v", c.sizes, err)
		}
	}
}

func TestBuffers(t *testing.T) {
	for _, n := range []int{1, 4095, 4096, 4097, 1 << 20, 1<<20 + 1, maxData} {
		b := getBuffer(n)
		if len(*b) != n || cap(*b) >= 2*max(n, 4096) {
			t.Errorf("buffer for %d bytes has %d, capacity %d", n, len(*b), cap(*b))
		}
		putBuffer(b)
	}
}

func TestAppendStates(t *testing.T) {
	hole := func(off, n int64) Extent { return Extent{off, n, true, true} }
	data := func(off, n int64) Extent { return Extent{off, n, false, false} }
	many := make([]Extent, 2*maxExtents)
	for i := range many {
		many[i] = Extent{Offset: int64(i), Length: 1, Hole: i%2 == 0}
	}
	for name, c := range map[string]struct {
		extents []Extent
		flags   uint16
		off     uint64
		length  uint32
		want    string // pairs of length and state
	}{
		"as they are":         {[]Extent{hole(0, 10), data(10, 20)}, 0, 0, 30, "10:3 20:0"},
		"neighbours together": {[]Extent{hole(0, 10), hole(10, 10), data(20, 10)}, 0, 0, 30, "20:3 10:0"},
		"cut to the request":  {[]Extent{data(0, 100), hole(100, 100)}, 0, 50, 100, "50:0 50:3"},
		"one asked for":       {[]Extent{hole(0, 10), hole(10, 10), data(20, 10)}, cmdFlagReqOne, 0, 30, "20:3"},
		"up to a gap":         {[]Extent{hole(0, 10), hole(20, 10)}, 0, 0, 30, "10:3"},
		"none":                {nil, 0, 7, 30, "30:0"},
		"gap first":           {[]Extent{hole(10, 20)}, 0, 0, 30, "30:0"},
	} {
		b := appendStates(nil, c.extents, request{flags: c.flags, offset: c.off, length: c.length})
		var got []string
		for d := (cursor{b: b}); len(d.b) > 0; {
			got = append(got, fmt.Sprintf("%d:%d", d.u32(), d.u32()))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", name, got, c.want)
		}
	}
	if b := appendStates(nil, many, request{length: 2 * maxExtents}); len(b) != 8*maxExtents {
		t.Errorf("reply of %d extents", len(b)/8)
	}
}

func TestCoverage(t *testing.T) {
	for name, c := range map[string]struct {
		pieces []piece
		whole  bool
	}{
		"in order":  {[]piece{{0, 4}, {4, 10}}, true},
		"reversed":  {[]piece{{4, 10}, {0, 4}}, true},
		"gap":       {[]piece{{0, 4}, {5, 10}}, false},
		"overlap":   {[]piece{{0, 5}, {4, 10}}, false},
		"twice":     {[]piece{{0, 5}, {0, 5}}, false},
		"short":     {[]piece{{0, 5}}, false},
		"nothing":   {nil, false},
		"scattered": {[]piece{{0, 2}, {8, 10}, {2, 4}, {6, 8}, {4, 6}}, true},
	} {
		var got coverage
		for _, p := range c.pieces {
			got.add(p.from, p.to-p.from)
		}
		if got.whole(10) != c.whole {
			t.Errorf("%s: whole is %v", name, !c.whole)
		}
	}
	var many coverage
	for i := range int64(maxPieces) {
		if !many.add(3*i, 1) {
			t.Fatalf("piece %d is one too many", i)
		}
	}
	if many.add(1<<40, 1) {
		t.Error("no bound on pieces")
	}
}
