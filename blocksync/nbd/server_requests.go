package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"syscall"

	"golang.org/x/sync/semaphore"
)

// transmit serves requests until the client says goodbye or the server drains; an error, the
// client's or the connection's, cancels what is in progress. Nothing is in progress when it
// returns.
func (c *session) transmit() error {
	var inFlight sync.WaitGroup
	err := c.readRequests(&inFlight)
	if cause := context.Cause(c.ctx); cause != nil {
		err = cause // a reply could not be written, or the server ends
	}
	if err != nil && !c.isDraining() {
		c.end(err)
	}
	inFlight.Wait()
	return err
}

func (c *session) readRequests(inFlight *sync.WaitGroup) error {
	slots := semaphore.NewWeighted(maxInFlight)
	budget := semaphore.NewWeighted(maxInFlightBytes)
	for {
		var header [requestSize]byte
		if err := c.read(header[:]); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		req, err := parseRequest(&header)
		if err != nil {
			return err
		}
		if req.cmd == cmdDisc {
			return nil
		}
		if req.cmd == cmdWrite && req.length > maxData {
			return protocolErrorf("write of %d bytes, more than %d", req.length, maxData)
		}
		refusal := c.check(req)
		held := int64(0)
		if refusal == nil && (req.cmd == cmdRead || req.cmd == cmdWrite) {
			held = int64(req.length)
		}
		// Both fail only when the session has ended.
		if err := slots.Acquire(c.ctx, 1); err != nil {
			return err
		}
		if err := budget.Acquire(c.ctx, held); err != nil {
			return err
		}
		var data *[]byte
		if held > 0 {
			data = getBuffer(int(held))
		}
		if req.cmd == cmdWrite {
			if err := readPayload(c.in, data, req.length); err != nil {
				return fmt.Errorf("read %d bytes to write: %w", req.length, err)
			}
		}
		inFlight.Go(func() {
			c.answer(req, data, refusal)
			if data != nil {
				putBuffer(data)
			}
			budget.Release(held)
			slots.Release(1)
		})
	}
}

// readPayload reads the data of a write, or passes over it if data is nil.
func readPayload(in *bufio.Reader, data *[]byte, length uint32) error {
	if data == nil {
		_, err := in.Discard(int(length))
		return err
	}
	_, err := io.ReadFull(in, *data)
	return err
}

// check gives what is wrong with a request, if anything is: an error that wraps the
// syscall.Errno to answer.
func (c *session) check(req request) error {
	allowed := uint16(cmdFlagFUA)
	switch req.cmd {
	case cmdRead:
		allowed |= cmdFlagDF
	case cmdWrite, cmdTrim, cmdCache:
	case cmdWriteZeroes:
		allowed |= cmdFlagNoHole
	case cmdFlush:
		if req.offset != 0 || req.length != 0 {
			return fmt.Errorf("flush of a range: %w", syscall.EINVAL)
		}
		return nil
	case cmdBlockStatus:
		allowed |= cmdFlagReqOne
		if !c.allocation {
			return fmt.Errorf("block status without a metadata context: %w", syscall.EINVAL)
		}
	default:
		return fmt.Errorf("%v is not known: %w", req.cmd, syscall.EINVAL)
	}
	switch size := uint64(c.export.Device.Size()); {
	case req.flags&^allowed != 0:
		return fmt.Errorf("%v with flags %#x: %w", req.cmd, req.flags, syscall.EINVAL)
	case req.cmd.writes() && c.export.ReadOnly:
		return fmt.Errorf("the export is read-only: %w", syscall.EPERM)
	case req.length == 0:
		return fmt.Errorf("empty range: %w", syscall.EINVAL)
	case req.offset > size || uint64(req.length) > size-req.offset:
		errno := syscall.EINVAL
		if req.cmd == cmdWrite || req.cmd == cmdWriteZeroes {
			errno = syscall.ENOSPC
		}
		return fmt.Errorf("%d bytes at %d do not lie in the %d of the export: %w", req.length, req.offset, size, errno)
	case req.offset%uint64(c.sizes.min) != 0 || req.length%c.sizes.min != 0:
		return fmt.Errorf("%d bytes at %d are not whole blocks of %d: %w", req.length, req.offset, c.sizes.min, syscall.EINVAL)
	case (req.cmd == cmdRead || req.cmd == cmdWrite) && req.length > c.sizes.max:
		return fmt.Errorf("%d bytes are more than %d: %w", req.length, c.sizes.max, syscall.EINVAL)
	}
	return nil
}

// answer serves a request, with data to write or to read into, and replies. A reply that
// cannot be written has ended the session, which is why nobody here looks at the error.
func (c *session) answer(req request, data *[]byte, refusal error) {
	if refusal != nil {
		c.replyError(req, refusal)
		return
	}
	var extents []Extent
	var err error
	off, n, fua := int64(req.offset), int64(req.length), req.flags&cmdFlagFUA != 0
	d := c.export.Device
	switch req.cmd {
	case cmdRead:
		err = d.ReadAt(c.ctx, *data, off)
	case cmdWrite:
		err = d.WriteAt(c.ctx, *data, off, fua)
	case cmdFlush:
		err = d.Flush(c.ctx)
	case cmdTrim:
		err = d.Trim(c.ctx, off, n, fua)
	case cmdWriteZeroes:
		err = d.Zero(c.ctx, off, n, ZeroFlags{FUA: fua, NoHole: req.flags&cmdFlagNoHole != 0})
	case cmdBlockStatus:
		extents, err = d.(blockStatuser).BlockStatus(c.ctx, off, n)
	}
	switch {
	case err != nil:
		if c.ctx.Err() == nil {
			c.server.log().Warn("nbd request failed", "export", c.name,
				"command", req.cmd.String(), "offset", req.offset, "length", req.length, "err", err)
		}
		c.replyError(req, err)
	case req.cmd == cmdRead && c.structured:
		b := appendChunkHeader(make([]byte, 0, chunkHeaderSize+8), chunkData, req.cookie, 8+len(*data))
		c.send(binary.BigEndian.AppendUint64(b, req.offset), *data)
	case req.cmd == cmdRead:
		c.send(appendSimpleReply(nil, 0, req.cookie), *data)
	case req.cmd == cmdBlockStatus:
		states := appendStates(nil, extents, req)
		b := appendChunkHeader(nil, chunkBlockStatus, req.cookie, 4+len(states))
		c.send(binary.BigEndian.AppendUint32(b, allocationID), states)
	default:
		c.send(appendSimpleReply(nil, 0, req.cookie))
	}
}

func (c *session) replyError(req request, err error) {
	code := codeOf(err)
	if !c.structured {
		c.send(appendSimpleReply(nil, code, req.cookie))
		return
	}
	text := messageText(err.Error())
	b := appendChunkHeader(nil, chunkError, req.cookie, 6+len(text))
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	c.send(append(b, text...))
}

// appendStates writes the extents of a BLOCK_STATUS reply: neighbours of one state together,
// none beyond the request. A device's answer counts up to its first gap; without an answer the
// whole range has the state that promises nothing.
func appendStates(b []byte, extents []Extent, req request) []byte {
	first := len(b)
	add := func(length int64, state uint32) {
		last := len(b) - 8
		if last >= first && binary.BigEndian.Uint32(b[last+4:]) == state {
			length += int64(binary.BigEndian.Uint32(b[last:]))
			b = b[:last]
		}
		b = binary.BigEndian.AppendUint32(b, uint32(length))
		b = binary.BigEndian.AppendUint32(b, state)
	}
	limit := maxExtents
	if req.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	at, end := int64(req.offset), int64(req.offset)+int64(req.length)
	for _, e := range extents {
		stop := min(e.Offset+e.Length, end)
		if e.Offset > at || stop <= at || (len(b)-first)/8 > limit {
			break
		}
		var state uint32
		if e.Hole {
			state |= stateHole
		}
		if e.Zero {
			state |= stateZero
		}
		add(stop-at, state)
		at = stop
	}
	if len(b) == first {
		add(end-at, 0)
	}
	return b[:min(len(b), first+8*limit)]
}
