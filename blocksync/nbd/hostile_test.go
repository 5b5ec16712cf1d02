package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const hostileSize = 16 * memBlock

// tap notes what is read from a connection.
type tap struct {
	net.Conn
	mu  sync.Mutex
	got []byte
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	c.got = append(c.got, p[:n]...)
	c.mu.Unlock()
	return n, err
}

func (c *tap) all() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.got)
}

// clientCalls are the calls of the recorded session, one after the other.
func clientCalls(c *Client) []func() error {
	p := make([]byte, 600)
	return []func() error{
		func() error { return c.WriteAt(ctxb, bytes.Repeat([]byte("w"), 300), 100, false) },
		func() error {
			if err := c.ReadAt(ctxb, p, 0); err != nil {
				return err
			}
			if want := append(append(make([]byte, 100), bytes.Repeat([]byte("w"), 300)...), make([]byte, 200)...); !bytes.Equal(p, want) {
				return errWrongContent
			}
			return nil
		},
		func() error {
			extents, err := c.BlockStatus(ctxb, 0, 3*memBlock)
			at := int64(0)
			for _, e := range extents {
				if e.Offset != at || e.Length <= 0 {
					return errWrongContent
				}
				at += e.Length
			}
			if err == nil && (at == 0 || at > 3*memBlock) {
				return errWrongContent
			}
			return err
		},
		func() error { return c.Zero(ctxb, 0, memBlock, ZeroFlags{}) },
		func() error { return c.Trim(ctxb, memBlock, memBlock, true) },
		func() error { return c.Flush(ctxb) },
	}
}

var errWrongContent = errors.New("a call succeeds with something that nobody sent")

// record runs the calls against a real server. It gives what each side received; the client's
// part is cut where transmission starts.
func record(t testing.TB) (toServer, handshake, replies []byte) {
	a, b := pair(t)
	server, conn := &tap{Conn: a}, &tap{Conn: b}
	s := &Server{Exports: map[string]Export{"disk": {Device: newMemDevice(hostileSize)}}}
	var served sync.WaitGroup
	served.Go(func() { s.serveConn(ctxb, server) })
	c, err := NewClient(ctxb, conn, "disk")
	if err != nil {
		t.Fatal(err)
	}
	cut := len(conn.all())
	for i, call := range clientCalls(c) {
		if err := call(); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	c.Close()
	served.Wait()
	all := conn.all()
	return server.all(), all[:cut], all[cut:]
}

// playClient gives a server what a client sends, closes that direction, and waits for the
// server's end. It returns what the server did to its device.
func playClient(t testing.TB, sent []byte) []string {
	device := newMemDevice(hostileSize)
	s := &Server{Exports: map[string]Export{"disk": {Device: device}, "": {Device: nullDevice{size: 1 << 30}, ReadOnly: true}}}
	server, client := pair(t)
	defer client.Close()
	c := newSession(ctxb, s, server)
	var both sync.WaitGroup
	both.Go(func() {
		c.run()
		c.end(nil)
	})
	both.Go(func() {
		client.Write(sent) // fails if the server has had enough
		client.CloseWrite()
	})
	io.Copy(io.Discard, client)
	both.Wait()
	return device.operations()
}

// playServer gives a client what a server sends: the handshake, and the replies once all
// requests are out. It returns what became of the handshake or of the calls.
func playServer(t testing.TB, handshake, replies []byte) (open error, results []error) {
	conn := &script{in: bytes.NewReader(handshake), closed: make(chan struct{}), start: make(chan struct{})}
	c := newClient(conn, "disk")
	close(conn.start)
	if err := c.negotiate(); err != nil {
		return err, nil
	}
	conn.in, conn.start = bytes.NewReader(replies), make(chan struct{})
	c.reader.Go(c.readReplies)
	calls := clientCalls(c)
	results = make([]error, len(calls))
	var running sync.WaitGroup
	for i, call := range calls {
		c.mu.Lock()
		before := c.cookie
		c.mu.Unlock()
		done := make(chan struct{})
		running.Go(func() {
			defer close(done)
			results[i] = call()
		})
		for sent := false; !sent; { // cookies come in the order of the calls
			select {
			case <-done:
				sent = true
			default:
				runtime.Gosched()
				c.mu.Lock()
				sent = c.cookie > before
				c.mu.Unlock()
			}
		}
	}
	close(conn.start)
	running.Wait()
	c.Close()
	return nil, results
}

// script is a connection that gives in, from start on, and takes everything.
type script struct {
	net.Conn
	in     io.Reader
	start  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func (c *script) Read(p []byte) (int, error) {
	select {
	case <-c.start:
		return c.in.Read(p)
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *script) Write(p []byte) (int, error)        { return len(p), nil }
func (c *script) SetWriteDeadline(_ time.Time) error { return nil }
func (c *script) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func TestServerTakesEveryPrefix(t *testing.T) {
	sent, _, _ := record(t)
	// The first byte after each request that changes the device.
	at := bytes.Index(sent, binary.BigEndian.AppendUint32(nil, magicRequest))
	var ends []int
	for at < len(sent) {
		r, err := parseRequest((*[requestSize]byte)(sent[at:]))
		if err != nil {
			t.Fatal(err)
		}
		at += requestSize
		if r.cmd == cmdWrite {
			at += int(r.length)
		}
		if r.cmd != cmdDisc {
			ends = append(ends, at)
		}
	}
	for n := range len(sent) + 1 {
		done := playClient(t, sent[:n])
		complete := 0
		for _, end := range ends {
			if end <= n {
				complete++
			}
		}
		if len(done) != complete {
			t.Fatalf("%d of %d bytes: the device saw %v, which is not %d operations", n, len(sent), done, complete)
		}
	}
}

func TestClientTakesEveryPrefix(t *testing.T) {
	_, handshake, replies := record(t)
	for n := range handshake {
		if err, _ := playServer(t, handshake[:n], nil); err == nil {
			t.Fatalf("%d of %d bytes of handshake do for the client", n, len(handshake))
		}
	}
	for n := range len(replies) + 1 {
		err, results := playServer(t, handshake, replies[:n])
		if err != nil {
			t.Fatal(err)
		}
		for i, err := range results {
			if errors.Is(err, errWrongContent) {
				t.Fatalf("%d of %d bytes of replies: call %d: %v", n, len(replies), i, err)
			}
		}
		if good := results[len(results)-1] == nil; good != (n == len(replies)) {
			t.Fatalf("%d of %d bytes of replies: the last call gives %v", n, len(replies), results[len(results)-1])
		}
	}
}

// TestMutations changes some bytes of a real session, for either side.
func TestMutations(t *testing.T) {
	sent, handshake, replies := record(t)
	mutate := func(rt *rapid.T, label string, b []byte) []byte {
		b = slices.Clone(b)
		for range rapid.IntRange(0, 4).Draw(rt, label+" changes") {
			b[rapid.IntRange(0, len(b)-1).Draw(rt, label+" at")] = rapid.Byte().Draw(rt, label+" byte")
		}
		return b
	}
	rapid.Check(t, func(rt *rapid.T) {
		playClient(t, mutate(rt, "sent", sent))
		playServer(t, mutate(rt, "handshake", handshake), mutate(rt, "replies", replies))
	})
}

// allocated gives the bytes that f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

const hostileMemory = 1 << 20 // more than a connection's own buffers, less than any lie below

func TestServerRefusesOversize(t *testing.T) {
	sent, _, _ := record(t)
	transmission := bytes.Index(sent, binary.BigEndian.AppendUint32(nil, magicRequest))
	hello := sent[:4]
	option := func(o option, length uint32, data []byte) []byte {
		b := appendOptionHeader(slices.Clone(hello), o, 0)
		binary.BigEndian.PutUint32(b[len(b)-4:], length)
		return append(b, data...)
	}
	queries := appendString(nil, "disk")
	queries = append(queries, 0xff, 0xff, 0xff, 0xff) // their number
	for name, b := range map[string][]byte{
		"option":        option(77, 1<<32-1, nil),
		"export name":   option(optExportName, 1<<31, nil),
		"go name":       option(optGo, 4, []byte{0xff, 0xff, 0xff, 0xff}),
		"go wishes":     option(optGo, 6, []byte{0, 0, 0, 0, 0xff, 0xff}),
		"query number":  append(option(optStructuredReply, 0, nil), option(optSetMetaContext, uint32(len(queries)), queries)[4:]...),
		"write":         append(slices.Clone(sent[:transmission]), request{cmd: cmdWrite, length: 1<<32 - 1}.append(nil)...),
		"write, a bit":  append(slices.Clone(sent[:transmission]), request{cmd: cmdWrite, length: maxData + 1}.append(nil)...),
		"read":          append(slices.Clone(sent[:transmission]), request{cmd: cmdRead, length: 1<<32 - 1}.append(nil)...),
		"block status":  append(slices.Clone(sent[:transmission]), request{cmd: cmdBlockStatus, length: 1<<32 - 1}.append(nil)...),
		"refused write": append(slices.Clone(sent[:transmission]), request{cmd: cmdWrite, offset: 1 << 60, length: maxData}.append(nil)...),
	} {
		var done []string
		if n := allocated(func() { done = playClient(t, b) }); n > hostileMemory {
			t.Errorf("%s: %d bytes allocated", name, n)
		}
		if len(done) != 0 {
			t.Errorf("%s: the device saw %v", name, done)
		}
	}
}

func TestClientRefusesOversize(t *testing.T) {
	_, handshake, _ := record(t)
	chunk := func(t chunkType, cookie uint64, length uint32, payload ...byte) []byte {
		b := appendChunkHeader(nil, t, cookie, 0)
		binary.BigEndian.PutUint32(b[len(b)-4:], length)
		return append(b, payload...)
	}
	const read, status = 2, 3 // cookies
	off := make([]byte, 8)
	for name, replies := range map[string][]byte{
		"data":             chunk(chunkData, read, 1<<32-1, off...),
		"data, a bit":      chunk(chunkData, read, 8+601, append(off, make([]byte, 601)...)...),
		"data, none":       chunk(chunkData, read, 8, off...),
		"data at 2^64-1":   chunk(chunkData, read, 8+600, bytes.Repeat([]byte{0xff}, 8)...),
		"hole":             chunk(chunkHole, read, 12, append(off, 0xff, 0xff, 0xff, 0xff)...),
		"hole, empty":      chunk(chunkHole, read, 12, append(off, 0, 0, 0, 0)...),
		"hole, part":       chunk(chunkHole, read, 12, append(off, 0, 0, 0, 9)...),
		"read, nothing":    chunk(chunkNone, read, 0),
		"read, simple":     append(appendSimpleReply(nil, 0, read), make([]byte, 600)...),
		"status":           chunk(chunkBlockStatus, status, 1<<32-4),
		"status, empty":    chunk(chunkBlockStatus, status, 4, 0, 0, 0, 1),
		"status, id":       chunk(chunkBlockStatus, status, 12, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0),
		"status, no bytes": chunk(chunkBlockStatus, status, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
		"status, simple":   appendSimpleReply(nil, 0, status),
		"status, none":     chunk(chunkNone, status, 0),
		"error":            chunk(chunkError, read, 1<<32-1),
		"error text":       chunk(chunkError, read, 6, 0, 0, 0, 5, 0xff, 0xff),
		"error 0":          chunk(chunkError, read, 6, 0, 0, 0, 0, 0, 0),
		"unknown error":    chunk(chunkIsError+99, read, 1<<32-1),
		"unknown chunk":    chunk(99, read, 1<<32-1),
		"wrong chunk":      chunk(chunkData, status, 8+1, append(off, 1)...),
		"unknown cookie":   appendSimpleReply(nil, 0, 4711),
		"magic":            make([]byte, 16),
	} {
		n := allocated(func() {
			err, results := playServer(t, handshake, replies)
			if err != nil {
				t.Fatal(err)
			}
			for i, err := range results {
				if !errors.Is(err, ErrProtocol) {
					t.Errorf("%s: call %d: %v", name, i, err)
				}
			}
		})
		if n > hostileMemory {
			t.Errorf("%s: %d bytes allocated", name, n)
		}
	}
}

func TestClientRefusesHandshake(t *testing.T) {
	_, handshake, _ := record(t)
	hello := handshake[:18]
	reply := func(o option, t replyType, length uint32, data ...byte) []byte {
		b := appendOptionReply(nil, o, t, nil)
		binary.BigEndian.PutUint32(b[len(b)-4:], length)
		return append(b, data...)
	}
	ack := reply(optStructuredReply, repAck, 0)
	noContext := reply(optSetMetaContext, repErrUnsup, 0)
	ask := func(parts ...[]byte) []byte {
		return slices.Concat(append([][]byte{hello, ack, noContext}, parts...)...)
	}
	u64 := func(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
	done := reply(optGo, repAck, 0)
	export := func(size uint64) []byte {
		return reply(optGo, repInfo, 12, slices.Concat([]byte{0, 0}, u64(size), []byte{0, 1})...)
	}
	blocks := func(b ...byte) []byte { return reply(optGo, repInfo, 14, append([]byte{0, 3}, b...)...) }
	if err, _ := playServer(t, ask(export(hostileSize), blocks(0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0), done), nil); err != nil {
		t.Fatalf("a good handshake: %v", err)
	}
	for name, b := range map[string][]byte{
		"greeting":        make([]byte, 18),
		"oldstyle":        append(append(u64(magicInit), u64(0x00420281861253)...), make([]byte, 136)...),
		"http":            []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"long reply":      slices.Concat(hello, reply(optStructuredReply, repAck, 1<<32-1)),
		"other option":    slices.Concat(hello, reply(optList, repAck, 0)),
		"reply magic":     slices.Concat(hello, make([]byte, 20)),
		"strange reply":   slices.Concat(hello, reply(optStructuredReply, repServer, 0)),
		"other context":   slices.Concat(hello, ack, reply(optSetMetaContext, repMetaContext, 5, 0, 0, 0, 1, 'x')),
		"no export":       ask(done),
		"size 2^63":       ask(export(1 << 63)),
		"short export":    ask(reply(optGo, repInfo, 3, 0, 0, 0)),
		"empty info":      ask(reply(optGo, repInfo, 0)),
		"strange in go":   ask(reply(optGo, repServer, 0)),
		"block sizes 0":   ask(blocks(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
		"block sizes odd": ask(blocks(0, 0, 2, 1, 0, 0, 2, 1, 0, 0, 2, 1)),
	} {
		var err error
		if n := allocated(func() { err, _ = playServer(t, b, nil) }); n > hostileMemory {
			t.Errorf("%s: %d bytes allocated", name, n)
		}
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzServer(f *testing.F) {
	sent, _, _ := record(f)
	f.Add(sent)
	transmission := bytes.Index(sent, binary.BigEndian.AppendUint32(nil, magicRequest))
	for cmd := range command(10) {
		r := request{cmd: cmd, flags: cmdFlagFUA, cookie: 1, length: 512}
		f.Add(append(append(slices.Clone(sent[:transmission]), r.append(nil)...), make([]byte, 600)...))
	}
	hello := slices.Clone(sent[:4])
	f.Add(appendOptionHeader(append(hello, appendOptionHeader(nil, optList, 0)...), optAbort, 0))
	f.Add(append(appendOptionHeader(hello, optExportName, 4), "disk"...))
	f.Fuzz(func(t *testing.T, sent []byte) { playClient(t, sent) })
}

func FuzzClient(f *testing.F) {
	_, handshake, replies := record(f)
	f.Add(handshake, replies)
	f.Add(handshake, appendSimpleReply(nil, codeIO, 1))
	f.Add(handshake[:18], []byte{})
	old := append(slices.Clone(handshake[:16]), 0, 0)
	f.Add(append(append(old, make([]byte, 6)...), append([]byte{1, 0, 0, 0x6d}, make([]byte, 124)...)...), replies)
	f.Fuzz(func(t *testing.T, handshake, replies []byte) {
		_, results := playServer(t, handshake, replies)
		for i, err := range results {
			if errors.Is(err, errWrongContent) && i == 2 {
				t.Errorf("call %d: %v", i, err)
			}
		}
	})
}
