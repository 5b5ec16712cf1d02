package encap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

const (
	tunBatch  = 128   // packets that the device gives at once: what it makes of one of 64 KiB
	maxPacket = 65535 // bytes

	// The device's library and the kernel want room for struct virtio_net_hdr (linux/virtio_net.h) before a packet.
	headroom = 10
)

// device is a TUN device that vanishes when it is closed.
type device struct {
	tun    tun.Device
	links  *netlink.Handle // of the namespace that the device is in
	link   netlink.Link
	closed atomic.Bool

	mu  sync.Mutex // held while the MTU is changed
	mtu atomic.Int64
}

// openDevice makes a device in the calling thread's network namespace, and sets it up.
func openDevice(name string, mtu int) (*device, error) {
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	d := &device{links: links}
	if d.tun, err = openTUN(name); err != nil {
		links.Close()
		return nil, err
	}
	if err := d.setUp(name, mtu); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func openTUN(name string) (tun.Device, error) {
	const path = "/dev/net/tun"
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("device name %q: %w", name, err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w; load the kernel module tun", path, err)
	}
	// Exclusively: a device that someone else has left there is not ours to use.
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%w: there is an interface of that name: remove it (ip link delete %s)", err, name)
		}
		return nil, fmt.Errorf("make TUN device %s: %w", name, err)
	}
	// Not CreateTUN: it watches the device's state, which nobody here asks for.
	t, _, err := tun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("make TUN device %s: %w", name, err)
	}
	return t, nil
}

func (d *device) setUp(name string, mtu int) error {
	var err error
	if d.link, err = d.links.LinkByName(name); err != nil {
		return fmt.Errorf("find device %s: %w", name, err)
	}
	// An address of the device's own would only be one more that packets may come from.
	const addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE, linux/if_link.h
	err = d.links.LinkSetIP6AddrGenMode(d.link, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6
		return fmt.Errorf("keep device %s from making itself an address: %w", name, err)
	}
	if err := d.setMTU(mtu); err != nil {
		return err
	}
	if err := d.links.LinkSetUp(d.link); err != nil {
		return fmt.Errorf("set device %s up: %w", name, err)
	}
	return nil
}

func (d *device) setMTU(mtu int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changeMTU(mtu)
}

// lowerMTU returns whether the MTU was higher.
func (d *device) lowerMTU(mtu int) (lowered bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if int64(mtu) >= d.mtu.Load() {
		return false, nil
	}
	return true, d.changeMTU(mtu)
}

func (d *device) changeMTU(mtu int) error {
	if d.closed.Load() {
		return errors.New("set MTU: the tunnel is closed")
	}
	if err := d.links.LinkSetMTU(d.link, mtu); err != nil {
		return fmt.Errorf("set MTU of device %s to %d: %w", d.link.Attrs().Name, mtu, err)
	}
	d.mtu.Store(int64(mtu))
	return nil
}

func (d *device) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed.Store(true)
	d.links.Close()
	return d.tun.Close()
}

// buffers returns n buffers for packets. Memory is used for what they have held.
func buffers(n int) [][]byte {
	const size = headroom + header4 + maxPacket
	all := make([]byte, n*size)
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = all[i*size:][:size:size]
	}
	return bufs
}

// writer hands packets from the peer to the device, in batches, of which the library merges the segments of a TCP flow.
type writer struct {
	t     *Tunnel
	batch [][]byte // each with headroom before the packet
	bytes int      // of the packets in it
}

// take checks the packet in buf[at:end] and adds it to the batch, which keeps buf until the next flush. There is headroom
// before it. outer is the outer header's TOS or traffic class.
func (w *writer) take(buf []byte, at, end int, outer byte) {
	p, v := w.t.filter.incoming(buf[at:end])
	if v == passes && !p.mark(outer) {
		v = congested
	}
	if v != passes {
		w.t.counters.drop(v)
		return
	}
	b := buf[at-headroom : at+len(p.data)]
	if field, unfinished := p.unfinished(); unfinished {
		w.flush() // to keep the order
		w.finish(b, p, field)
		return
	}
	w.batch = append(w.batch, b)
	w.bytes += len(p.data)
}

func (w *writer) flush() {
	if len(w.batch) == 0 {
		return
	}
	w.count(len(w.batch), w.bytes, func() error {
		_, err := w.t.device.tun.Write(w.batch, headroom)
		return err
	})
	w.batch, w.bytes = w.batch[:0], 0
}

// finish writes a packet, in b behind its headroom, that wants a checksum at field; the kernel computes it. One of TCP
// that is longer than the MTU was merged of several, and the kernel is asked to split it again.
func (w *writer) finish(b []byte, p packet, field int) {
	const ( // linux/virtio_net.h
		needsChecksum = 1
		splitTCP4     = 1
		splitTCP6     = 4
	)
	h := b[:headroom]
	clear(h)
	h[0] = needsChecksum
	binary.NativeEndian.PutUint16(h[6:], uint16(p.upper))
	binary.NativeEndian.PutUint16(h[8:], uint16(field-p.upper))
	if mtu := int(w.t.device.mtu.Load()); p.protocol == unix.IPPROTO_TCP && len(p.data) > mtu {
		headers := p.upper + int(p.data[p.upper+12]>>4)*4
		if headers < p.upper+20 || headers >= min(mtu, len(p.data)) {
			w.t.counters.drop(malformed)
			return
		}
		h[1] = splitTCP6
		if p.is4() {
			h[1] = splitTCP4
		}
		binary.NativeEndian.PutUint16(h[2:], uint16(headers))
		binary.NativeEndian.PutUint16(h[4:], uint16(mtu-headers))
	}
	w.count(1, len(p.data), func() error {
		_, err := w.t.device.tun.File().Write(b)
		return err
	})
}

func (w *writer) count(packets, bytes int, write func() error) {
	if err := write(); err != nil {
		w.t.counters.drops[unsent].Add(uint64(packets))
		return
	}
	w.t.counters.received.add(packets, bytes)
}
