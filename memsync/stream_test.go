package memsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// stream builds a migration stream as QEMU would write it.
type stream struct {
	bytes.Buffer
	pages [][]byte // that were written
}

func (s *stream) u8(v ...byte)   { s.Write(v) }
func (s *stream) u16(v uint16)   { s.Write(binary.BigEndian.AppendUint16(nil, v)) }
func (s *stream) u32(v uint32)   { s.Write(binary.BigEndian.AppendUint32(nil, v)) }
func (s *stream) u64(v uint64)   { s.Write(binary.BigEndian.AppendUint64(nil, v)) }
func (s *stream) name(n string)  { s.u8(byte(len(n))); s.WriteString(n) }
func (s *stream) footer()        { s.u8(sectionFooter); s.u32(ramSection) }
func (s *stream) contentsEnd()   { s.u64(flagContentsEnd) }
func (s *stream) clone() *stream { c := &stream{}; c.Write(s.Bytes()); return c }

const (
	ramSection = 2
	testPage   = 4096
	mainBlock  = "pc.ram"
	romBlock   = "/rom@etc/acpi/tables"
	mainPages  = 300
	romPages   = 32
)

func (s *stream) header() {
	s.u32(streamMagic)
	s.u32(streamVersion)
}

func (s *stream) configuration() {
	const machine = "pc-q35-7.2"
	s.u8(sectionConfiguration)
	s.u32(uint32(len(machine)))
	s.WriteString(machine)
}

func (s *stream) command(n uint16, payload ...byte) {
	s.u8(sectionCommand)
	s.u16(n)
	s.u16(uint16(len(payload)))
	s.Write(payload)
}

func (s *stream) returnPath() {
	s.command(commandOpenReturnPath)
	s.command(2, 0, 0, 0, 1) // PING
}

func (s *stream) section(kind byte, id uint32, name string, version uint32) {
	s.u8(kind)
	s.u32(id)
	s.name(name)
	s.u32(0)
	s.u32(version)
}

func (s *stream) ramStart() {
	s.section(sectionStart, ramSection, ramName, ramVersion)
	s.u64((mainPages+romPages)*testPage | flagSizes)
	s.name(mainBlock)
	s.u64(mainPages * testPage)
	s.name(romBlock)
	s.u64(romPages * testPage)
	s.contentsEnd()
	s.footer()
}

func (s *stream) part(kind byte) { s.u8(kind); s.u32(ramSection) }

// at begins a record about a page; an empty block continues the one before.
func (s *stream) at(page int, flag uint64, block string) {
	word := uint64(page)*testPage | flag
	if block == "" {
		s.u64(word | flagContinue)
		return
	}
	s.u64(word)
	s.name(block)
}

func (s *stream) zero(page int, block string) {
	s.at(page, flagZero, block)
	s.u8(0)
}

func (s *stream) page(page int, block string, data []byte) {
	s.at(page, flagPage, block)
	s.Write(data)
	s.pages = append(s.pages, data)
}

func (s *stream) ramEnd() {
	s.part(sectionLast)
	s.page(5, mainBlock, content(55))
	s.contentsEnd()
}

func (s *stream) device() {
	s.footer()
	s.section(4, 7, "0000:00:03.0/virtio-net", 11)
	s.WriteString("\x00\x01\x02 device state \x00\x06\x00")
	s.u8(sectionFooter)
	s.u32(7)
}

const vmDescription = `{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": []}`

func (s *stream) description() {
	s.u8(sectionEnd, sectionDescription)
	s.u32(uint32(len(vmDescription)))
	s.WriteString(vmDescription)
}

// content is a page that is half noise.
func content(seed uint64) []byte {
	p := make([]byte, testPage)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < testPage/2; i += 8 {
		binary.BigEndian.PutUint64(p[i:], r.Uint64())
	}
	return p
}

// head is a stream up to its RAM section's end.
func head(returnPath bool) *stream {
	s := &stream{}
	s.header()
	s.configuration()
	if returnPath {
		s.returnPath()
	}
	s.ramStart()
	s.part(sectionPart)
	s.zero(0, mainBlock)
	for i := 1; i < 150; i++ {
		s.zero(i, "")
	}
	for i := 150; i < mainPages; i++ {
		s.page(i, "", content(uint64(i)))
	}
	s.zero(0, romBlock)
	s.zero(2, "")
	s.contentsEnd()
	s.footer()
	s.part(sectionPart)
	s.page(3, mainBlock, content(3))
	s.at(4, flagXbzrle, "")
	s.u8(1)
	s.u16(5)
	s.WriteString("delta")
	s.at(5, flagCompressed, "")
	s.u32(4)
	s.WriteString("zlib")
	s.u64(flagMultifdFlush)
	s.contentsEnd()
	s.footer()
	s.ramEnd()
	return s
}

// whole is a stream as QEMU sends it when all goes well.
func whole(returnPath bool) []byte {
	s := head(returnPath)
	s.device()
	s.description()
	return s.Bytes()
}

// small is a whole stream of records without pages.
func small() *stream {
	s := &stream{}
	s.header()
	s.configuration()
	s.returnPath()
	s.ramStart()
	s.part(sectionPart)
	s.zero(0, mainBlock)
	s.zero(1, "")
	s.at(2, flagXbzrle, "")
	s.u8(1)
	s.u16(5)
	s.WriteString("delta")
	s.contentsEnd()
	s.footer()
	s.part(sectionLast)
	s.zero(1, mainBlock)
	s.contentsEnd()
	s.device()
	s.description()
	return s
}

// channel is a channel of a session in memory.
type channel struct {
	frames chan []byte
	once   sync.Once
}

func newChannel() *channel { return &channel{frames: make(chan []byte, 4)} }

func (c *channel) Send(ctx context.Context, frame []byte) error {
	select {
	case c.frames <- bytes.Clone(frame):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *channel) Recv(ctx context.Context, buf []byte) ([]byte, error) {
	select {
	case f, ok := <-c.frames:
		if !ok {
			return nil, io.EOF
		}
		return append(buf[:0], f...), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *channel) closeSend() { c.once.Do(func() { close(c.frames) }) }

// script is a QEMU that sends a stream in pieces of the given sizes, in turn,
// and closes its socket. What it is told is kept.
type script struct {
	data  []byte
	sizes []int
	turn  int

	mu     sync.Mutex
	heard  []byte
	closed bool
}

func (q *script) Read(p []byte) (int, error) {
	if len(q.data) == 0 {
		return 0, io.EOF
	}
	n := len(q.data)
	if len(q.sizes) > 0 {
		n = q.sizes[q.turn%len(q.sizes)]
		q.turn++
	}
	n = copy(p, q.data[:min(n, len(q.data))])
	q.data = q.data[n:]
	return n, nil
}

func (q *script) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.heard = append(q.heard, p...)
	return len(p), nil
}

func (q *script) Close() error { return nil }

// sink is a destination QEMU that takes everything and is silent.
type sink struct {
	mu   sync.Mutex
	got  []byte
	done chan struct{}
	once sync.Once
}

func newSink() *sink { return &sink{done: make(chan struct{})} }

func (q *sink) Read([]byte) (int, error) { <-q.done; return 0, io.EOF }
func (q *sink) CloseWrite() error        { return q.Close() }
func (q *sink) Close() error             { q.once.Do(func() { close(q.done) }); return nil }

func (q *sink) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.got = append(q.got, p...)
	return len(p), nil
}

func (q *sink) bytes() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	return bytes.Clone(q.got)
}

func open(context.Context) error { return nil }

func dialTo(c io.ReadWriteCloser) func(context.Context) (io.ReadWriteCloser, error) {
	return func(context.Context) (io.ReadWriteCloser, error) { return c, nil }
}

// carried is what became of a stream on its way through Source and Dest.
type carried struct {
	source     *Source
	out        []byte
	tails      int
	src, dest  error
	frameKinds []byte
}

// tap notes the types of the frames that pass.
type tap struct {
	*channel
	mu    sync.Mutex
	kinds []byte
}

func (t *tap) Send(ctx context.Context, frame []byte) error {
	t.mu.Lock()
	t.kinds = append(t.kinds, frame[0])
	t.mu.Unlock()
	return t.channel.Send(ctx, frame)
}

// carry takes a stream through Source and Dest, with a page store that all but
// the longest fit into.
func carry(data []byte, sizes ...int) carried { return carryStored(100*storePage, data, sizes...) }

// carryStored is carry with a page store of so many bytes.
func carryStored(store int64, data []byte, sizes ...int) carried {
	return carryOffered(store, nil, offerAbove, data, sizes...)
}

// carryOffered is carryStored with what the destination holds, and offers as
// long as more than above bytes are left of the first pass.
func carryOffered(store int64, have searcher, above uint64, data []byte, sizes ...int) carried {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	frames, returns, qemu := &tap{channel: newChannel()}, newChannel(), newSink()
	var c carried
	c.source = NewSource(SourceConfig{
		QEMU: &script{data: data, sizes: sizes}, Frames: frames, Return: returns,
		OnTail: func() { c.tails++ }, Store: store,
	})
	c.source.offerAbove = above
	dest := NewDest(DestConfig{Frames: frames, Return: returns, Dial: dialTo(qemu), Gate: open, Store: store, Have: have})
	var wg sync.WaitGroup
	wg.Go(func() {
		if c.dest = dest.Run(ctx); c.dest != nil {
			cancel()
		}
	})
	c.src = c.source.Run(ctx)
	frames.closeSend()
	wg.Wait()
	c.out, c.frameKinds = qemu.bytes(), frames.kinds
	if errors.Is(c.dest, io.EOF) && errors.Is(c.src, ErrAborted) {
		c.dest = nil // no end frame is what an aborted stream looks like
	}
	return c
}

func (c carried) check(t testing.TB, want []byte) {
	t.Helper()
	if !bytes.Equal(c.out, want) {
		i := 0
		for i < min(len(c.out), len(want)) && c.out[i] == want[i] {
			i++
		}
		t.Fatalf("%d bytes became %d, the first difference is at %d", len(want), len(c.out), i)
	}
	if c.src != nil && !errors.Is(c.src, ErrAborted) {
		t.Fatalf("source: %v", c.src)
	}
	if c.dest != nil {
		t.Fatalf("destination: %v", c.dest)
	}
}

// unixPair is a connected pair of unix sockets.
func unixPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.UnixConn), d.(*net.UnixConn)
}
