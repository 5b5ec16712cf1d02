package neighbour

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// repeats are when an announcement is made again, counted from the first time:
// a frame may be lost, and a bridge's port may not forward at once.
var repeats = []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second}

// AnnounceOnce tells everyone on the network of dev, an Ethernet device or a
// bridge, that each address is at mac. The frames come from dev's own hardware
// address, so that switches learn nothing wrong about mac.
func AnnounceOnce(dev string, mac net.HardwareAddr, addrs []netip.Addr) error {
	return announce(context.Background(), dev, mac, addrs, nil)
}

// Announce is AnnounceOnce, repeated after 100 ms, 300 ms and 1 s. It returns
// after the last time, or without error when the context ends, having announced
// at least once. An error of sending is returned only if it is that of the last
// time: each one makes up for those before.
func Announce(ctx context.Context, dev string, mac net.HardwareAddr, addrs []netip.Addr) error {
	return announce(ctx, dev, mac, addrs, repeats)
}

func announce(ctx context.Context, dev string, mac net.HardwareAddr, addrs []netip.Addr, again []time.Duration) error {
	at, err := hardwareOf(mac)
	if err != nil {
		return fmt.Errorf("announce on %s: %w", dev, err)
	}
	p, err := openPort(dev)
	if err != nil {
		return fmt.Errorf("announce: %w", err)
	}
	defer p.Close()
	var frames [][]byte
	for _, a := range addrs {
		if a, err = hostAddress(a); err != nil {
			return fmt.Errorf("announce on %s: %w", dev, err)
		}
		frames = append(frames, announcements(p.hardware, at, a)...)
	}

	start := time.Now()
	err = p.send(frames...)
	for _, after := range again {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Until(start.Add(after))):
			err = p.send(frames...)
		}
	}
	if err != nil {
		return fmt.Errorf("announce on %s: %w", dev, err)
	}
	return nil
}

// announcements are the frames from a device that tell everyone that a is at
// mac. Some hosts heed only one of the two forms of gratuitous ARP.
func announcements(from, mac hardware, a netip.Addr) [][]byte {
	if a.Is6() {
		return [][]byte{unsolicited(from, groupHardware(allNodes), mac, a, allNodes)}
	}
	header := ethernet{broadcast, from, etherTypeARP}
	request := arp{operation: arpRequest, senderHardware: mac, sender: a, target: a}
	return [][]byte{request.append(header.append(nil)), gratuitousReply(from, broadcast, mac, a)}
}

// gratuitousReply is the ARP reply that nobody asked for: a is at mac.
func gratuitousReply(from, to, mac hardware, a netip.Addr) []byte {
	m := arp{operation: arpReply, senderHardware: mac, sender: a, targetHardware: mac, target: a}
	return m.append(ethernet{to, from, etherTypeARP}.append(nil))
}

// unsolicited is the advertisement that nobody asked for: a is at mac.
func unsolicited(from, to, mac hardware, a, group netip.Addr) []byte {
	m := discovery{
		source: a, destination: group, kind: advertisement,
		flags: flagRouter | flagOverride, target: a, linkLayer: mac,
	}
	return m.append(ethernet{to, from, etherTypeIPv6}.append(nil))
}
