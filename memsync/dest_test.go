package memsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/compress"
)

// landing is a Dest with a destination QEMU played by the test.
type landing struct {
	qemu            *net.UnixConn
	frames, returns *channel
	done            chan error
	ended           chan struct{} // closed by OnEnd
	dest            *Dest
}

var coder = compress.NewEncoder(1)

func land(t *testing.T, gate func(context.Context) error) *landing {
	t.Helper()
	qemu, ours := unixPair(t)
	l := &landing{qemu: qemu, frames: newChannel(), returns: newChannel(), done: make(chan error, 1), ended: make(chan struct{})}
	l.returns.frames = make(chan []byte, 4096)
	l.dest = NewDest(DestConfig{Frames: l.frames, Return: l.returns, Dial: dialTo(ours), Gate: gate, OnEnd: func() { close(l.ended) },
		Store: testSlots * storePage, Have: somePages})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	go func() { l.done <- l.dest.Run(ctx) }()
	t.Cleanup(cancel)
	qemu.SetDeadline(time.Now().Add(time.Minute))
	return l
}

func (l *landing) send(t *testing.T, frames ...[]byte) {
	t.Helper()
	for _, f := range frames {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		err := l.frames.Send(ctx, f)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (l *landing) expect(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(l.qemu, got); err != nil || string(got) != want {
		t.Fatalf("QEMU got %q (%v), want %q", got, err, want)
	}
}

// wrote waits until Dest knows that QEMU took n bytes.
func (l *landing) wrote(n uint64) {
	for {
		l.dest.mu.Lock()
		written := l.dest.written
		l.dest.mu.Unlock()
		if written == n {
			return
		}
		runtime.Gosched()
	}
}

// testSlots is what a landing allows and startFrame asks for.
const testSlots = 4

var startFrame = []byte{frameStart, 0, Version, 0, 0, 0, testSlots}

// noStore decodes batches that need no page store.
func noStore(t testing.TB) *unbatch {
	t.Helper()
	u, err := newUnbatch(0)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func bytesFrame(p []byte) []byte {
	b := newBatch()
	b.addBytes(p)
	return sealed(b, checksum(p))
}

// sealed is the frame of a batch whose stream bytes have the checksum.
func sealed(b *batch, crc uint32) []byte {
	b.crc = crc
	p := press{encode: coder.Encode}
	return p.seal(b)
}

func endFrame(n int) []byte {
	return binary.BigEndian.AppendUint64([]byte{frameEnd}, uint64(n))
}

func TestGateHoldsTail(t *testing.T) {
	gate := make(chan struct{})
	called := make(chan struct{})
	l := land(t, func(ctx context.Context) error {
		close(called)
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	l.send(t, startFrame, bytesFrame([]byte("memory")))
	l.expect(t, "memory")
	select {
	case <-called:
		t.Fatal("the gate was asked before the tail")
	default:
	}
	l.send(t, []byte{frameTail}, bytesFrame([]byte("device ")), bytesFrame([]byte("state")), endFrame(18))
	<-called
	<-l.ended // all of it is here, and none of it QEMU's
	l.qemu.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := l.qemu.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Fatalf("QEMU got %d bytes before the gate opened", n)
	}
	l.qemu.SetReadDeadline(time.Now().Add(time.Minute))
	close(gate)
	l.expect(t, "device state")
	if n, err := l.qemu.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("after the end QEMU reads %d bytes, %v", n, err)
	}
	l.qemu.Write(append(bytes.Clone(pong), shutMessage...))
	l.qemu.Close()
	if err := <-l.done; err != nil {
		t.Fatal(err)
	}
	l.returns.closeSend()
	var told []byte
	for f := range l.returns.frames {
		if f[0] != frameReturn {
			t.Fatalf("return frame of type %#02x", f[0])
		}
		told = append(told, f[1:]...)
	}
	if want := append(bytes.Clone(pong), shutMessage...); !bytes.Equal(told, want) {
		t.Errorf("the source is told %x, want %x", told, want)
	}
}

// A tail beyond its bound waits for the gate, and keeps its order.
func TestLongTail(t *testing.T) {
	gate := make(chan struct{})
	var got []byte
	tail := newTail(func() error { <-gate; return nil },
		func(p []byte) error { got = append(got, p...); return nil },
		func(err error) { t.Errorf("cancelled: %v", err) })
	piece := bytes.Repeat([]byte("state"), 1<<18)
	n := 0
	for tail.hold(piece) {
		n++
	}
	if n != maxTail/len(piece) {
		t.Fatalf("%d pieces of %d bytes were held", n, len(piece))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tail.put(ctx, piece); !errors.Is(err, context.Canceled) {
		t.Fatalf("one more was taken: %v", err)
	}
	close(gate)
	if err := tail.put(t.Context(), []byte("the end")); err != nil {
		t.Fatal(err)
	}
	tail.wait()
	if want := append(bytes.Repeat(piece, n), "the end"...); !bytes.Equal(got, want) {
		t.Errorf("%d bytes were written, want %d in order", len(got), len(want))
	}
}

func TestGateFails(t *testing.T) {
	boom := errors.New("boom")
	l := land(t, func(context.Context) error { return boom })
	l.send(t, startFrame, bytesFrame([]byte("memory")), []byte{frameTail}, bytesFrame([]byte("state")))
	if err := <-l.done; !errors.Is(err, boom) {
		t.Fatalf("Run: %v", err)
	}
	if got, _ := io.ReadAll(l.qemu); string(got) != "memory" {
		t.Errorf("QEMU got %q", got)
	}
}

func TestQEMUFails(t *testing.T) {
	for name, c := range map[string]struct {
		last []byte // QEMU's last words
		want string
	}{
		"without SHUT":       {pong, "destination QEMU closed the RAM stream after 6 bytes"},
		"with a failed SHUT": {failed, "status 1"},
	} {
		t.Run(name, func(t *testing.T) {
			l := land(t, open)
			l.send(t, startFrame, bytesFrame([]byte("memory")))
			l.expect(t, "memory")
			l.wrote(6)
			l.qemu.Write(c.last)
			l.qemu.Close()
			if err := <-l.done; !errors.Is(err, ErrQEMU) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Run: %v, want %q", err, c.want)
			}
		})
	}
	t.Run("without return path", func(t *testing.T) {
		l := land(t, open)
		l.send(t, startFrame, bytesFrame([]byte("memory")))
		l.expect(t, "memory")
		l.wrote(6)
		l.qemu.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() {
			for l.frames.Send(ctx, bytesFrame([]byte("more"))) == nil {
			}
		}()
		if err := <-l.done; !errors.Is(err, ErrQEMU) || !strings.Contains(err.Error(), "after 6 bytes") {
			t.Errorf("Run: %v", err)
		}
	})
	t.Run("before it listens", func(t *testing.T) {
		boom := errors.New("boom")
		frames := newChannel()
		frames.Send(t.Context(), startFrame)
		d := NewDest(DestConfig{Frames: frames, Return: newChannel(), Gate: open, Store: testSlots * storePage,
			Dial: func(context.Context) (io.ReadWriteCloser, error) { return nil, boom }})
		if err := d.Run(t.Context()); !errors.Is(err, boom) {
			t.Errorf("Run: %v", err)
		}
	})
}

// QEMU may be done and gone before the end frame is in.
func TestQEMUDoneFirst(t *testing.T) {
	l := land(t, open)
	l.send(t, startFrame, []byte{frameTail}, bytesFrame([]byte("state")))
	l.expect(t, "state")
	l.qemu.Write(shutMessage)
	l.qemu.Close()
	for len(l.returns.frames) == 0 {
		time.Sleep(time.Millisecond)
	}
	l.send(t, endFrame(5))
	if err := <-l.done; err != nil {
		t.Fatal(err)
	}
}

func TestDestNeverDialsWithoutStart(t *testing.T) {
	for _, frame := range [][]byte{{}, {frameStart}, {frameStart, 0, Version + 1}, startFrame[:startLength-1], append(bytes.Clone(startFrame), 0),
		{frameStart, 0, Version, 0, 0, 0, testSlots + 1}, {frameTail}, bytesFrame([]byte("x")), endFrame(0)} {
		frames := newChannel()
		frames.Send(t.Context(), frame)
		d := NewDest(DestConfig{Frames: frames, Return: newChannel(), Gate: open, Store: testSlots * storePage,
			Dial: func(context.Context) (io.ReadWriteCloser, error) {
				t.Errorf("dialled for frame %x", frame)
				return nil, io.EOF
			}})
		if err := d.Run(t.Context()); !errors.Is(err, ErrFrame) {
			t.Errorf("frame %x: %v", frame, err)
		}
	}
}

// opsFrame is a batch with any operations, sealed like an honest one.
func opsFrame(crc uint32, ops ...byte) []byte { return sectionsFrame(crc, ops, nil, nil) }

func sectionsFrame(crc uint32, ops, deltas, contents []byte) []byte {
	return sealed(&batch{pageBits: defaultPageBits, sections: [sections][]byte{ops, deltas, contents}}, crc)
}

// pageOp is the operation of a page that continues the block before: its word,
// its numbers of 32 bits and, of a delta, its length.
func pageOp(op byte, numbers ...uint32) []byte {
	b := binary.BigEndian.AppendUint64([]byte{op}, flagPage|flagContinue)
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

func deltaOp(slot, base uint32, length uint16) []byte {
	return binary.BigEndian.AppendUint16(pageOp(opDelta, slot, base), length)
}

// kept is a valid batch that fills a slot.
func kept(slot uint32, page []byte) []byte {
	return sectionsFrame(checksum(pageRecord(page)), pageOp(opKeep, slot), nil, page)
}

// pageRecord is the record of pageOp in the stream.
func pageRecord(page []byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, flagPage|flagContinue), page...)
}

func zeroOp(word uint64, count uint32, block ...byte) []byte {
	op := binary.BigEndian.AppendUint64([]byte{opZero}, word)
	return append(binary.BigEndian.AppendUint32(op, count), block...)
}

func TestBadFrames(t *testing.T) {
	good := bytesFrame([]byte("memory"))
	patched := func(at int, v byte) []byte { f := bytes.Clone(good); f[at] = v; return f }
	page := make([]byte, testPage)
	delta, _ := compress.AppendDelta(nil, page, content(1), 2*testPage)
	for name, frames := range map[string][][]byte{
		"empty":               {{}},
		"unknown type":        {{0x7f}},
		"second start":        {startFrame},
		"return":              {{frameReturn, 1}},
		"short batch":         {good[:batchHeader-1]},
		"cut batch":           {good[:len(good)-1]},
		"more than a batch":   {append(bytes.Clone(good), 0)},
		"method":              {patched(batchHeader, 9)},
		"page bits small":     {patched(1, minPageBits-1)},
		"page bits large":     {patched(1, maxPageBits+1)},
		"size":                {patched(batchHeader+1, 0xff)},
		"encoded size":        {patched(batchHeader+5, 0xff)},
		"checksum":            {patched(2, good[2]+1)},
		"no operations":       {opsFrame(0)},
		"unknown operation":   {opsFrame(0, 0x44)},
		"cut bytes":           {opsFrame(0, opBytes, 0, 0)},
		"bytes too long":      {opsFrame(0, opBytes, 0xff, 0xff, 0xff, 0xff, 1)},
		"cut run":             {opsFrame(0, opZero, 1)},
		"empty run":           {opsFrame(0, zeroOp(flagZero|flagContinue, 0)...)},
		"endless run":         {opsFrame(0, zeroOp(flagZero|flagContinue, 1<<32-1)...)},
		"run over the bound":  {opsFrame(0, zeroOp(flagZero|flagContinue, maxStream/9+1)...)},
		"run with block":      {opsFrame(0, zeroOp(flagZero, 2, 1, 'a')...)},
		"run, cut block":      {opsFrame(0, zeroOp(flagZero, 1, 2, 'a')...)},
		"run without block":   {opsFrame(0, zeroOp(flagZero, 1)...)},
		"run with page flag":  {opsFrame(0, zeroOp(flagPage|flagContinue, 1)...)},
		"cut page":            {sectionsFrame(0, pageOp(opPage), nil, page[1:])},
		"cut page word":       {sectionsFrame(0, pageOp(opPage)[:5], nil, page)},
		"page with zero flag": {sectionsFrame(0, []byte{opPage, 0, 0, 0, 0, 0, 0, 0, flagZero | flagContinue}, nil, page)},
		"contents left over":  {sectionsFrame(0, pageOp(opPage), nil, append(page, 0))},
		"deltas left over":    {sectionsFrame(0, pageOp(opPage), []byte{0}, page)},
		"only contents":       {sectionsFrame(0, nil, nil, page)},
		"page over the bound": {sectionsFrame(0, append(zeroOp(flagZero|flagContinue, maxStream/9-400), pageOp(opPage)...), nil, page)},

		"cut slot":                {sectionsFrame(0, pageOp(opKeep, 0)[:12], nil, page)},
		"cut page for a slot":     {sectionsFrame(0, pageOp(opKeep, 0), nil, page[1:])},
		"slot beyond the next":    {sectionsFrame(0, pageOp(opKeep, 1), nil, page)},
		"slot beyond the store":   {kept(0, page), kept(1, page), kept(2, page), kept(3, page), kept(4, page)},
		"reference to no slot":    {opsFrame(0, pageOp(opReference, 0)...)},
		"reference to empty slot": {kept(0, page), opsFrame(0, pageOp(opReference, 1)...)},
		"huge reference":          {kept(0, page), opsFrame(0, pageOp(opReference, 1<<32-1)...)},
		"cut reference":           {kept(0, page), opsFrame(0, pageOp(opReference, 0)[:12]...)},
		"delta without base":      {sectionsFrame(0, deltaOp(0, 0, uint16(len(delta))), delta, nil)},
		"delta of an empty slot":  {kept(0, page), sectionsFrame(0, deltaOp(0, 1, uint16(len(delta))), delta, nil)},
		"delta to an empty slot":  {kept(0, page), sectionsFrame(0, deltaOp(2, 0, uint16(len(delta))), delta, nil)},
		"delta too long":          {kept(0, page), sectionsFrame(0, deltaOp(0, 0, uint16(len(delta)+1)), delta, nil)},
		"delta cut":               {kept(0, page), sectionsFrame(0, deltaOp(0, 0, uint16(len(delta)-1)), delta[:len(delta)-1], nil)},
		"delta that does not fit": {kept(0, page), sectionsFrame(0, deltaOp(0, 0, 5), []byte("\x80\x20\x01\x01"), nil)},
		"delta of other content":  {kept(0, content(2)), sectionsFrame(checksum(pageRecord(content(1))), deltaOp(0, 0, uint16(len(delta))), delta, nil)},
		"large page for a slot":   {otherPageSize(sectionsFrame(0, pageOp(opKeep, 0), nil, make([]byte, 2*storePage)))},
		"large page by reference": {kept(0, page), otherPageSize(opsFrame(0, pageOp(opReference, 0)...))},
		"batch over the bound": {opsFrame(0, append(zeroOp(flagZero|flagContinue, maxStream/9),
			append([]byte{opBytes, 0, 0, 1, 0}, make([]byte, 256)...)...)...)},
		"page that was not offered":  {opsFrame(0, pageOp(opHeld, 0)...)},
		"use without an offer":       {useFrame(0, pageOp(opKeep, 0), page)},
		"use of an offer twice":      {offerFrame(0, content(9)), useFrame(checksum(pageRecord(page)), pageOp(opKeep, 0), page), useFrame(checksum(pageRecord(page)), pageOp(opKeep, 0), page)},
		"page that was not found":    {offerFrame(0, content(9)), useFrame(0, pageOp(opHeld, 0), nil)},
		"more than was found":        {offerFrame(0, content(1), content(9)), useFrame(0, append(pageOp(opHeld, 0), pageOp(opHeld, 1)...), nil)},
		"less than was found":        {offerFrame(0, content(1), content(2)), useFrame(checksum(pageRecord(content(1))), pageOp(opHeld, 0), nil)},
		"other than was found":       {offerFrame(0, content(1)), useFrame(checksum(pageRecord(content(2))), pageOp(opHeld, 0), nil)},
		"found for a far slot":       {offerFrame(0, content(1)), useFrame(0, pageOp(opHeld, 1), nil)},
		"found of another size":      {offerFrame(0, content(1), content(1)), otherPageSize(useFrame(0, pageOp(opHeld, 0), nil))},
		"found, cut slot":            {offerFrame(0, content(1)), useFrame(0, pageOp(opHeld, 0)[:12], nil)},
		"offer without number":       {{frameOffer, 0, 0, 0}},
		"offer of nothing":           {offerFrame(0)},
		"offer, cut":                 {offerFrame(0, page)[:numberHeader+sumSize-1]},
		"offer of too much":          {offerFrame(0, slices.Repeat([][]byte{page}, maxOffered+1)...)},
		"offer out of order":         {offerFrame(1, page)},
		"offer twice":                {offerFrame(0, page), offerFrame(0, page)},
		"offers that are never used": tooManyOffers(page),
		"offer in the tail":          {{frameTail}, offerFrame(0, page)},
		"offer at the end":           {offerFrame(0, page), endFrame(0)},

		"tail with payload": {{frameTail, 1}},
		"second tail":       {{frameTail}, {frameTail}},
		"short end":         {{frameEnd, 0}},
		"wrong end":         {good, endFrame(7)},
	} {
		t.Run(name, func(t *testing.T) {
			l := land(t, open)
			l.send(t, startFrame)
			for _, f := range frames {
				l.frames.Send(t.Context(), f)
			}
			if err := <-l.done; !errors.Is(err, ErrFrame) {
				t.Errorf("Run: %v, want ErrFrame", err)
			}
		})
	}
}

// otherPageSize makes a batch one of pages twice the store's.
func otherPageSize(frame []byte) []byte {
	frame[1] = storeBits + 1
	return frame
}

// Every prefix of a batch is refused.
func TestEveryBatchPrefix(t *testing.T) {
	b := newBatch()
	data := []byte("record")
	b.addBytes(data)
	var raw stream
	raw.Write(data)
	raw.zero(1, mainBlock)
	b.addZero(1*testPage|flagZero, append([]byte{byte(len(mainBlock))}, mainBlock...))
	raw.page(2, "", content(2))
	b.addPage(2*testPage|flagPage|flagContinue, nil, content(2))
	raw.page(3, "", content(3))
	b.addKept(3*testPage|flagPage|flagContinue, 0, nil, content(3))
	raw.page(4, "", content(3))
	b.addReference(4*testPage|flagPage|flagContinue, 0, nil)
	next := content(3)
	next[100]++
	raw.page(3, "", next)
	n, _ := b.tryDelta(content(3), next)
	b.addDelta(3*testPage|flagPage|flagContinue, 0, 0, n, nil)
	for i, p := range [][]byte{content(5), content(6)} {
		raw.page(6+i, "", p)
		b.addKept(uint64(6+i)*testPage|flagPage|flagContinue, 0, nil, p)
		b.offer(compress.Sum(p))
	}
	b.found = []compress.Origin{compress.OnSeed, compress.Nowhere}
	frame := sealed(b, checksum(raw.Bytes()))
	u, err := newUnbatch(1)
	if err != nil {
		t.Fatal(err)
	}
	defer u.close()
	for n := range frame {
		u.held = content(5)
		if _, err := u.decode(frame[:n]); !errors.Is(err, ErrFrame) {
			t.Fatalf("%d of %d bytes: %v", n, len(frame), err)
		}
	}
	u.held = content(5)
	got, err := u.decode(frame)
	if err != nil || !bytes.Equal(got, raw.Bytes()) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}
