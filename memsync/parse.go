package memsync

import (
	"context"
	"encoding/binary"
)

// structure passes the stream on up to the end of the RAM section. It returns
// errForeign, with the record it stopped at untouched, where the stream is not
// understood.
func (s *Source) structure(ctx context.Context) error {
	b, err := s.peek(ctx, 8)
	if err != nil {
		return err
	}
	if binary.BigEndian.Uint32(b) != streamMagic || binary.BigEndian.Uint32(b[4:]) != streamVersion {
		return errForeign
	}
	if err := s.pass(ctx, 8); err != nil {
		return err
	}
	for {
		b, err := s.peek(ctx, 1)
		if err != nil {
			return err
		}
		kind := b[0]
		switch kind {
		case sectionConfiguration:
			err = s.configuration(ctx)
		case sectionSubsection:
			err = s.subsection(ctx)
		case sectionCommand:
			err = s.command(ctx)
		case sectionFooter:
			err = s.passNext(ctx, 5)
		case sectionStart:
			err = s.sectionStart(ctx)
		case sectionPart, sectionLast:
			err = s.sectionPart(ctx, kind)
		default:
			return errForeign
		}
		if err != nil || kind == sectionLast {
			return err
		}
	}
}

// passNext waits for n bytes and passes them on.
func (s *Source) passNext(ctx context.Context, n int) error {
	if _, err := s.peek(ctx, n); err != nil {
		return err
	}
	return s.pass(ctx, n)
}

func (s *Source) configuration(ctx context.Context) error {
	b, err := s.peek(ctx, 5)
	if err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(b[1:])
	if n > maxMachineName {
		return errForeign
	}
	return s.passNext(ctx, 5+int(n))
}

// subsection passes a part of the configuration. One that lists capabilities
// is foreign: they change the records of the RAM section.
func (s *Source) subsection(ctx context.Context) error {
	b, err := s.peek(ctx, 2)
	if err != nil {
		return err
	}
	n := 2 + int(b[1]) + 4
	if b, err = s.peek(ctx, n); err != nil {
		return err
	}
	switch string(b[2 : n-4]) {
	case "configuration/target-page-bits":
		if b, err = s.peek(ctx, n+4); err != nil {
			return err
		}
		bits := binary.BigEndian.Uint32(b[n:])
		if bits < minPageBits || bits > maxPageBits || s.hasRAM {
			return errForeign
		}
		if err := s.flush(ctx); err != nil { // a batch has one page size
			return err
		}
		s.pageBits, s.batch.pageBits = uint8(bits), uint8(bits)
		return s.pass(ctx, n+4)
	case "configuration/uuid":
		return s.passNext(ctx, n+16)
	}
	return errForeign
}

func (s *Source) command(ctx context.Context) error {
	b, err := s.peek(ctx, 5)
	if err != nil {
		return err
	}
	switch binary.BigEndian.Uint16(b[1:]) {
	case commandOpenReturnPath:
		s.openReturnPath = true
	case commandPackaged:
		// Postcopy: device state is in the package and the destination runs
		// after it, so what follows has no tail to hold back.
		return errForeign
	}
	return s.passNext(ctx, 5+int(binary.BigEndian.Uint16(b[3:])))
}

// sectionStart passes the start of the RAM section, which is the only section
// in parts whose contents are understood.
func (s *Source) sectionStart(ctx context.Context) error {
	b, err := s.peek(ctx, 6)
	if err != nil {
		return err
	}
	n := 6 + int(b[5])
	if b, err = s.peek(ctx, n+8); err != nil {
		return err
	}
	if string(b[6:n]) != ramName || binary.BigEndian.Uint32(b[n+4:]) != ramVersion || s.hasRAM {
		return errForeign
	}
	s.ramID, s.hasRAM = binary.BigEndian.Uint32(b[1:]), true
	if err := s.pass(ctx, n+8); err != nil {
		return err
	}
	return s.contents(ctx)
}

func (s *Source) sectionPart(ctx context.Context, kind byte) error {
	b, err := s.peek(ctx, 5)
	if err != nil {
		return err
	}
	if !s.hasRAM || binary.BigEndian.Uint32(b[1:]) != s.ramID {
		return errForeign
	}
	if kind == sectionPart {
		s.stats.Parts++
	}
	if err := s.pass(ctx, 5); err != nil {
		return err
	}
	return s.contents(ctx)
}

// contents passes the records of a RAM section up to and with their end.
func (s *Source) contents(ctx context.Context) error {
	mask := uint64(1)<<s.pageBits - 1
	for {
		b, err := s.peek(ctx, 8)
		if err != nil {
			return err
		}
		word := binary.BigEndian.Uint64(b)
		switch word & mask {
		case flagZero, flagZero | flagContinue:
			err = s.zeroPage(ctx, word)
		case flagPage, flagPage | flagContinue:
			err = s.page(ctx, word)
		case flagXbzrle, flagXbzrle | flagContinue:
			err = s.xbzrle(ctx, word)
		case flagCompressed, flagCompressed | flagContinue:
			err = s.compressed(ctx, word)
		case flagSizes:
			err = s.sizes(ctx, word&^mask)
		case flagMultifdFlush:
			err = s.pass(ctx, 8)
		case flagContentsEnd:
			return s.contentsEnd(ctx)
		default:
			err = errForeign
		}
		if err != nil {
			return err
		}
	}
}

func (s *Source) contentsEnd(ctx context.Context) error {
	if err := s.pass(ctx, 8); err != nil {
		return err
	}
	return s.flush(ctx)
}

// sizes passes the list of RAM blocks.
func (s *Source) sizes(ctx context.Context, total uint64) error {
	if s.blocks != nil || total == 0 || total > maxRAM {
		return errForeign
	}
	s.blocks = make(map[string]*block)
	if err := s.pass(ctx, 8); err != nil {
		return err
	}
	for left := total; left > 0; {
		b, err := s.peek(ctx, 1)
		if err != nil {
			return err
		}
		n := 1 + int(b[0])
		if b, err = s.peek(ctx, n+8); err != nil {
			return err
		}
		id, length := string(b[1:n]), binary.BigEndian.Uint64(b[n:])
		pages := length >> s.pageBits
		if id == "" || s.blocks[id] != nil || length != pages<<s.pageBits || length > left || len(s.blocks) == maxBlocks {
			return errForeign
		}
		s.blocks[id] = newBlock(pages, (total-left)>>s.pageBits)
		left -= length
		if err := s.pass(ctx, n+8); err != nil {
			return err
		}
	}
	s.stats.RAMBytes, s.stats.UnseenPages = total, total>>s.pageBits
	return nil
}

// place finds the page that a record is about. It returns the length of the
// record's head, which is the word and, unless it continues, the block, and
// peeks at that and more bytes.
func (s *Source) place(ctx context.Context, word uint64, more int) (b []byte, head int, err error) {
	head = 8
	if word&flagContinue == 0 {
		if b, err = s.peek(ctx, 9); err != nil {
			return nil, 0, err
		}
		head = 9 + int(b[8])
	}
	if b, err = s.peek(ctx, head+more); err != nil {
		return nil, 0, err
	}
	target := s.current
	if head > 8 {
		target = s.blocks[string(b[9:head])]
	}
	if target == nil || word>>s.pageBits >= target.pages {
		return nil, 0, errForeign
	}
	s.current = target
	return b, head, nil
}

// seen counts a page of the current block, and tells whether it is the first
// time.
func (s *Source) seen(word uint64, count *uint64) bool {
	*count++
	first := s.current.see(word >> s.pageBits)
	s.again++
	if first {
		s.stats.UnseenPages--
		s.again = 0
	}
	return first
}

func (s *Source) zeroPage(ctx context.Context, word uint64) error {
	b, head, err := s.place(ctx, word, 1)
	if err != nil {
		return err
	}
	s.seen(word, &s.stats.ZeroPages)
	if b[head] != 0 || s.in.sent > s.in.rec {
		return s.pass(ctx, head+1)
	}
	if err := s.room(ctx, head+1); err != nil {
		return err
	}
	s.batch.addZero(word, b[8:head])
	s.step(head + 1)
	return nil
}

func (s *Source) page(ctx context.Context, word uint64) error {
	size := 1 << s.pageBits
	b, head, err := s.place(ctx, word, size)
	if err != nil {
		return err
	}
	first := s.seen(word, &s.stats.Pages)
	if s.in.sent > s.in.rec {
		return s.pass(ctx, head+size)
	}
	if err := s.room(ctx, head+size); err != nil {
		return err
	}
	s.reduce(word, b[8:head], b[head:], first && s.batch.asks && s.mayWait())
	s.step(head + size)
	return nil
}

// room makes the batch take n more bytes of the stream.
func (s *Source) room(ctx context.Context, n int) error {
	if s.batch.fits(n) {
		return nil
	}
	return s.flush(ctx)
}

// step goes past a record of n bytes that is in the batch.
func (s *Source) step(n int) {
	s.in.rec += n
	s.in.sent = s.in.rec
}

func (s *Source) xbzrle(ctx context.Context, word uint64) error {
	b, head, err := s.place(ctx, word, 3)
	if err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(b[head+1:]))
	if b[head] != 1 {
		return errForeign
	}
	s.seen(word, &s.stats.Pages)
	return s.passNext(ctx, head+3+n)
}

func (s *Source) compressed(ctx context.Context, word uint64) error {
	b, head, err := s.place(ctx, word, 4)
	if err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(b[head:])
	if n > maxCompressed {
		return errForeign
	}
	s.seen(word, &s.stats.Pages)
	return s.passNext(ctx, head+4+int(n))
}
