package memsync

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// draw builds a stream out of what QEMU may send, in any order.
func draw(t *rapid.T) *stream {
	s := &stream{}
	s.header()
	if rapid.Bool().Draw(t, "configuration") {
		s.configuration()
	}
	if rapid.Bool().Draw(t, "return path") {
		s.returnPath()
	}
	s.ramStart()
	blocks := []string{mainBlock, romBlock}
	block, fresh := "", true
	for range rapid.IntRange(0, 6).Draw(t, "parts") {
		s.part(sectionPart)
		fresh = true
		for range rapid.IntRange(0, 40).Draw(t, "records") {
			name := ""
			if fresh || rapid.IntRange(0, 9).Draw(t, "switch") == 0 {
				block = rapid.SampledFrom(blocks).Draw(t, "block")
				name, fresh = block, false
			}
			page := rapid.IntRange(0, romPages-3).Draw(t, "page")
			switch rapid.IntRange(0, 5).Draw(t, "record") {
			case 0, 1:
				s.zero(page, name)
				for i := range rapid.IntRange(0, 2).Draw(t, "run") {
					s.zero(page+1+i, "")
				}
			case 2, 3:
				s.page(page, name, version(t, page))
			case 4:
				s.at(page, flagXbzrle, name)
				delta := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "delta")
				s.u8(1)
				s.u16(uint16(len(delta)))
				s.Write(delta)
			case 5:
				s.at(page, flagZero, name)
				s.u8(rapid.Byte().Draw(t, "fill"))
			}
		}
		s.contentsEnd()
		if rapid.Bool().Draw(t, "footer") {
			s.footer()
		}
	}
	s.ramEnd()
	s.Write(rapid.SliceOfN(rapid.Byte(), 0, 2000).Draw(t, "device state"))
	if rapid.Bool().Draw(t, "description") {
		s.description()
	}
	return s
}

// version is a page of few contents, with few changes.
func version(t *rapid.T, page int) []byte {
	p := content(uint64(page % 5))
	for range rapid.IntRange(0, 3).Draw(t, "changes") {
		p[rapid.IntRange(0, testPage-1).Draw(t, "at")] = rapid.Byte().Draw(t, "value")
	}
	return p
}

func TestAnyStream(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		drawn := draw(t)
		data := drawn.Bytes()
		understood := true
		switch rapid.IntRange(0, 5).Draw(t, "harm") {
		case 0:
			data = data[:rapid.IntRange(0, len(data)).Draw(t, "cut")]
			understood = false
		case 1:
			at := rapid.IntRange(0, len(data)-1).Draw(t, "at")
			garbage := rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "garbage")
			data = slices.Concat(data[:at], garbage, data[at:])
			understood = false
		case 2:
			data[rapid.IntRange(0, len(data)-1).Draw(t, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
			understood = false
		}
		sizes := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 50), rapid.IntRange(1, 70000)), 0, 5).Draw(t, "reads")
		if len(sizes) > 0 && slices.Max(sizes) < 10 {
			sizes = append(sizes, 5000) // one byte at a time is for TestReadSizes
		}
		store := rapid.SampledFrom([]int64{0, 1, 1, 2, 3, 10, 1000}).Draw(t, "slots") * storePage
		var have searcher
		if rapid.Bool().Draw(t, "have") {
			have = newFickle(t, drawn.pages)
		}
		above := rapid.SampledFrom([]uint64{0, 0, 100 * testPage, offerAbove}).Draw(t, "offer above")
		c := carryOffered(store, have, above, data, sizes...)
		if !bytes.Equal(c.out, data) || c.dest != nil {
			t.Fatalf("%d bytes became %d, source: %v, destination: %v", len(data), len(c.out), c.src, c.dest)
		}
		if understood && (c.source.Opaque() || c.tails != 1) {
			t.Fatalf("a valid stream was not understood: %+v", c.source.Stats())
		}
	})
}

func FuzzSource(f *testing.F) {
	f.Add(small().Bytes(), uint16(0))
	f.Add(whole(false)[:5000], uint16(100))
	f.Add([]byte("QEVM\x00\x00\x00\x03\x07"), uint16(1))
	f.Add([]byte{}, uint16(0))
	s := &stream{}
	s.header()
	s.section(4, 1, "virtio-mem", 1)
	s.description()
	f.Add(s.Bytes(), uint16(9))
	f.Fuzz(func(t *testing.T, data []byte, size uint16) {
		var sizes []int
		if size > 0 {
			sizes = []int{int(size)}
		}
		carry(bytes.Clone(data), sizes...).check(t, data)
		have := pages{}
		for at := 0; at+testPage <= len(data); at++ { // whatever is taken for a page
			if binary.BigEndian.Uint64(data[max(0, at-8):])&flagPage != 0 {
				have.add(data[at : at+testPage])
			}
		}
		carryOffered(100*storePage, have, 0, bytes.Clone(data), sizes...).check(t, data)
	})
}

// FuzzDest takes frames as u16 length and bytes. The batches among them get
// their checksum so that it hides nothing behind it.
func FuzzDest(f *testing.F) {
	pack := func(frames ...[]byte) (out []byte) {
		for _, fr := range frames {
			out = append(binary.BigEndian.AppendUint16(out, uint16(len(fr))), fr...)
		}
		return out
	}
	f.Add(pack(startFrame, bytesFrame([]byte("memory")), []byte{frameTail}, bytesFrame([]byte("state")), endFrame(11)))
	f.Add(pack(startFrame, opsFrame(0, zeroOp(flagZero|flagContinue, 1000)...), endFrame(9000)))
	f.Add(pack(startFrame, opsFrame(0, zeroOp(flagZero, 1, 1, 'a')...)))
	f.Add(pack(startFrame, sectionsFrame(0, pageOp(opPage), nil, content(1))))
	f.Add(pack(startFrame, kept(0, content(1)), opsFrame(0, pageOp(opReference, 0)...), kept(1, content(2)),
		sectionsFrame(0, deltaOp(2, 1, 3), []byte("\x09\x01\x01"), nil), opsFrame(0, pageOp(opReference, 2)...)))
	f.Add(pack([]byte{frameTail}))
	f.Add(pack(startFrame, bytesFrame([]byte("memory")), markFrame(1), []byte{frameTail}, markFrame(2), []byte{frameMark, 0, 0}))
	f.Add(pack(startFrame, offerFrame(0, content(1), content(9), content(2)), offerFrame(1, content(9)),
		useFrame(0, slices.Concat(pageOp(opHeld, 0), pageOp(opReference, 0), pageOp(opHeld, 1)), nil), useFrame(0, pageOp(opKeep, 2), content(9))))
	f.Fuzz(func(t *testing.T, data []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		frames, returns, qemu := newChannel(), newChannel(), newSink()
		d := NewDest(DestConfig{Frames: frames, Return: returns, Dial: dialTo(qemu), Gate: open, Store: testSlots * storePage, Have: somePages})
		var wg sync.WaitGroup
		wg.Go(func() { d.Run(ctx); cancel() })
		wg.Go(func() {
			for err := error(nil); err == nil; _, err = returns.Recv(ctx, nil) {
			}
		})
		shadow, err := newUnbatch(testSlots)
		if err != nil {
			t.Fatal(err)
		}
		defer shadow.close()
		offers := newOffers(somePages, nil)
		for len(data) >= 2 {
			n := min(int(binary.BigEndian.Uint16(data)), len(data)-2)
			frames.Send(ctx, withChecksum(shadow, offers, data[2:2+n]))
			data = data[2+n:]
		}
		frames.closeSend()
		wg.Wait()
		if ctx.Err() == context.DeadlineExceeded {
			t.Fatal("Run did not end")
		}
		if d.in == nil {
			return
		}
		taken := cap(d.in.out)
		for _, s := range d.in.decoded {
			taken += cap(s)
		}
		if taken > 2*(maxStream+maxOps+maxStream+maxStream/storePage*maxDelta) {
			t.Fatalf("hostile frames took %d bytes", taken)
		}
	})
}

// FuzzBatch decodes a batch of any sections twice, the second time with the
// checksum of what the first gave, by a store of four slots with two filled.
func FuzzBatch(f *testing.F) {
	page := content(1)
	f.Add(uint8(12), slices.Concat(pageOp(opReference, 1), pageOp(opKeep, 2), deltaOp(3, 2, 3), deltaOp(3, 3, 0)), []byte("\x09\x01\x01"), page)
	f.Add(uint8(12), pageOp(opReference, 2), []byte{}, []byte{})
	f.Add(uint8(12), deltaOp(0, 1, 4), []byte("\xff\x1f\x01\x01"), []byte{})
	f.Add(uint8(13), pageOp(opPage), []byte{}, append(page, page...))
	f.Add(uint8(12), append(zeroOp(flagZero, 1, 1, 'a'), zeroOp(flagZero|flagContinue, 500)...), []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, bits uint8, ops, deltas, contents []byte) {
		decode := func(frame []byte) (*unbatch, error) {
			u, err := newUnbatch(testSlots)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { u.close() })
			u.store.put(0, content(2))
			u.store.put(1, content(3))
			_, err = u.decode(frame)
			return u, err
		}
		frame := sectionsFrame(0, ops, deltas, contents)
		frame[1] = bits
		u, err := decode(frame)
		if err != nil && !errors.Is(err, ErrFrame) {
			t.Fatal(err)
		}
		binary.BigEndian.PutUint32(frame[2:], checksum(u.out))
		if u, err = decode(frame); err == nil && len(u.out) == 0 || len(u.out) > maxStream || u.store.filled > testSlots {
			t.Fatalf("%d stream bytes, %d slots are filled, error %v", len(u.out), u.store.filled, err)
		}
	})
}

// withChecksum seals a batch; shadow has the page store of those before it, and
// offers those that are open.
func withChecksum(shadow *unbatch, offers *offers, frame []byte) []byte {
	if len(frame) > 0 && frame[0] == frameOffer && offers.take(frame) == nil {
		x := <-offers.asked
		offers.search(context.Background(), x)
		close(x.done)
	}
	if len(frame) < batchHeader || frame[0] != frameBatch && frame[0] != frameUse {
		return frame
	}
	shadow.held = nil
	if frame[0] == frameUse {
		shadow.held, _ = offers.use(context.Background())
	}
	frame = bytes.Clone(frame)
	shadow.decode(frame)
	binary.BigEndian.PutUint32(frame[2:], checksum(shadow.out))
	return frame
}
