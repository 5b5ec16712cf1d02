package encap

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// Config describes a tunnel.
type Config struct {
	Name   string     // of the device, 1 to 15 bytes; no interface may have it yet
	MTU    int        // of the device: the longest inner packet, 576 to 65495 bytes
	Local  netip.Addr // outer address of this host
	Remote netip.Addr // outer address of the peer, of the same family
	// ProbePort is the port from and to which UDP between Local and Remote passes inside the tunnel, so that the ends can
	// try it. With 0 there are no probes.
	ProbePort uint16
	Gate      *Gate
	Log       *slog.Logger
}

const (
	minMTU = 576 // RFC 791: what every host takes
	maxMTU = 65535 - header6
)

func (c *Config) check() error {
	c.Local, c.Remote = c.Local.Unmap(), c.Remote.Unmap()
	for _, a := range []netip.Addr{c.Local, c.Remote} {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" {
			return fmt.Errorf("tunnel %s: outer address %v: want a unicast address without a zone", c.Name, a)
		}
	}
	switch {
	case c.Name == "" || len(c.Name) >= unix.IFNAMSIZ || strings.ContainsAny(c.Name, "%/: \t\n"):
		return fmt.Errorf("tunnel's device name %q: want 1 to %d letters, digits, - and .", c.Name, unix.IFNAMSIZ-1)
	case c.Local.Is4() != c.Remote.Is4():
		return fmt.Errorf("tunnel %s: outer addresses %v and %v are of two families", c.Name, c.Local, c.Remote)
	case c.Local == c.Remote:
		return fmt.Errorf("tunnel %s: both outer addresses are %v", c.Name, c.Local)
	case c.MTU < minMTU || c.MTU > maxMTU:
		return fmt.Errorf("tunnel %s: MTU %d: want %d to %d", c.Name, c.MTU, minMTU, maxMTU)
	}
	return nil
}

// Tunnel is a TUN device, and a way for its packets to the peer and back.
type Tunnel struct {
	name     string
	log      *slog.Logger
	filter   filter
	counters counters
	device   *device
	carrier  carrier

	running sync.WaitGroup
	close   func() error
}

// carrier takes packets to the peer. What it brings back it gives to a writer.
type carrier interface {
	send([]packet)
	close() error
}

// open makes the device. Nothing runs before start.
func open(c Config) (*Tunnel, error) {
	d, err := openDevice(c.Name, c.MTU)
	if err != nil {
		return nil, fmt.Errorf("tunnel %s: %w", c.Name, err)
	}
	return &Tunnel{
		name:   c.Name,
		log:    c.Log.With("tunnel", c.Name),
		filter: filter{gate: c.Gate, local: c.Local, remote: c.Remote, probePort: c.ProbePort},
		device: d,
	}, nil
}

// start carries packets from the device to the peer until the tunnel is closed.
func (t *Tunnel) start(c carrier) {
	t.carrier = c
	t.close = sync.OnceValue(func() error {
		err := errors.Join(t.device.close(), t.carrier.close())
		t.running.Wait()
		if err != nil {
			return fmt.Errorf("close tunnel %s: %w", t.name, err)
		}
		return nil
	})
	t.running.Go(t.carry)
}

// Name is the device's.
func (t *Tunnel) Name() string { return t.name }

// Stats returns the counters. A packet is counted when the kernel or the connection has taken it.
func (t *Tunnel) Stats() Stats { return t.counters.read() }

// SetMTU changes the longest inner packet, within the limits of Config.MTU. The kernel tells senders of longer ones.
func (t *Tunnel) SetMTU(mtu int) error {
	if mtu < minMTU || mtu > maxMTU {
		return fmt.Errorf("tunnel %s: MTU %d: want %d to %d", t.name, mtu, minMTU, maxMTU)
	}
	if err := t.device.setMTU(mtu); err != nil {
		return fmt.Errorf("tunnel %s: %w", t.name, err)
	}
	return nil
}

// Close removes the device and returns when nothing of the tunnel runs any more. Later calls return the same.
func (t *Tunnel) Close() error { return t.close() }

// carry takes packets from the device to the peer.
func (t *Tunnel) carry() {
	bufs := buffers(tunBatch)
	sizes := make([]int, tunBatch)
	packets := make([]packet, 0, tunBatch)
	for {
		n, err := t.device.tun.Read(bufs, sizes, 0)
		packets = packets[:0]
		for i := range n {
			p, v := t.filter.outgoing(bufs[i][:sizes[i]])
			if v != passes {
				t.counters.drop(v)
				continue
			}
			packets = append(packets, p)
		}
		t.carrier.send(packets)
		var gone *os.PathError
		switch {
		case err == nil:
		case errors.Is(err, os.ErrClosed) && t.device.closed.Load():
			return
		case errors.Is(err, os.ErrClosed), errors.As(err, &gone):
			t.log.Error("the tunnel's device is gone; nothing is sent until it is opened again", "err", err)
			return
		case errors.Is(err, tun.ErrTooManySegments):
			t.counters.drop(tooBig)
		default:
			t.counters.drop(malformed) // a header of the kernel's that the library does not know
		}
	}
}
