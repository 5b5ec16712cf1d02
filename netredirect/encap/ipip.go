package encap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

const (
	outerTTL      = 64
	receiveBuffer = 4 << 20 // bytes that wait in a socket for us to run
	receiveBatch  = 64

	// Below this MTU a device loses its IPv6 routes.
	minMTU6 = 1280
)

// ipip carries packets in IP packets of an address family.
type ipip struct {
	t       *Tunnel
	family  family
	ends    ends
	out     [2]*sender // for IPv4 and IPv6 inside
	in      [2]*net.IPConn
	closing chan struct{}
}

// ends are the outer addresses of a tunnel.
type ends struct{ local, remote netip.Addr }

// opened are the tunnels of this process. Each of them gets what comes for all that have its local address.
var opened = struct {
	sync.Mutex
	tunnels map[ends]bool
}{tunnels: map[ends]bool{}}

func (e ends) open() (first bool) {
	opened.Lock()
	defer opened.Unlock()
	first = !opened.tunnels[e]
	opened.tunnels[e] = true
	return first
}

func (e ends) close() {
	opened.Lock()
	defer opened.Unlock()
	delete(opened.tunnels, e)
}

func (e ends) isOpen() bool {
	opened.Lock()
	defer opened.Unlock()
	return opened.tunnels[e]
}

// family is what differs between the families of outer addresses.
type family struct {
	network  string // of package net
	header   int    // bytes that a packet grows by
	level    int
	hops     int // socket options
	discover int
	pathMTU  int
	tos      int
}

var (
	family4 = family{"ip4", header4, unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER, unix.IP_MTU, unix.IP_TOS}
	family6 = family{"ip6", header6, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU, unix.IPV6_TCLASS}
)

// OpenIPIP makes a tunnel that carries packets in IP, as the kernel's ipip, sit and ip6tnl do. It needs root, a route to
// c.Remote, and that no other tunnel of this process has the same two ends.
func OpenIPIP(c Config) (*Tunnel, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	o := &ipip{family: family6, ends: ends{c.Local, c.Remote}, closing: make(chan struct{})}
	if c.Local.Is4() {
		o.family = family4
	}
	if !o.ends.open() {
		return nil, fmt.Errorf("tunnel %s: there is one from %v to %v already; add to its gate", c.Name, c.Local, c.Remote)
	}
	if err := o.connect(); err != nil {
		return nil, errors.Join(fmt.Errorf("tunnel %s: %w", c.Name, err), o.close())
	}
	var err error
	if o.t, err = open(c); err != nil {
		return nil, errors.Join(err, o.close())
	}
	o.t.start(o)
	for i, protocol := range protocols {
		o.t.running.Go(func() { o.receive(o.in[i], protocol) })
	}
	return o.t, nil
}

// protocols are the outer headers' for the versions of IP inside.
var protocols = [2]byte{protocolIPv4, protocolIPv6}

// connect opens the sockets.
func (o *ipip) connect() error {
	for i, protocol := range protocols {
		network := fmt.Sprintf("%s:%d", o.family.network, protocol)
		from, to := &net.IPAddr{IP: o.ends.local.AsSlice()}, &net.IPAddr{IP: o.ends.remote.AsSlice()}
		// What comes from elsewhere is to be counted, so that the receiving socket is not connected.
		in, err := net.ListenIP(network, from)
		if err != nil {
			return fmt.Errorf("receive IP protocol %d: %w", protocol, err)
		}
		o.in[i] = in
		if err := control(in, o.receiveOptions); err != nil {
			return fmt.Errorf("receive IP protocol %d: %w", protocol, err)
		}
		out, err := net.DialIP(network, from, to)
		if err != nil {
			return fmt.Errorf("send IP protocol %d: %w", protocol, err)
		}
		o.out[i] = newSender(o, out)
		if err := control(out, o.sendOptions); err != nil {
			return fmt.Errorf("send IP protocol %d: %w", protocol, err)
		}
	}
	return nil
}

// control runs f with a connection's descriptor.
func control(c *net.IPConn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	return failed
}

func (o *ipip) receiveOptions(fd int) error {
	if o.family.level == unix.IPPROTO_IPV6 {
		// The socket gives no outer header.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1); err != nil {
			return fmt.Errorf("set IPV6_RECVTCLASS: %w", err)
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer); err != nil {
		return fmt.Errorf("set SO_RCVBUFFORCE: %w", err)
	}
	return nil
}

func (o *ipip) sendOptions(fd int) error {
	f := o.family
	if err := unix.SetsockoptInt(fd, f.level, f.hops, outerTTL); err != nil {
		return fmt.Errorf("set TTL: %w", err)
	}
	// Don't fragment: senders are told of the MTU instead. The constant is the same for IPv6.
	if err := unix.SetsockoptInt(fd, f.level, f.discover, unix.IP_PMTUDISC_DO); err != nil {
		return fmt.Errorf("set path MTU discovery: %w", err)
	}
	// The socket would keep a copy of everything that the peer sends.
	nothing, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err != nil {
		return err
	}
	filter := []unix.SockFilter{{Code: nothing[0].Op, Jt: nothing[0].Jt, Jf: nothing[0].Jf, K: nothing[0].K}}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &filter[0]}); err != nil {
		return fmt.Errorf("set SO_ATTACH_FILTER: %w", err)
	}
	return nil
}

func (o *ipip) close() error {
	close(o.closing)
	o.ends.close()
	var errs []error
	for i := range protocols {
		if o.in[i] != nil {
			errs = append(errs, o.in[i].Close())
		}
		if o.out[i] != nil {
			errs = append(errs, o.out[i].conn.Close())
		}
	}
	return errors.Join(errs...)
}

// send sends packets, those of each version in order.
func (o *ipip) send(packets []packet) {
	for _, p := range packets {
		if p.is4() {
			o.out[0].add(p)
		} else {
			o.out[1].add(p)
		}
	}
	o.out[0].flush()
	o.out[1].flush()
}

// sender sends packets of one version to the peer.
type sender struct {
	o        *ipip
	conn     *net.IPConn
	batches  batches
	messages []ipv4.Message // memory for a batch
	n        int            // of them are to be sent
}

// batches is ipv4.PacketConn or ipv6.PacketConn.
type batches interface {
	ReadBatch([]ipv4.Message, int) (int, error)
	WriteBatch([]ipv4.Message, int) (int, error)
}

func (f family) batches(c *net.IPConn) batches {
	if f.level == unix.IPPROTO_IP {
		return ipv4.NewPacketConn(c)
	}
	return ipv6.NewPacketConn(c)
}

func newSender(o *ipip, c *net.IPConn) *sender {
	s := &sender{o: o, conn: c, batches: o.family.batches(c), messages: make([]ipv4.Message, tunBatch)}
	for i := range s.messages {
		s.messages[i] = ipv4.Message{Buffers: make([][]byte, 1), OOB: o.family.controlMessage()}
	}
	return s
}

// controlMessage makes room for the TOS or traffic class of one packet, cmsg(3).
func (f family) controlMessage() []byte {
	b := make([]byte, unix.CmsgSpace(4))
	binary.NativeEndian.PutUint64(b[0:], uint64(unix.CmsgLen(4)))
	binary.NativeEndian.PutUint32(b[8:], uint32(f.level))
	binary.NativeEndian.PutUint32(b[12:], uint32(f.tos))
	return b
}

func (s *sender) add(p packet) {
	m := &s.messages[s.n]
	m.Buffers[0] = p.data
	binary.NativeEndian.PutUint32(m.OOB[unix.CmsgLen(0):], uint32(p.tos()))
	s.n++
}

func (s *sender) flush() {
	rest := s.messages[:s.n]
	s.n = 0
	counters := &s.o.t.counters
	retried := false
	for len(rest) > 0 {
		n, err := s.batches.WriteBatch(rest, 0)
		if n > 0 {
			bytes := 0
			for _, m := range rest[:n] {
				bytes += len(m.Buffers[0])
			}
			counters.sent.add(n, bytes)
			rest, retried = rest[n:], false
			continue
		}
		switch {
		case !retried && !errors.Is(err, net.ErrClosed):
			// The error may be that of an earlier packet, which an ICMP message has brought back.
			retried = true
			continue
		case errors.Is(err, unix.EMSGSIZE):
			counters.drop(tooBig)
			s.o.shrink(s.conn)
		default:
			counters.drop(unsent)
		}
		rest, retried = rest[1:], false
	}
}

// shrink makes the device's MTU fit the path to the peer, as far as the kernel knows it from routers; then it is the
// kernel that tells senders.
func (o *ipip) shrink(c *net.IPConn) {
	var path int
	err := control(c, func(fd int) error {
		// Connecting again looks the route up again.
		var to unix.Sockaddr = &unix.SockaddrInet6{Addr: o.ends.remote.As16()}
		if o.ends.remote.Is4() {
			to = &unix.SockaddrInet4{Addr: o.ends.remote.As4()}
		}
		if err := unix.Connect(fd, to); err != nil {
			return err
		}
		var err error
		path, err = unix.GetsockoptInt(fd, o.family.level, o.family.pathMTU)
		return err
	})
	if err != nil {
		return // no route any more: the next packet is counted as unsent
	}
	mtu := max(path-o.family.header, minMTU6)
	switch lowered, err := o.t.device.lowerMTU(mtu); {
	case err != nil:
		o.t.log.Error("the path to the peer is narrower than the tunnel's MTU", "path", path, "mtu", mtu, "err", err)
	case lowered:
		o.t.log.Warn("the path to the peer is narrower than the tunnel's MTU, which is lowered", "path", path, "mtu", mtu)
	}
}

// receive takes packets of one version from the peer to the device.
func (o *ipip) receive(c *net.IPConn, protocol byte) {
	conn := o.family.batches(c)
	bufs := buffers(receiveBatch)
	messages := make([]ipv4.Message, receiveBatch)
	for i := range messages {
		messages[i] = ipv4.Message{Buffers: [][]byte{bufs[i][headroom:]}, OOB: make([]byte, unix.CmsgSpace(4))}
	}
	w := &writer{t: o.t}
	for {
		n, err := conn.ReadBatch(messages, 0)
		if err != nil {
			// The kernel has no memory, or the socket is closed.
			select {
			case <-o.closing:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
		for i := range max(n, 0) {
			o.decapsulate(w, bufs[i], &messages[i], protocol)
		}
		w.flush()
	}
}

// decapsulate takes the inner packet out of a message that was read into buf behind headroom.
func (o *ipip) decapsulate(w *writer, buf []byte, m *ipv4.Message, protocol byte) {
	end := headroom + m.N
	at, tos := headroom, byte(0)
	var src netip.Addr
	ok := m.Flags&unix.MSG_TRUNC == 0
	if o.family.level == unix.IPPROTO_IP {
		var h outer4
		if ok {
			h, ok = parseOuter4(buf[at:end])
		}
		src, tos = h.src, h.tos
		at += h.header
		end = at + h.payload
	} else {
		if a, known := m.Addr.(*net.IPAddr); known {
			src, _ = netip.AddrFromSlice(a.IP)
		}
		tos = trafficClass(m.OOB[:m.NN])
	}
	version := byte(6)
	if protocol == protocolIPv4 {
		version = 4
	}
	switch {
	case !ok:
		o.t.counters.drop(malformed)
	case src != o.ends.remote:
		if other := (ends{o.ends.local, src}); !other.isOpen() {
			o.t.counters.drop(spoofed)
		}
	case at == end, buf[at]>>4 != version:
		o.t.counters.drop(malformed)
	default:
		w.take(buf, at, end, tos)
	}
}

// trafficClass finds the outer header's in a control message, or 0.
func trafficClass(oob []byte) byte {
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return 0
		}
		if h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_TCLASS && len(data) >= 4 {
			return byte(binary.NativeEndian.Uint32(data))
		}
		oob = rest
	}
	return 0
}
