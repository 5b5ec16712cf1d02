package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A flow is what a client of a guest does for as long as it is not stopped: a connection or a session from inside a site,
// with all that goes over it numbered and compared. Its Done is closed when it ends by itself; its Stop asks it to end,
// waits for what is under way and says what there was. The context of a flow ends it as Stop does, which must still be
// called. Errors of a flow are in its result: they are what it is there to find.

// Silence is a time in which nothing was heard of a guest.
type Silence struct {
	Length time.Duration `json:"length_ns"`
	Start  time.Time     `json:"start"`
}

func (s Silence) String() string {
	if s.Length == 0 {
		return "no gap"
	}
	return fmt.Sprintf("longest gap %d ms at %s", s.Length.Milliseconds(), s.Start.Format("15:04:05.000"))
}

func describeBroken(why string) string {
	if why == "" {
		return ""
	}
	return ", BROKEN: " + why
}

const (
	// dialTimeout bounds the start of a flow.
	dialTimeout = 10 * time.Second
	// drainTime is how long a flow that was stopped waits for what it has not been answered yet.
	drainTime = 10 * time.Second
)

// silenceMeter finds the longest time between two moments at which something was heard.
type silenceMeter struct {
	began   time.Time
	last    time.Time // zero before anything was heard
	longest Silence
}

func (m *silenceMeter) heard(at time.Time) {
	if !m.last.IsZero() {
		m.silent(m.last, at)
	}
	m.last = at
}

// lost tells that nothing was heard until now and nothing is waited for any more.
func (m *silenceMeter) lost(at time.Time) { m.silent(m.lastHeard(), at) }

// lastHeard is when something was heard last, or the beginning.
func (m *silenceMeter) lastHeard() time.Time {
	if m.last.IsZero() {
		return m.began
	}
	return m.last
}

func (m *silenceMeter) silent(from, to time.Time) {
	if length := to.Sub(from); length > m.longest.Length {
		m.longest = Silence{Length: length, Start: from}
	}
}

// dial connects to an address from inside the site. The zone of an IPv6 address is the name of an interface there.
func (s *Site) dial(ctx context.Context, network string, to netip.AddrPort) (conn net.Conn, err error) {
	if !to.IsValid() {
		return nil, errors.New("no address to connect to")
	}
	if err := s.alive(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	err = s.inNamespace(func() error {
		if zone := to.Addr().Zone(); zone != "" {
			device, err := net.InterfaceByName(zone)
			if err != nil {
				return fmt.Errorf("interface %s of %s: %w", zone, s.Name, err)
			}
			// By number: net remembers numbers by name, for all namespaces alike.
			to = netip.AddrPortFrom(to.Addr().WithZone(strconv.Itoa(device.Index)), to.Port())
		}
		conn, err = new(net.Dialer).DialContext(ctx, network, to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect from %s: %w", s.Name, err)
	}
	return conn, nil
}

// dial connects a flow from a site to a port at an address of the guest.
func (v *VM) dial(ctx context.Context, site, network string, to netip.Addr, port uint16) (net.Conn, error) {
	s, err := v.lab.Site(site)
	if err != nil {
		return nil, err
	}
	return s.dial(ctx, network, netip.AddrPortFrom(to, port))
}

// checkInterval refuses intervals between echoes that a guest or a meter could not keep up with.
func checkInterval(interval time.Duration) error {
	if interval < time.Millisecond || interval > time.Minute {
		return fmt.Errorf("interval %v: want 1ms to 1m", interval)
	}
	return nil
}

// countReset is 1 for an error of a connection that the other side, or a host between, does not know any more.
func countReset(err error) int {
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		return 1
	}
	return 0
}
