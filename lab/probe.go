package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// Probe sends UDP echoes to a guest from both data centres at once, over the link-local address, so that it answers
// wherever it runs. What a client beside the guest would see as downtime is the gap between the last answer at the one
// site and the first at the other.
type Probe struct {
	vm    *VM
	stop  context.CancelFunc
	done  sync.WaitGroup
	conns map[string]net.Conn

	mu    sync.Mutex
	meter gapMeter
	sent  int64
	heard map[string]time.Time // last answer, by site
}

// ProbeResult is what a Probe saw. Times are exact to about the interval between echoes.
type ProbeResult struct {
	Sent     int64    `json:"sent"`
	Answers  int64    `json:"answers"`
	Longest  Gap      `json:"longest"`
	Switches []Switch `json:"switches"` // at most 100
}

// Gap is a time without answers, and the sites that answered before and after it.
type Gap struct {
	Length time.Duration `json:"length_ns"`
	Start  time.Time     `json:"start"`
	From   string        `json:"from"`
	To     string        `json:"to"`
}

// Switch is a gap between answers from different sites. One move makes one switch; more of them, close together, mean that
// the guest ran at both sites at once.
type Switch = Gap

const (
	maxSwitches = 100

	// A site that has not answered for probeQuiet gets one echo in probeSparse: what is sent to a guest that is about to
	// arrive there waits in its queue, and all of it wants to be answered when it does.
	probeQuiet  = time.Second
	probeSparse = 10
)

// gapMeter finds the longest gap in a sequence of answers.
type gapMeter struct {
	last   time.Time
	site   string
	result ProbeResult
}

func (m *gapMeter) answer(site string, at time.Time) {
	if m.result.Answers > 0 {
		gap := Gap{Length: at.Sub(m.last), Start: m.last, From: m.site, To: site}
		if gap.Length > m.result.Longest.Length {
			m.result.Longest = gap
		}
		if site != m.site && len(m.result.Switches) < maxSwitches {
			m.result.Switches = append(m.result.Switches, gap)
		}
	}
	m.result.Answers++
	m.last, m.site = at, site
}

// StartProbe starts to send an echo from each data centre at every interval, until Stop.
func (v *VM) StartProbe(ctx context.Context, interval time.Duration) (*Probe, error) {
	if interval < time.Millisecond || interval > time.Second {
		return nil, fmt.Errorf("interval %v: want 1ms to 1s", interval)
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &Probe{vm: v, stop: cancel, conns: make(map[string]net.Conn), heard: make(map[string]time.Time)}
	for _, dc := range v.lab.DataCentres() {
		site := v.lab.Sites[dc]
		// Without an entry for good, the guest would count as unreachable at the site where it is not, and be asked for once
		// a second.
		err := site.addLinkLocal()
		if err == nil {
			err = site.changeNeighbour(netlink.NeighSet, v)
		}
		var conn net.Conn
		if err == nil {
			conn, err = site.dialBridge(ctx, "udp", netip.AddrPortFrom(v.LinkLocal, api.EchoPort))
		}
		if err != nil {
			_, stopErr := p.Stop()
			return nil, errors.Join(fmt.Errorf("probe VM %q from %s: %w", v.Name, dc, err), stopErr)
		}
		p.conns[dc], p.heard[dc] = conn, time.Now()
	}
	for dc, conn := range p.conns {
		p.done.Go(func() { p.receive(dc, conn) })
	}
	p.done.Go(func() { p.send(ctx, interval) })
	return p, nil
}

func (p *Probe) send(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var b [api.EchoSize]byte
	for sequence := uint64(1); ; sequence++ {
		for dc, conn := range p.conns {
			p.mu.Lock()
			due := time.Since(p.heard[dc]) < probeQuiet || sequence%probeSparse == 0
			if due {
				p.sent++
			}
			p.mu.Unlock()
			if due {
				// An error tells of an earlier echo, which counts as not answered.
				_, _ = conn.Write(api.EchoRecord{Sequence: sequence}.Append(b[:0]))
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// receive ends when the connection is closed.
func (p *Probe) receive(dc string, conn net.Conn) {
	var b [api.EchoSize + 1]byte
	for {
		n, err := conn.Read(b[:])
		at := time.Now()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if _, err := api.ParseEcho(b[:n]); err != nil {
			continue
		}
		p.mu.Lock()
		p.heard[dc] = at
		p.meter.answer(dc, at)
		p.mu.Unlock()
	}
}

// Stop ends the probe and says what it saw. If the guest no longer answered, the longest gap may be the one since its last
// answer, with the same site before and after.
func (p *Probe) Stop() (ProbeResult, error) {
	p.stop()
	var errs []error
	for dc, conn := range p.conns {
		errs = append(errs, conn.Close(), p.vm.lab.Sites[dc].changeNeighbour(netlink.NeighDel, p.vm))
	}
	p.done.Wait()
	r := p.meter.result
	r.Sent = p.sent
	if since := time.Since(p.meter.last); r.Answers > 0 && since > r.Longest.Length {
		r.Longest = Gap{Length: since, Start: p.meter.last, From: p.meter.site, To: p.meter.site}
	}
	return r, errors.Join(errs...)
}

// addLinkLocal gives the site's bridge the address that it gets by itself only when there is a guest.
func (s *Site) addLinkLocal() error {
	return s.inNamespace(func() error {
		bridge, err := netlink.LinkByName(s.Bridge)
		if err != nil {
			return fmt.Errorf("bridge of %s: %w", s.Name, err)
		}
		address := netip.PrefixFrom(linkLocal([6]byte(bridge.Attrs().HardwareAddr)), 64)
		return netlink.AddrReplace(bridge, &netlink.Addr{IPNet: ipNet(address), Flags: unix.IFA_F_NODAD})
	})
}

// changeNeighbour sets or deletes the guest's permanent entry in the neighbour table of the site's bridge.
func (s *Site) changeNeighbour(change func(*netlink.Neigh) error, v *VM) error {
	return s.inNamespace(func() error {
		bridge, err := netlink.LinkByName(s.Bridge)
		if err != nil {
			return fmt.Errorf("bridge of %s: %w", s.Name, err)
		}
		mac, err := net.ParseMAC(v.MAC)
		if err != nil {
			return err
		}
		err = change(&netlink.Neigh{
			LinkIndex: bridge.Attrs().Index, Family: netlink.FAMILY_V6, State: netlink.NUD_PERMANENT, IP: v.LinkLocal.AsSlice(), HardwareAddr: mac,
		})
		if err != nil {
			return fmt.Errorf("neighbour %s at %s: %w", v.LinkLocal, s.Name, err)
		}
		return nil
	})
}
