package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// negotiate runs the handshake, using what the server offers.
func (c *Client) negotiate() error {
	var hello [18]byte
	if _, err := io.ReadFull(c.in, hello[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	h := cursor{b: hello[:]}
	if magic := h.u64(); magic != magicInit {
		return protocolErrorf("greeting begins with %#x", magic)
	}
	if magic := h.u64(); magic != magicOption {
		return protocolErrorf("the server does not speak the newstyle handshake: greeting goes on with %#x", magic)
	}
	flags := uint32(h.u16()) & (handshakeFixed | handshakeNoZeroes)
	if _, err := c.conn.Write(binary.BigEndian.AppendUint32(nil, flags)); err != nil {
		return fmt.Errorf("send client flags: %w", err)
	}
	if flags&handshakeFixed != 0 {
		if err := c.askStructured(); err != nil {
			return err
		}
		chosen, err := c.askGo()
		if chosen || err != nil {
			return err
		}
	}
	return c.askExportName(flags&handshakeNoZeroes == 0)
}

// askStructured asks for structured replies and, if it gets them, for base:allocation.
func (c *Client) askStructured() error {
	err := c.ask(optStructuredReply, nil, nil)
	if refused, err := isRefusal(err); refused || err != nil {
		return err
	}
	c.structured = true

	err = c.ask(optSetMetaContext, appendMetaContext(nil, c.export, contextAllocation), func(t replyType, data []byte) error {
		if t != repMetaContext {
			return protocolErrorf("reply of type %d where a metadata context is due", t)
		}
		d := cursor{b: data}
		c.contextID = d.u32()
		if d.short || string(d.b) != contextAllocation || c.allocation {
			return protocolErrorf("metadata context %q was not asked for", d.b)
		}
		c.allocation = true
		return nil
	})
	if refused, err := isRefusal(err); err != nil {
		return err
	} else if refused {
		c.allocation = false
	}
	return nil
}

// askGo opens the export; chosen is false if the server does not know the option.
func (c *Client) askGo() (chosen bool, err error) {
	haveExport := false
	err = c.ask(optGo, appendGo(nil, c.export, infoBlockSize), func(t replyType, data []byte) error {
		if t != repInfo {
			return protocolErrorf("reply of type %d where an information is due", t)
		}
		d := cursor{b: data}
		switch kind := d.u16(); kind {
		case infoExport:
			size, flags := d.u64(), d.u16()
			if !d.end() {
				return protocolErrorf("export information of %d bytes", len(data))
			}
			haveExport = true
			return c.setExport(size, flags)
		case infoBlockSize:
			sizes := blockSizes{min: d.u32(), preferred: d.u32(), max: d.u32()}
			if !d.end() {
				return protocolErrorf("block size information of %d bytes", len(data))
			}
			return c.setBlockSizes(sizes)
		default: // not asked for
			if d.short {
				return protocolErrorf("information of %d bytes", len(data))
			}
			return nil
		}
	})
	refused, failure := isRefusal(err)
	switch {
	case failure != nil:
		return false, failure
	case refused:
		return false, nil
	case !haveExport:
		return false, protocolErrorf("the server opens the export without telling its size")
	}
	return true, nil
}

// askExportName opens the export the old way, which has no answer but the end of the
// connection for an unknown name.
func (c *Client) askExportName(zeroes bool) error {
	message := appendOptionHeader(nil, optExportName, len(c.export))
	if _, err := c.conn.Write(append(message, c.export...)); err != nil {
		return fmt.Errorf("send export name: %w", err)
	}
	answer := make([]byte, 10, 134)
	if zeroes {
		answer = answer[:134]
	}
	if _, err := io.ReadFull(c.in, answer); err != nil {
		return fmt.Errorf("read size of export, which the server may not have: %w", err)
	}
	d := cursor{b: answer}
	return c.setExport(d.u64(), d.u16())
}

func (c *Client) setExport(size uint64, flags uint16) error {
	if size > math.MaxInt64 {
		return protocolErrorf("export of %d bytes", size)
	}
	if flags&flagHasFlags == 0 {
		flags = 0
	}
	c.size, c.flags = int64(size), flags
	return nil
}

func (c *Client) setBlockSizes(s blockSizes) error {
	if err := s.check(); err != nil {
		return protocolErrorf("%v", err)
	}
	s.max = min(s.max, maxData)
	if s.max%s.min != 0 {
		return protocolErrorf("maximum block size %d is not a multiple of the minimum of %d", s.max, s.min)
	}
	c.sizes = s
	return nil
}

// refusal is the server's answer that it will not grant an option.
type refusal struct {
	option option
	reply  replyType
	text   string
}

func (r *refusal) Error() string {
	what := fmt.Sprintf("the server refuses option %d with error %d", r.option, r.reply-repError)
	switch r.reply {
	case repErrUnknown:
		what = ErrUnknownExport.Error()
	case repErrTLSRequired:
		what = "the server asks for TLS, which this client does not speak"
	}
	if r.text != "" {
		what += fmt.Sprintf(" (%q)", r.text)
	}
	return what
}

func (r *refusal) Is(target error) bool {
	return target == ErrUnknownExport && r.reply == repErrUnknown
}

// isRefusal tells a server that lacks an option, which the client can do without, from an
// error that it cannot get past.
func isRefusal(err error) (refused bool, failure error) {
	var r *refusal
	if errors.As(err, &r) && (r.reply != repErrUnknown && r.reply != repErrTLSRequired) {
		return true, nil
	}
	return false, err
}

// ask sends an option and reads its replies up to the final one; each before goes to reply. If
// the final one is not ACK, the error is a *refusal.
func (c *Client) ask(o option, data []byte, reply func(replyType, []byte) error) error {
	if _, err := c.conn.Write(append(appendOptionHeader(nil, o, len(data)), data...)); err != nil {
		return fmt.Errorf("send option %d: %w", o, err)
	}
	for {
		t, data, err := c.readOptionReply(o)
		switch {
		case err != nil:
			return fmt.Errorf("read reply to option %d: %w", o, err)
		case t&repError != 0:
			return &refusal{option: o, reply: t, text: messageText(string(data))}
		case t == repAck:
			return nil
		case reply == nil:
			return protocolErrorf("reply of type %d to option %d", t, o)
		}
		if err := reply(t, data); err != nil {
			return fmt.Errorf("reply to option %d: %w", o, err)
		}
	}
}

func (c *Client) readOptionReply(o option) (replyType, []byte, error) {
	var header [replyHeaderSize]byte
	if _, err := io.ReadFull(c.in, header[:]); err != nil {
		return 0, nil, err
	}
	h := cursor{b: header[:]}
	magic, of, t, length := h.u64(), option(h.u32()), replyType(h.u32()), h.u32()
	switch {
	case magic != magicOptionReply:
		return 0, nil, protocolErrorf("reply begins with %#x", magic)
	case of != o:
		return 0, nil, protocolErrorf("reply is to option %d", of)
	case length > maxOptionData:
		return 0, nil, protocolErrorf("reply has %d bytes, more than %d", length, maxOptionData)
	}
	data := make([]byte, length)
	_, err := io.ReadFull(c.in, data)
	return t, data, err
}
