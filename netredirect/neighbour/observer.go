package neighbour

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/net/bpf"
)

// observed bounds the addresses of an Observer. A guest that speaks with more is a
// router, or lies.
const observed = 64

// An Observer collects the addresses that one hardware address uses. It sends
// nothing.
type Observer struct {
	port *port
	mac  hardware
	stop context.CancelFunc
	done sync.WaitGroup

	mu     sync.Mutex
	seen   []netip.Addr // also those that Addresses leaves out
	failed error
}

// Observe starts to listen on dev, the tap or the bridge's port of mac.
func Observe(dev string, mac net.HardwareAddr) (*Observer, error) {
	from, err := hardwareOf(mac)
	if err != nil {
		return nil, fmt.Errorf("observe on %s: %w", dev, err)
	}
	p, err := openPort(dev)
	if err != nil {
		return nil, fmt.Errorf("observe: %w", err)
	}
	o := &Observer{port: p, mac: from}
	if err := p.listen(o.filter()); err != nil {
		p.Close()
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	o.stop = stop
	o.done.Go(func() {
		if err := p.serve(ctx, o.handle); err != nil {
			o.fail(err)
		}
	})
	return o, nil
}

// Addresses returns, in the order of their appearance, what mac has claimed by
// ARP or neighbour discovery and what it has sent IP packets from: at most 64
// addresses, none of them unspecified, loopback, link-local or multicast. A VM
// that forwards packets sends them from addresses of others: only those that
// belong to the bridge's networks are its own.
func (o *Observer) Addresses() []netip.Addr {
	o.mu.Lock()
	defer o.mu.Unlock()
	var addrs []netip.Addr
	for _, a := range o.seen {
		if isHost(a) && !a.IsLinkLocalUnicast() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// Close ends the observation. It returns what has hindered it, if anything did.
func (o *Observer) Close() error {
	o.stop()
	err := o.port.Close()
	o.done.Wait()
	if o.failed != nil {
		return fmt.Errorf("observe: %w", o.failed)
	}
	return err
}

func (o *Observer) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.failed == nil {
		o.failed = err
	}
}

// filter leaves out what is known already. It is handle's, after Observe.
func (o *Observer) filter() []bpf.Instruction {
	if len(o.seen) == observed {
		return []bpf.Instruction{drop}
	}
	return slices.Concat(arriving(), sentBy(o.mac), strangers(o.seen))
}

func (o *Observer) handle(frame []byte) {
	a := claimed(frame, o.mac)
	// Frames may have been waiting for longer than their address is known.
	if !a.IsValid() || slices.Contains(o.seen, a) || len(o.seen) == observed {
		return
	}
	o.mu.Lock()
	o.seen = append(o.seen, a)
	o.mu.Unlock()
	if err := o.port.filter(o.filter()); err != nil {
		o.fail(err)
	}
}

// claimed returns the address that a frame's sender uses, if it is a frame of
// mac that shows one.
func claimed(frame []byte, mac hardware) netip.Addr {
	header, payload, err := parseEthernet(frame)
	if err != nil || header.from != mac {
		return netip.Addr{}
	}
	switch header.etherType {
	case etherTypeARP:
		if m, err := parseARP(payload); err == nil && m.senderHardware == mac {
			return m.sender
		}
	case etherTypeIPv4:
		if len(payload) >= 20 && payload[0]>>4 == 4 {
			return netip.AddrFrom4([4]byte(payload[12:16]))
		}
	case etherTypeIPv6:
		m, err := parseDiscovery(payload)
		if err == nil && m.kind == advertisement {
			if m.linkLayer != mac && m.linkLayer != (hardware{}) {
				return netip.Addr{}
			}
			return m.target
		}
		if len(payload) >= ipv6Size && payload[0]>>4 == 6 {
			return netip.AddrFrom16([16]byte(payload[8:24]))
		}
	}
	return netip.Addr{}
}
