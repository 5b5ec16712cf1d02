package neighbour

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	// frameLimit bounds the frames that are read; neighbour discovery is far
	// smaller on any network.
	frameLimit = 1514

	// readRate and readBurst bound how many frames of a guest are looked at in a
	// second. A guest that asks for a whole /24 has its answers at once.
	readRate  = 500
	readBurst = 256

	// sendTimeout bounds the wait for a device whose queue is full: the tap of a
	// VM that does not run.
	sendTimeout = time.Second
)

// A port is a packet socket (packet(7)) on one device. It hears nothing before
// listen.
type port struct {
	file     *os.File
	device   int
	name     string
	hardware hardware // the device's own
}

func openPort(dev string) (*port, error) {
	device, err := net.InterfaceByName(dev)
	if err != nil {
		return nil, fmt.Errorf("find device %s: %w", dev, err)
	}
	if len(device.HardwareAddr) != 6 {
		return nil, fmt.Errorf("device %s is not an Ethernet device", dev)
	}
	// With protocol 0 nothing is received, so nothing gets past the filter.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket on %s: %w", dev, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: device.Index}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind packet socket to %s: %w", dev, err)
	}
	return &port{os.NewFile(uintptr(fd), "packet socket on "+dev), device.Index, dev, hardware(device.HardwareAddr)}, nil
}

func (p *port) Close() error { return p.file.Close() }

// send tries every frame, also after one that cannot be sent, and returns the
// first error.
func (p *port) send(frames ...[]byte) error {
	first := p.file.SetWriteDeadline(time.Now().Add(sendTimeout))
	for _, f := range frames {
		if _, err := p.file.Write(f); first == nil {
			first = err
		}
	}
	return first
}

// listen begins to receive what the filter lets through, also frames that are
// addressed to others.
func (p *port) listen(filter []bpf.Instruction) error {
	if err := p.filter(filter); err != nil {
		return err
	}
	all := unix.PacketMreq{Ifindex: int32(p.device), Type: unix.PACKET_MR_PROMISC}
	err := p.control(func(fd int) error {
		if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &all); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: p.device})
	})
	if err != nil {
		return fmt.Errorf("listen on %s: %w", p.name, err)
	}
	return nil
}

// filter replaces the filter.
func (p *port) filter(program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("assemble filter for %s: %w", p.name, err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = p.control(func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]})
	})
	if err != nil {
		return fmt.Errorf("attach filter on %s: %w", p.name, err)
	}
	return nil
}

func (p *port) control(f func(fd int) error) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := raw.Control(func(fd uintptr) { result = f(int(fd)) }); err != nil {
		return err
	}
	return result
}

// serve hands each frame to handle, at a bounded rate, until the context ends
// and the port is closed. The frame is handle's until it returns.
func (p *port) serve(ctx context.Context, handle func(frame []byte)) error {
	limit := rate.NewLimiter(readRate, readBurst)
	buf := make([]byte, frameLimit)
	for {
		n, err := p.file.Read(buf)
		switch {
		case errors.Is(err, unix.ENETDOWN):
			// Said once when the device goes down; it may come up again.
			continue
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		if limit.Wait(ctx) != nil {
			return nil
		}
		handle(buf[:n])
	}
}

func networkOrder(v uint16) uint16 {
	return binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, v))
}
