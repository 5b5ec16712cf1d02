package neighbour

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
)

// A Responder answers every ARP request and neighbour solicitation of one VM:
// all addresses are at one hardware address, except the VM's own.
type Responder struct {
	port     *port
	rules    rules
	log      *slog.Logger
	answered atomic.Uint64
	stop     context.CancelFunc
	done     sync.WaitGroup
}

// NewResponder starts to answer on a VM's tap. vm is the hardware address of the
// VM, mac the one that it is told, own are the VM's addresses. Questions without
// a sender's address are probes for duplicates, and not answered either.
//
// The log has what goes wrong later. The tap may go down and up meanwhile; when
// it is removed, the Responder hears nothing any more, and is still to be closed.
func NewResponder(tap string, vm, mac net.HardwareAddr, own []netip.Addr, log *slog.Logger) (*Responder, error) {
	rules, err := newRules(vm, mac, own)
	if err != nil {
		return nil, fmt.Errorf("answer on %s: %w", tap, err)
	}
	p, err := openPort(tap)
	if err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	if err := p.listen(slices.Concat(arriving(), sentBy(rules.vm), questions())); err != nil {
		p.Close()
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &Responder{port: p, rules: rules, log: log.With("tap", tap), stop: stop}
	r.done.Go(func() {
		if err := p.serve(ctx, r.handle); err != nil {
			r.log.Error("neighbours of the VM are no longer answered", "error", err)
		}
	})
	return r, nil
}

func (r *Responder) handle(frame []byte) {
	answer := r.rules.answer(frame)
	if answer == nil {
		return
	}
	// The VM asks again.
	if err := r.port.send(answer); err != nil {
		r.log.Debug("answer to the VM lost", "error", err)
		return
	}
	r.answered.Add(1)
}

// Tell tells the VM, and nobody else, that each address, of its gateways say, is
// at mac. An entry that it has is corrected at once; none is made. What a VM that
// does not run is told waits in its tap's queue, if there is room, until it does.
func (r *Responder) Tell(addrs []netip.Addr) error {
	var frames [][]byte
	for _, a := range addrs {
		a, err := hostAddress(a)
		if err != nil {
			return fmt.Errorf("tell the VM on %s: %w", r.port.name, err)
		}
		frames = append(frames, r.rules.told(a))
	}
	if err := r.port.send(frames...); err != nil {
		return fmt.Errorf("tell the VM on %s: %w", r.port.name, err)
	}
	return nil
}

// Answered counts the questions that were answered.
func (r *Responder) Answered() uint64 { return r.answered.Load() }

// Close ends the answers.
func (r *Responder) Close() error {
	r.stop()
	err := r.port.Close()
	r.done.Wait()
	return err
}

// rules say who is answered, and what.
type rules struct {
	vm, mac hardware
	own     []netip.Addr
}

func newRules(vm, mac net.HardwareAddr, own []netip.Addr) (rules, error) {
	v, err := hardwareOf(vm)
	if err != nil {
		return rules{}, err
	}
	m, err := hardwareOf(mac)
	if err != nil {
		return rules{}, err
	}
	if v == m {
		return rules{}, errors.New("the VM would be told its own hardware address")
	}
	r := rules{vm: v, mac: m}
	for _, a := range own {
		r.own = append(r.own, a.Unmap().WithZone(""))
	}
	return r, nil
}

// answer returns the frame that answers a frame of the VM, or nil.
func (r rules) answer(frame []byte) []byte {
	header, payload, err := parseEthernet(frame)
	if err != nil || header.from != r.vm {
		return nil
	}
	reply := ethernet{r.vm, r.mac, header.etherType}.append(nil)
	switch header.etherType {
	case etherTypeARP:
		m, err := parseARP(payload)
		if err != nil || m.operation != arpRequest || m.senderHardware != r.vm || !r.answers(m.sender, m.target) {
			return nil
		}
		return arp{
			operation:      arpReply,
			senderHardware: r.mac, sender: m.target,
			targetHardware: r.vm, target: m.sender,
		}.append(reply)
	case etherTypeIPv6:
		m, err := parseDiscovery(payload)
		if err != nil || m.kind != solicitation || !r.answers(m.source, m.target) ||
			m.linkLayer != (hardware{}) && m.linkLayer != r.vm {
			return nil
		}
		return discovery{
			source: m.target, destination: m.source, kind: advertisement,
			flags:  flagRouter | flagSolicited | flagOverride,
			target: m.target, linkLayer: r.mac,
		}.append(reply)
	}
	return nil
}

// answers decides on a question of sender for target. Asking for oneself is a
// way to say where one is.
func (r rules) answers(sender, target netip.Addr) bool {
	return isHost(sender) && isHost(target) && sender != target && !slices.Contains(r.own, target)
}

// told is the frame that tells the VM that a is at mac.
func (r rules) told(a netip.Addr) []byte {
	if a.Is6() {
		return unsolicited(r.mac, r.vm, r.mac, a, allNodes)
	}
	return gratuitousReply(r.mac, r.vm, r.mac, a)
}
