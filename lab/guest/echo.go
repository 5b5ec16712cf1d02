package main

import (
	"bufio"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// maxConnections bounds the echo connections open at once.
const maxConnections = 256

// echo answers numbered records and counts those that are out of order.
type echo struct {
	connections atomic.Int64
	open        atomic.Int64
	tcp         atomic.Int64
	udp         atomic.Int64
	breaks      atomic.Int64
}

func (e *echo) serveTCP(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if e.open.Add(1) > maxConnections {
			e.open.Add(-1)
			c.Close()
			continue
		}
		e.connections.Add(1)
		go func() {
			defer e.open.Add(-1)
			defer c.Close()
			e.converse(c)
		}()
	}
}

// converse answers the records of one connection until it ends or sends something else.
func (e *echo) converse(c net.Conn) {
	in := bufio.NewReader(c)
	var b [api.EchoSize]byte
	var last, count uint64
	var breaks uint32
	for {
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return
		}
		r, err := api.ParseEcho(b[:])
		if err != nil {
			slog.Warn("echo connection sent something else", "from", c.RemoteAddr())
			return
		}
		e.tcp.Add(1)
		if count > 0 && r.Sequence != last+1 {
			breaks++
			e.breaks.Add(1)
		}
		last = r.Sequence
		count++
		r.Count, r.Breaks = count, breaks
		c.SetWriteDeadline(time.Now().Add(10 * time.Minute))
		if _, err := c.Write(r.Append(b[:0])); err != nil {
			return
		}
	}
}

func (e *echo) serveUDP(c net.PacketConn) error {
	var b [api.EchoSize + 1]byte
	for {
		n, from, err := c.ReadFrom(b[:])
		if err != nil {
			return err
		}
		r, err := api.ParseEcho(b[:n])
		if err != nil {
			continue
		}
		r.Count, r.Breaks = uint64(e.udp.Add(1)), 0
		if _, err := c.WriteTo(r.Append(b[:0]), from); err != nil {
			slog.Debug("udp echo not sent", "to", from, "err", err)
		}
	}
}

func (e *echo) report() api.EchoReport {
	return api.EchoReport{
		TCPConnections: e.connections.Load(),
		TCPRecords:     e.tcp.Load(),
		UDPRecords:     e.udp.Load(),
		Breaks:         e.breaks.Load(),
	}
}
