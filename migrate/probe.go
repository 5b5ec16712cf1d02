package migrate

import (
	"context"
	"fmt"
	"time"
)

// Probe is what a look at a peer found.
type Probe struct {
	Site, Version, Libvirt, QEMU string
	RTT                          time.Duration // of a small message
	ClockOffset                  time.Duration // the peer's clock minus ours
	Findings                     []Finding
}

// Probe opens a session to a site, compares versions and clocks and measures
// the round trip.
func (e *Engine) Probe(ctx context.Context, site string) (Probe, error) {
	var p Probe
	session, err := e.Dial(ctx, site, asks)
	if err != nil {
		return p, err
	}
	defer session.Close("probed")
	ctl, theirs, err := e.greet(ctx, session)
	if err != nil {
		return p, err
	}
	p.Site, p.Version, p.Libvirt, p.QEMU = theirs.Site, theirs.Version, theirs.Libvirt, theirs.QEMU
	const rounds = 4
	for range rounds {
		sent := time.Now()
		if err := ctl.send(ctx, kindPing, ping{sent}); err != nil {
			return p, err
		}
		var pong ping
		if err := ctl.expect(ctx, kindPong, &pong); err != nil {
			return p, err
		}
		// The shortest round trip gives the best estimate of the clock (RFC 5905).
		if rtt := time.Since(sent); p.RTT == 0 || rtt < p.RTT {
			p.RTT, p.ClockOffset = rtt, pong.Time.Sub(sent.Add(rtt/2))
		}
	}
	if theirs.Problem != "" {
		p.Findings = append(p.Findings, Finding{Check: "libvirt there", Problem: theirs.Problem, Remedy: "start libvirtd at " + site, Fatal: true})
	}
	if _, err := e.Host.Info(ctx); err != nil {
		p.Findings = append(p.Findings, Finding{Check: "libvirt here", Problem: err.Error(), Remedy: "start libvirtd at " + e.Site, Fatal: true})
	}
	const skew = time.Second
	if p.ClockOffset > skew || p.ClockOffset < -skew {
		p.Findings = append(p.Findings, Finding{Check: "clocks", Problem: fmt.Sprintf("they differ by %v", p.ClockOffset.Round(time.Millisecond)),
			Remedy: "set both by NTP: guests take their time from the host"})
	}
	return p, nil
}
