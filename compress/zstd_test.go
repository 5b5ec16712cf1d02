package compress

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
)

const testBlock = 256 << 10

// normally is at zstd's default level: it is never told of a link.
var normally = NewEncoder(1)

func noise(seed uint64, n int) []byte {
	b := make([]byte, (n+7)&^7)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:n]
}

// table imitates a database file: pages with a header, rows of numbers that
// grow slowly, short words, and free space of zeros.
func table(n int) []byte {
	b := make([]byte, 0, n)
	r := rand.New(rand.NewPCG(7, 7))
	words := []string{"open", "paid", "shipped", "returned", "Berlin", "Lyon", "Utrecht", "Porto"}
	for row := uint64(0); len(b) < n; row++ {
		b = binary.BigEndian.AppendUint64(b, row)
		b = binary.BigEndian.AppendUint32(b, r.Uint32())
		b = append(b, words[r.IntN(len(words))]...)
		b = fmt.Appendf(b, "%09d", r.IntN(1e9))
		if row%60 == 0 {
			b = append(b, make([]byte, r.IntN(900))...)
		}
	}
	return b[:n]
}

// corpus is blocks of the kinds of content that a guest's disk and page cache
// have: the test binary's machine code, Go's own source text, a table, noise.
func corpus(tb testing.TB) map[string][][]byte {
	tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	code, err := os.ReadFile(exe)
	if err != nil {
		tb.Fatal(err)
	}
	var text []byte
	files, err := filepath.Glob(filepath.Join(runtime.GOROOT(), "src", "net", "http", "*.go"))
	if err != nil || len(files) == 0 {
		tb.Fatalf("no source text: %v", err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			tb.Fatal(err)
		}
		text = append(text, b...)
	}
	const n = 6 * testBlock
	kinds := map[string][]byte{"code": code[:n], "text": text[:n], "table": table(n), "noise": noise(1, n)}
	out := make(map[string][][]byte)
	for k, b := range kinds {
		for i := 0; i < len(b); i += testBlock {
			out[k] = append(out[k], b[i:i+testBlock])
		}
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	inputs := map[string][]byte{
		"empty":      {},
		"one byte":   {7},
		"short":      []byte("abc"),
		"few zeros":  make([]byte, 200),
		"500 zeros":  make([]byte, 500),
		"page":       bytes.Repeat([]byte("0123456789abcdef"), 256),
		"noise page": noise(2, 4096),
		"noise":      noise(3, 1<<20),
		"zeros":      make([]byte, 1<<20),
		"largest":    bytes.Repeat([]byte("largest "), MaxSize/8),
		"too large":  bytes.Repeat([]byte("too large"), MaxSize/8),
	}
	for kind, blocks := range corpus(t) {
		inputs[kind] = blocks[0]
	}
	for name, in := range inputs {
		enc, m := normally.Encode([]byte("head"), in)
		if string(enc[:4]) != "head" {
			t.Fatalf("%s: Encode did not append", name)
		}
		if len(enc)-4 > len(in) {
			t.Errorf("%s: %d bytes became %d", name, len(in), len(enc)-4)
		}
		dec, err := Decode([]byte("front"), m, enc[4:], len(in))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if string(dec[:5]) != "front" || !bytes.Equal(dec[5:], in) {
			t.Errorf("%s: decoded content differs", name)
		}
	}
}

func TestMethodFollowsContent(t *testing.T) {
	want := map[string]Method{"code": Zstd, "text": Zstd, "table": Zstd, "noise": Raw}
	for kind, blocks := range corpus(t) {
		for i, b := range blocks {
			if _, m := normally.Encode(nil, b); m != want[kind] {
				t.Errorf("%s block %d: %v, want %v", kind, i, m, want[kind])
			}
		}
	}
	// A quarter that compresses is worth the work, wherever it stands.
	for quarter := range 4 {
		b := noise(4, testBlock)
		clear(b[quarter*testBlock/4 : (quarter+1)*testBlock/4])
		if _, m := normally.Encode(nil, b); m != Zstd {
			t.Errorf("zeros in quarter %d: %v", quarter, m)
		}
	}
	armoured := []byte(base64.StdEncoding.EncodeToString(noise(6, testBlock)))
	if enc, m := normally.Encode(nil, armoured); m != Zstd || len(enc) > len(armoured)*4/5 {
		t.Errorf("base64: %v, %d bytes of %d", m, len(enc), len(armoured))
	}
}

func TestEveryPrefixFails(t *testing.T) {
	in := table(5000)
	enc, m := normally.Encode(nil, in)
	if m != Zstd {
		t.Fatalf("method %v", m)
	}
	for n := range enc {
		if out, err := Decode([]byte("x"), m, enc[:n], len(in)); err == nil || string(out) != "x" {
			t.Fatalf("prefix of %d bytes of %d: %d bytes, error %v", n, len(enc), len(out), err)
		}
	}
}

func TestRefuses(t *testing.T) {
	in := bytes.Repeat([]byte("refuse me "), 1000)
	enc, _ := normally.Encode(nil, in)
	stream, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	var noSize bytes.Buffer
	stream.Reset(&noSize)
	for range 4 {
		stream.Write(in)
		stream.Flush()
	}
	stream.Close()
	bomb := stream.EncodeAll(make([]byte, 64<<20), nil)

	tests := []struct {
		name string
		m    Method
		src  []byte
		size int
		want error
	}{
		{"unknown method", 2, in, len(in), ErrMethod},
		{"raw too short", Raw, in[1:], len(in), ErrSize},
		{"raw too long", Raw, in, len(in) - 1, ErrSize},
		{"negative size", Raw, in, -1, ErrSize},
		{"negative size, zstd", Zstd, enc, -1, ErrSize},
		{"zero size", Zstd, enc, 0, ErrSize},
		{"size less", Zstd, enc, len(in) - 1, ErrSize},
		{"size more", Zstd, enc, len(in) + 1, ErrSize},
		{"two blocks", Zstd, append(bytes.Clone(enc), enc...), len(in), zstd.ErrDecoderSizeExceeded},
		{"unknown content size", Zstd, noSize.Bytes(), 4 * len(in), ErrSize},
		{"bomb", Zstd, bomb, len(in), ErrSize},
		{"bomb announced", Zstd, bomb, 64 << 20, ErrSize},
		{"skippable frame", Zstd, []byte("\x50\x2a\x4d\x18\xff\xff\xff\x7f"), 100, ErrSize},
	}
	for _, tt := range tests {
		out, err := Decode(nil, tt.m, tt.src, tt.size)
		if !errors.Is(err, tt.want) || out != nil {
			t.Errorf("%s: %d bytes, error %v, want %v", tt.name, len(out), err, tt.want)
		}
	}
}

func TestConcurrent(t *testing.T) {
	blocks := corpus(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for kind, bs := range blocks {
				for _, b := range bs[:2] {
					enc, m := normally.Encode(nil, b)
					dec, err := Decode(nil, m, enc, len(b))
					if err != nil || !bytes.Equal(dec, b) {
						t.Errorf("%s: error %v", kind, err)
					}
				}
			}
		})
	}
	wg.Wait()
}

func FuzzDecode(f *testing.F) {
	for _, in := range [][]byte{nil, []byte("abc"), table(5000), noise(5, 5000)} {
		enc, m := normally.Encode(nil, in)
		f.Add(uint8(m), enc, len(in))
		f.Add(uint8(Zstd), enc, len(in)+1)
	}
	f.Fuzz(func(t *testing.T, m uint8, src []byte, size int) {
		out, err := Decode([]byte("x"), Method(m), src, size)
		if err != nil && string(out) != "x" || err == nil && len(out) != 1+size {
			t.Fatalf("%d bytes of %d, error %v", len(out)-1, size, err)
		}
		enc, em := normally.Encode(nil, src)
		back, err := Decode(nil, em, enc, len(src))
		if err != nil || !bytes.Equal(back, src) {
			t.Fatalf("round trip: %v", err)
		}
	})
}

func BenchmarkLevels(b *testing.B) {
	blocks := corpus(b)
	for l := range levels {
		e := l.encoder(1)
		for kind, bs := range blocks {
			b.Run(l.String()+"/"+kind, func(b *testing.B) {
				benchmark(b, map[string][][]byte{kind: bs}, func(dst, src []byte) []byte { return e.EncodeAll(src, dst) })
			})
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	blocks := corpus(b)
	encode := func(dst, src []byte) []byte { dst, _ = normally.Encode(dst, src); return dst }
	b.Run("mixed", func(b *testing.B) { benchmark(b, blocks, encode) })
	for kind, bs := range blocks {
		b.Run(kind, func(b *testing.B) { benchmark(b, map[string][][]byte{kind: bs}, encode) })
	}
}

func benchmark(b *testing.B, kinds map[string][][]byte, encode func(dst, src []byte) []byte) {
	var blocks [][]byte
	var in, out int
	for _, bs := range kinds {
		blocks = append(blocks, bs...)
	}
	dst := make([]byte, 0, 2*testBlock)
	for _, src := range blocks {
		in += len(src)
		out += len(encode(dst[:0], src))
	}
	b.SetBytes(int64(in))
	b.ReportAllocs()
	for b.Loop() {
		for _, src := range blocks {
			encode(dst[:0], src)
		}
	}
	b.ReportMetric(float64(in)/float64(out), "ratio")
}

func BenchmarkDecode(b *testing.B) {
	for kind, blocks := range corpus(b) {
		b.Run(kind, func(b *testing.B) {
			enc, m := normally.Encode(nil, blocks[0])
			dst := make([]byte, 0, testBlock)
			b.SetBytes(testBlock)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Decode(dst, m, enc, testBlock); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
