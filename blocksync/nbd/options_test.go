package nbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
)

// haggle greets a server and returns a client that can ask it options.
func haggle(t *testing.T, exports map[string]Export, flags uint32) (c *Client, ended chan error) {
	t.Helper()
	server, conn := pair(t)
	ended = make(chan error, 1)
	go func() {
		s := newSession(ctxb, &Server{Exports: exports}, server)
		defer s.end(nil)
		ended <- s.run()
	}()
	c = &Client{conn: conn, in: bufio.NewReader(conn)}
	if _, err := io.ReadFull(c.in, make([]byte, 18)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, flags)); err != nil {
		t.Fatal(err)
	}
	return c, ended
}

// replies asks an option and gives all that comes, in text.
func (c *Client) replies(o option, data []byte) []string {
	var all []string
	err := c.ask(o, data, func(t replyType, data []byte) error {
		all = append(all, fmt.Sprintf("%d %x", t, data))
		return nil
	})
	var r *refusal
	switch {
	case errors.As(err, &r):
		all = append(all, fmt.Sprintf("error %d", r.reply-repError))
	case err != nil:
		all = append(all, err.Error())
	default:
		all = append(all, "ack")
	}
	return all
}

func TestOptions(t *testing.T) {
	blocky := newMemDevice(1 << 20)
	blocky.sizes = &blockSizes{min: 512, preferred: 4096, max: 1 << 20}
	c, ended := haggle(t, map[string]Export{
		"disk":   {Device: newMemDevice(1 << 20)},
		"blocky": {Device: blocky},
		"null":   {Device: nullDevice{size: 0x123456}, ReadOnly: true},
	}, handshakeFixed)
	text := func(s string) string { return fmt.Sprintf("%x", s) }
	exportInfo := "3 0000" + "0000000000100000" // then flags
	allocation := text(contextAllocation)
	for i, step := range []struct {
		o    option
		data []byte
		want []string
	}{
		{optList, nil, []string{"2 00000006" + text("blocky"), "2 00000004" + text("disk"), "2 00000004" + text("null"), "ack"}},
		{optList, []byte("x"), []string{"error 3"}},
		{4, nil, []string{"error 1"}},                          // PEEK_EXPORT
		{5, nil, []string{"error 1"}},                          // STARTTLS
		{11, nil, []string{"error 1"}},                         // EXTENDED_HEADERS
		{77, make([]byte, maxOptionData), []string{"error 1"}}, // unknown, with as much as may be
		{optInfo, appendGo(nil, "disk"), []string{exportInfo + "046d", "3 0003000000010000100002000000", "ack"}},
		{optInfo, appendGo(nil, "null", infoName), []string{"3 0000" + "0000000000123456" + "040f",
			"3 0001" + text("null"), "3 0003000000010000100002000000", "ack"}},
		{optInfo, appendGo(nil, "nothing"), []string{"error 6"}},
		{optInfo, appendGo(nil, "blocky"), []string{exportInfo + "046d", "3 0003000002000000100000100000", "error 8"}},
		{optGo, appendGo(nil, "blocky"), []string{exportInfo + "046d", "3 0003000002000000100000100000", "error 8"}},
		{optGo, appendGo(nil, "nothing"), []string{"error 6"}},
		{optGo, []byte("garbage"), []string{"error 3"}},
		{optSetMetaContext, appendMetaContext(nil, "disk", contextAllocation), []string{"error 3"}}, // too early
		{optStructuredReply, []byte("x"), []string{"error 3"}},
		{optStructuredReply, nil, []string{"ack"}},
		{optInfo, appendGo(nil, "disk"), []string{exportInfo + "04ed", "3 0003000000010000100002000000", "ack"}},
		{optListMetaContext, appendMetaContext(nil, "disk"), []string{"4 00000000" + allocation, "ack"}},
		{optListMetaContext, appendMetaContext(nil, "disk", "base:"), []string{"4 00000000" + allocation, "ack"}},
		{optListMetaContext, appendMetaContext(nil, "disk", "x-test:"), []string{"ack"}},
		{optListMetaContext, appendMetaContext(nil, "null"), []string{"ack"}},
		{optListMetaContext, appendMetaContext(nil, "nothing"), []string{"error 6"}},
		{optSetMetaContext, appendMetaContext(nil, "disk", "base:"), []string{"ack"}},
		{optSetMetaContext, appendMetaContext(nil, "null", contextAllocation), []string{"ack"}},
		{optSetMetaContext, []byte{0}, []string{"error 3"}},
		{optSetMetaContext, appendMetaContext(nil, "disk", "x-test:y", contextAllocation), []string{"4 00000001" + allocation, "ack"}},
		{optAbort, nil, []string{"ack"}},
	} {
		if got := c.replies(step.o, step.data); !reflect.DeepEqual(got, step.want) {
			t.Errorf("step %d, option %d: %q, want %q", i, step.o, got, step.want)
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("after ABORT: %v", err)
	}
}

// TestSelectionOfAnotherExport holds that a context selected for one export gives nothing on
// another, and that asking for a wrong name in between does not matter.
func TestSelectionOfAnotherExport(t *testing.T) {
	for export, want := range map[string]bool{"a": false, "b": true} {
		c, _ := haggle(t, map[string]Export{"a": {Device: newMemDevice(4096)}, "b": {Device: newMemDevice(4096)}}, handshakeFixed)
		c.replies(optStructuredReply, nil)
		c.replies(optSetMetaContext, appendMetaContext(nil, "a", contextAllocation))
		c.replies(optGo, appendGo(nil, "c"))
		c.replies(optGo, appendGo(nil, export))
		c.conn.Write(request{cmd: cmdBlockStatus, cookie: 1, length: 4096}.append(nil))
		var b [chunkHeaderSize]byte
		if _, err := io.ReadFull(c.in, b[:]); err != nil {
			t.Fatal(err)
		}
		isError := chunkType(binary.BigEndian.Uint16(b[6:]))&chunkIsError != 0
		if isError != want {
			t.Errorf("block status of %s: error %v", export, isError)
		}
	}
}

func TestExportNameOption(t *testing.T) {
	device := newMemDevice(4096)
	copy(device.data, "content")
	exports := map[string]Export{"": {Device: device}}
	for flags, length := range map[uint32]int{handshakeFixed: 134, 0: 134, handshakeFixed | handshakeNoZeroes: 10} {
		c, ended := haggle(t, exports, flags)
		c.conn.Write(appendOptionHeader(nil, optExportName, 0))
		b := make([]byte, length)
		if _, err := io.ReadFull(c.in, b); err != nil {
			t.Fatal(err)
		}
		if want := append([]byte{0, 0, 0, 0, 0, 0, 16, 0, 0x04, 0x6d}, make([]byte, 124)...)[:length]; !bytes.Equal(b, want) {
			t.Errorf("flags %d: answer %x", flags, b)
		}
		c.conn.Write(request{cmd: cmdRead, cookie: 5, length: 7}.append(nil))
		b = make([]byte, simpleReplySize+7)
		if _, err := io.ReadFull(c.in, b); err != nil {
			t.Fatal(err)
		}
		if want := append(appendSimpleReply(nil, 0, 5), "content"...); !bytes.Equal(b, want) {
			t.Errorf("flags %d: read %x", flags, b)
		}
		c.conn.Write(request{cmd: cmdDisc}.append(nil))
		if err := <-ended; err != nil {
			t.Errorf("after goodbye: %v", err)
		}
	}
}

func TestSessionEndsForBadGreeting(t *testing.T) {
	_, ended := haggle(t, nil, 1<<5)
	if err := <-ended; !errors.Is(err, ErrProtocol) {
		t.Errorf("unknown client flag: %v", err)
	}
	c, ended := haggle(t, nil, handshakeFixed)
	c.conn.Write(append(appendOptionHeader(nil, optExportName, 4), "disk"...))
	if err := <-ended; err == nil || !strings.Contains(err.Error(), `"disk"`) {
		t.Errorf("unknown export name: %v", err)
	}
	if _, err := c.in.ReadByte(); err != io.EOF {
		t.Errorf("client of an unknown export name reads %v", err)
	}
}
