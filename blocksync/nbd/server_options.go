package nbd

import (
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"
)

// negotiate runs the handshake. chosen is false when the client ended it by ABORT.
func (c *session) negotiate() (chosen bool, err error) {
	hello := binary.BigEndian.AppendUint64(nil, magicInit)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, handshakeFixed|handshakeNoZeroes)
	if err := c.send(hello); err != nil {
		return false, err
	}
	var b [4]byte
	if err := c.read(b[:]); err != nil {
		return false, fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(handshakeFixed|handshakeNoZeroes) != 0 {
		return false, protocolErrorf("client flags %#x", flags)
	}
	c.noZeroes = flags&handshakeNoZeroes != 0

	// What SET_META_CONTEXT selected holds for the export it named.
	var selection string
	for {
		o, data, err := c.readOption()
		if err != nil {
			return false, fmt.Errorf("read option: %w", err)
		}
		switch o {
		case optExportName:
			if !c.choose(string(data)) {
				return false, fmt.Errorf("client asks for export %q, which does not exist", data)
			}
			chosen, err = true, c.sendExport()
		case optAbort:
			c.reply(o, repAck, nil) // for clients that wait for it; others have gone
			return false, nil
		case optGo:
			chosen, err = c.answerGo(o, data)
		case optInfo:
			_, err = c.answerGo(o, data)
		case optList:
			err = c.answerList(o, data)
		case optStructuredReply:
			err = c.answerStructured(o, data)
		case optListMetaContext, optSetMetaContext:
			var name string
			if name, err = c.answerMetaContext(o, data); o == optSetMetaContext {
				selection = name
			}
		default:
			err = c.refuse(o, repErrUnsup, "this server does not know the option")
		}
		if chosen || err != nil {
			c.allocation = c.allocation && selection == c.name
			return chosen, err
		}
	}
}

func (c *session) readOption() (option, []byte, error) {
	var header [optionHeaderSize]byte
	if err := c.read(header[:]); err != nil {
		return 0, nil, err
	}
	h := cursor{b: header[:]}
	magic, o, length := h.u64(), option(h.u32()), h.u32()
	if magic != magicOption {
		return 0, nil, protocolErrorf("option begins with %#x", magic)
	}
	if length > maxOptionData {
		return 0, nil, protocolErrorf("option %d has %d bytes, more than %d", o, length, maxOptionData)
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(c.in, data); err != nil {
		return 0, nil, err
	}
	return o, data, nil
}

func (c *session) reply(o option, t replyType, data []byte) error {
	return c.send(appendOptionReply(nil, o, t, data))
}

func (c *session) refuse(o option, t replyType, why string) error {
	return c.reply(o, t, []byte(messageText(why)))
}

func (c *session) refuseUnknown(o option, name string) error {
	return c.refuse(o, repErrUnknown, fmt.Sprintf("there is no export %q here", name))
}

// choose makes name the export of the session.
func (c *session) choose(name string) bool {
	e, ok := c.server.Exports[name]
	if ok {
		c.name, c.export, c.sizes = name, e, e.blockSizes()
	}
	return ok
}

// sendExport answers EXPORT_NAME.
func (c *session) sendExport() error {
	b := binary.BigEndian.AppendUint64(nil, uint64(c.export.Device.Size()))
	b = binary.BigEndian.AppendUint16(b, c.export.flags(c.structured))
	if !c.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	return c.send(b)
}

// answerGo answers INFO and GO; chosen tells whether it could be granted.
func (c *session) answerGo(o option, data []byte) (chosen bool, err error) {
	name, infos, err := parseGo(data)
	if err != nil {
		return false, c.refuse(o, repErrInvalid, err.Error())
	}
	if !c.choose(name) {
		return false, c.refuseUnknown(o, name)
	}

	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(c.export.Device.Size()))
	b = binary.BigEndian.AppendUint16(b, c.export.flags(c.structured))
	message := appendOptionReply(nil, o, repInfo, b)

	if slices.Contains(infos, infoName) {
		b = binary.BigEndian.AppendUint16(b[:0], infoName)
		message = appendOptionReply(message, o, repInfo, append(b, name...))
	}

	b = binary.BigEndian.AppendUint16(b[:0], infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, c.sizes.min)
	b = binary.BigEndian.AppendUint32(b, c.sizes.preferred)
	b = binary.BigEndian.AppendUint32(b, c.sizes.max)
	message = appendOptionReply(message, o, repInfo, b)

	// A client that does not ask for block sizes would not keep to them.
	if c.sizes.min > 1 && !slices.Contains(infos, infoBlockSize) {
		why := fmt.Sprintf("requests to this export are multiples of %d bytes; ask for its block sizes", c.sizes.min)
		message = appendOptionReply(message, o, repErrBlockSizeReqd, []byte(why))
		return false, c.send(message)
	}
	message = appendOptionReply(message, o, repAck, nil)
	return true, c.send(message)
}

func (c *session) answerList(o option, data []byte) error {
	if len(data) != 0 {
		return c.refuse(o, repErrInvalid, "LIST carries no data")
	}
	for _, name := range slices.Sorted(maps.Keys(c.server.Exports)) {
		if err := c.reply(o, repServer, appendString(nil, name)); err != nil {
			return err
		}
	}
	return c.reply(o, repAck, nil)
}

func (c *session) answerStructured(o option, data []byte) error {
	if len(data) != 0 {
		return c.refuse(o, repErrInvalid, "STRUCTURED_REPLY carries no data")
	}
	c.structured = true
	return c.reply(o, repAck, nil)
}

// allocationID is the server's id of base:allocation on the wire.
const allocationID = 1

// answerMetaContext answers LIST_META_CONTEXT and SET_META_CONTEXT; the latter replaces
// what was selected before, also when it fails.
func (c *session) answerMetaContext(o option, data []byte) (name string, err error) {
	if o == optSetMetaContext {
		c.allocation = false
	}
	if !c.structured {
		return "", c.refuse(o, repErrInvalid, "ask for structured replies first")
	}
	name, queries, err := parseMetaContext(data)
	if err != nil {
		return "", c.refuse(o, repErrInvalid, err.Error())
	}
	export, ok := c.server.Exports[name]
	if !ok {
		return name, c.refuseUnknown(o, name)
	}
	matches := func(query string) bool {
		return query == contextAllocation || o == optListMetaContext && query == "base:"
	}
	wanted := slices.ContainsFunc(queries, matches) || o == optListMetaContext && len(queries) == 0
	if _, ok := export.Device.(blockStatuser); ok && wanted {
		id := uint32(0) // in a list, ids have no meaning
		if o == optSetMetaContext {
			c.allocation = true
			id = allocationID
		}
		b := binary.BigEndian.AppendUint32(nil, id)
		if err := c.reply(o, repMetaContext, append(b, contextAllocation...)); err != nil {
			return name, err
		}
	}
	return name, c.reply(o, repAck, nil)
}
