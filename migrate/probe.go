package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

// Probe is what a look at a peer found.
type Probe struct {
	Site, Version, Libvirt, QEMU string
	RTT                          time.Duration // of a small message
	ClockOffset                  time.Duration // the peer's clock minus ours
	Carriers                     []CarrierProbe
	Findings                     []Finding
}

// CarrierProbe is what a session over one transport gives.
type CarrierProbe struct {
	Transport string  `json:"transport"`
	RTTMS     float64 `json:"rtt_ms,omitempty"`
	Rate      int64   `json:"rate,omitempty"` // bytes per second, to the peer, for half a second
	Problem   string  `json:"problem,omitempty"`
}

// Probe opens a session to a site over each of some transports, compares versions and
// clocks, and measures the round trip and how much can be sent. It returns an error
// when no transport works.
func (e *Engine) Probe(ctx context.Context, site string, transports []tunnel.Transport) (Probe, error) {
	var p Probe
	var problem string
	var failed []error
	for _, t := range transports {
		theirs, c, offset, err := e.probeOver(ctx, site, t)
		if err != nil {
			c.Problem = err.Error()
			failed = append(failed, err)
		} else if rtt := time.Duration(c.RTTMS * float64(time.Millisecond)); p.RTT == 0 || rtt < p.RTT {
			p.RTT, p.ClockOffset = rtt, offset
			p.Site, p.Version, p.Libvirt, p.QEMU, problem = theirs.Site, theirs.Version, theirs.Libvirt, theirs.QEMU, theirs.Problem
		}
		p.Carriers = append(p.Carriers, c)
	}
	if len(failed) == len(transports) {
		return p, errors.Join(failed...)
	}
	for _, c := range p.Carriers {
		if c.Problem != "" {
			p.Findings = append(p.Findings, Finding{Check: c.Transport, Problem: c.Problem,
				Remedy: fmt.Sprintf("let %s pass to the agent's port there; moves go without it meanwhile", map[string]string{"quic": "UDP", "tcp": "TCP"}[c.Transport])})
		}
	}
	if problem != "" {
		p.Findings = append(p.Findings, Finding{Check: "libvirt there", Problem: problem, Remedy: "start libvirtd at " + site, Fatal: true})
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

// probeOver looks at a peer in a session over one transport.
func (e *Engine) probeOver(ctx context.Context, site string, t tunnel.Transport) (theirs hello, c CarrierProbe, offset time.Duration, err error) {
	c.Transport = t.String()
	o := asks
	o.Transport = t
	session, err := e.Dial(ctx, site, o)
	if err != nil {
		return theirs, c, 0, err
	}
	defer session.Close("probed")
	ctl, theirs, err := e.greet(ctx, session)
	if err != nil {
		return theirs, c, 0, err
	}
	rtt := time.Duration(0)
	const rounds = 4
	for range rounds {
		sent := time.Now()
		if err := ctl.send(ctx, kindPing, ping{sent}); err != nil {
			return theirs, c, 0, err
		}
		var pong ping
		if err := ctl.expect(ctx, kindPong, &pong); err != nil {
			return theirs, c, 0, err
		}
		// The shortest round trip gives the best estimate of the clock (RFC 5905).
		if took := time.Since(sent); rtt == 0 || took < rtt {
			rtt, offset = took, pong.Time.Sub(sent.Add(took/2))
		}
	}
	c.RTTMS = ms(rtt)
	session.SetRate(e.rates.most(site, time.Now()))
	c.Rate, err = ctl.measure(ctx, session)
	return theirs, c, offset, err
}
