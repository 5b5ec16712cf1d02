package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	magicInit        = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicChunk       = 0x668e33ef
)

// Handshake flags; the client's flags are the same bits.
const (
	handshakeFixed    = 1 << 0
	handshakeNoZeroes = 1 << 1
)

type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
)

type replyType uint32

const (
	repAck         replyType = 1
	repServer      replyType = 2
	repInfo        replyType = 3
	repMetaContext replyType = 4

	repError            replyType = 1 << 31
	repErrUnsup                   = repError + 1
	repErrInvalid                 = repError + 3
	repErrTLSRequired             = repError + 5
	repErrUnknown                 = repError + 6
	repErrBlockSizeReqd           = repError + 8
)

const (
	infoExport    = 0
	infoName      = 1
	infoBlockSize = 3
)

// Transmission flags: what an export offers.
const (
	flagHasFlags    = 1 << 0
	flagReadOnly    = 1 << 1
	flagFlush       = 1 << 2
	flagFUA         = 1 << 3
	flagTrim        = 1 << 5
	flagWriteZeroes = 1 << 6
	flagDF          = 1 << 7
	flagMultiConn   = 1 << 8
	flagCache       = 1 << 10
)

type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdCache       command = 5
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

func (c command) String() string {
	switch c {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdDisc:
		return "disconnect"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdCache:
		return "cache"
	case cmdWriteZeroes:
		return "zero"
	case cmdBlockStatus:
		return "block status"
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// writes tells whether a command changes the export.
func (c command) writes() bool {
	return c == cmdWrite || c == cmdTrim || c == cmdWriteZeroes
}

// Command flags.
const (
	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1
	cmdFlagDF     = 1 << 2
	cmdFlagReqOne = 1 << 3
)

type chunkType uint16

const (
	chunkNone        chunkType = 0
	chunkData        chunkType = 1
	chunkHole        chunkType = 2
	chunkBlockStatus chunkType = 5
	chunkIsError     chunkType = 1 << 15
	chunkError                 = chunkIsError + 1
	chunkErrorOffset           = chunkIsError + 2
)

const chunkDone = 1 << 0 // chunk flag: the last of its reply

// States of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

const contextAllocation = "base:allocation"

// Limits. What a peer announces is held against them before anything is allocated.
const (
	maxString        = 4096     // names and messages, by the protocol
	maxOptionData    = 64 << 10 // data of one option or of one reply to it
	maxData          = 32 << 20 // data of one READ or WRITE, the protocol's default
	maxMinBlock      = 64 << 10 // by the protocol
	maxExtents       = 64 << 10 // extents of one BLOCK_STATUS reply of ours
	maxTheirExtents  = 1 << 20  // and of a server's: nbdkit sends so many, QEMU an eighth
	optionHeaderSize = 16
	replyHeaderSize  = 20
	requestSize      = 28
	simpleReplySize  = 16
	chunkHeaderSize  = 20
)

// ErrProtocol is returned when the peer sends what the protocol does not allow; the
// connection is of no further use.
var ErrProtocol = errors.New("nbd protocol violation")

func protocolErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

type request struct {
	flags  uint16
	cmd    command
	cookie uint64
	offset uint64
	length uint32
}

func (r request) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, r.flags)
	b = binary.BigEndian.AppendUint16(b, uint16(r.cmd))
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	return binary.BigEndian.AppendUint32(b, r.length)
}

func parseRequest(b *[requestSize]byte) (request, error) {
	c := cursor{b: b[:]}
	if magic := c.u32(); magic != magicRequest {
		return request{}, protocolErrorf("request begins with %#x", magic)
	}
	return request{
		flags:  c.u16(),
		cmd:    command(c.u16()),
		cookie: c.u64(),
		offset: c.u64(),
		length: c.u32(),
	}, nil
}

func appendSimpleReply(b []byte, code uint32, cookie uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimple)
	b = binary.BigEndian.AppendUint32(b, code)
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunkHeader begins a chunk that is the last of its reply.
func appendChunkHeader(b []byte, t chunkType, cookie uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, magicChunk)
	b = binary.BigEndian.AppendUint16(b, chunkDone)
	b = binary.BigEndian.AppendUint16(b, uint16(t))
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

func appendOptionHeader(b []byte, o option, length int) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

func appendOptionReply(b []byte, o option, t replyType, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptionReply)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(t))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// appendGo writes the data of INFO and GO.
func appendGo(b []byte, name string, infos ...uint16) []byte {
	b = appendString(b, name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, info := range infos {
		b = binary.BigEndian.AppendUint16(b, info)
	}
	return b
}

func parseGo(data []byte) (name string, infos []uint16, err error) {
	c := cursor{b: data}
	name = c.str()
	for n := c.u16(); n > 0 && !c.short; n-- {
		infos = append(infos, c.u16())
	}
	if !c.end() {
		return "", nil, protocolErrorf("%d bytes are not an export name and a list of wishes", len(data))
	}
	return name, infos, checkName(name)
}

// appendMetaContext writes the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func appendMetaContext(b []byte, name string, queries ...string) []byte {
	b = appendString(b, name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = appendString(b, q)
	}
	return b
}

func parseMetaContext(data []byte) (name string, queries []string, err error) {
	c := cursor{b: data}
	name = c.str()
	for n := c.u32(); n > 0 && !c.short; n-- {
		queries = append(queries, c.str())
	}
	if !c.end() {
		return "", nil, protocolErrorf("%d bytes are not an export name and a list of queries", len(data))
	}
	return name, queries, checkName(name)
}

func checkName(name string) error {
	switch {
	case len(name) > maxString:
		return protocolErrorf("a name has %d bytes, more than %d", len(name), maxString)
	case !utf8.ValidString(name) || strings.ContainsRune(name, 0):
		return protocolErrorf("the name %q is not UTF-8 text", name)
	}
	return nil
}

// cursor reads big-endian fields. Reading past the end gives zeros and sets short.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) take(n int) []byte {
	if c.short || n > len(c.b) {
		c.short, c.b = true, nil
		return nil
	}
	head := c.b[:n]
	c.b = c.b[n:]
	return head
}

func (c *cursor) u16() uint16 {
	if b := c.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if b := c.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// str reads a u32 length and as many bytes.
func (c *cursor) str() string {
	n := c.u32()
	if uint64(n) > uint64(len(c.b)) {
		c.short, c.b = true, nil
		return ""
	}
	return string(c.take(int(n)))
}

// end tells whether everything was there, and nothing more.
func (c *cursor) end() bool { return !c.short && len(c.b) == 0 }
