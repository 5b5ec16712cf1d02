package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// redirectChannel is the channel of a move's session on which the source makes
// the redirect ready. Its frames are those of the control channel.
const redirectChannel = "redirect"

// RedirectPlan is the part of a Result that tells what a redirect changes, as a
// network engineer would type it.
type RedirectPlan struct {
	Kinds       []netredirect.Kind        `json:"kinds"` // in the order in which they are tried
	Mode        netredirect.Mode          `json:"mode"`
	Mapped      map[netip.Addr]netip.Addr `json:"mapped,omitempty"` // the VM's addresses and its new ones
	Source      []string                  `json:"source"`
	Destination []string                  `json:"destination"`
}

// redirecting is a move's redirect at its source.
type redirecting struct {
	ask   netredirect.Ask
	offer netredirect.Offer
	ready chan struct{} // closed when it is armed, or will not be
	err   error         // why it will not be, after ready; nil when it was given up
	end   func()        // gives it up, where it is not ready yet
	live  interface {
		Switch()
		Undo(why string)
	}
}

// options are the request's, completed by the configuration.
func (e *Engine) redirectOptions(req Request) netredirect.Options {
	o := e.Redirect
	if req.Redirect != "" {
		o.Kind = req.Redirect
	}
	if req.RedirectMax > 0 {
		o.Max = req.RedirectMax
	}
	if req.Egress != "" {
		o.Egress = req.Egress
	}
	o.Mode, o.LowerTTL, o.Names = req.Addresses, req.LowerTTL, req.DNSNames
	return o
}

// askRedirect finds what of the VM can be redirected.
func (s *source) askRedirect(ctx context.Context) (netredirect.Ask, []Finding, error) {
	o := s.redirectOptions(s.req)
	if err := o.Validate(); err != nil {
		return netredirect.Ask{}, nil, err
	}
	if o.Kind == netredirect.None {
		return netredirect.Ask{Options: o}, nil, nil
	}
	nics, findings, err := s.guestNICs(ctx)
	if err != nil {
		return netredirect.Ask{}, nil, err
	}
	peer, err := addrOf(s.session.RemoteAddr())
	if err != nil {
		return netredirect.Ask{}, nil, err
	}
	ask, found := s.Redirects.Ask(o, s.dom.UUID, nics, peer)
	return ask, append(findings, redirectFindings(found)...), nil
}

// guestNICs are the VM's interfaces with the addresses that it uses: those that
// the operator names, or that libvirt knows from the guest agent, DHCP leases or
// ARP, or that are seen on the wire.
func (s *source) guestNICs(ctx context.Context) ([]netredirect.NIC, []Finding, error) {
	list, err := s.Host.NICs(ctx, s.dom.UUID)
	if err != nil {
		return nil, nil, err
	}
	known, from, err := s.Host.Addresses(ctx, s.dom.UUID)
	if err != nil {
		s.log.Debug("libvirt knows no addresses of the VM", "error", err)
	}
	named := map[string]bool{}
	var all []netredirect.NIC
	for _, n := range list {
		mac := strings.ToLower(n.MAC)
		nic := netredirect.NIC{MAC: mac, Bridge: n.Bridge, Tap: n.Tap}
		for key, addrs := range s.req.VMAddresses {
			if strings.EqualFold(key, mac) || key == n.Tap || key == n.Bridge {
				named[key] = true
				nic.Addresses = append(nic.Addresses, addrs...)
			}
		}
		if len(nic.Addresses) == 0 {
			nic.Addresses = s.Redirects.Known(s.dom.UUID, mac)
		}
		if len(nic.Addresses) == 0 {
			for _, p := range known[mac] {
				nic.Addresses = append(nic.Addresses, p.Addr())
			}
		}
		if len(nic.Addresses) == 0 || len(known[mac]) > 0 && from == hypervisor.FromARP {
			// The neighbour table has those only that the host has spoken with.
			nic.Addresses = append(nic.Addresses, s.Redirects.Observed(ctx, nic)...)
		}
		slices.SortFunc(nic.Addresses, netip.Addr.Compare)
		nic.Addresses = slices.Compact(nic.Addresses)
		all = append(all, nic)
	}
	for key := range s.req.VMAddresses {
		if !named[key] {
			return nil, nil, fmt.Errorf("--address %s=…: the VM has no interface with that MAC, tap or bridge", key)
		}
	}
	return all, nil, nil
}

func addrOf(a net.Addr) (netip.Addr, error) {
	var ip net.IP
	switch a := a.(type) {
	case *net.UDPAddr:
		ip = a.IP
	case *net.TCPAddr:
		ip = a.IP
	}
	addr, ok := netip.AddrFromSlice(ip)
	if !ok {
		return netip.Addr{}, fmt.Errorf("the session's address %v is not of IP", a)
	}
	return addr.Unmap(), nil
}

func redirectFindings(from []netredirect.Finding) []Finding {
	var all []Finding
	for _, f := range from {
		all = append(all, Finding(f))
	}
	return all
}

// redirectTakes is how long a redirect may take to be made, of the time in which the
// destination answers.
const redirectTakes = 45 * time.Second

// prepareRedirect makes the redirect ready at both hosts, beside the sync.
func (s *source) prepareRedirect(ctx context.Context) {
	r := &s.redirect
	r.ready = make(chan struct{})
	ctx, end := context.WithCancelCause(ctx)
	r.end = func() { end(nil) }
	if len(r.ask.NICs) == 0 {
		close(r.ready)
		return
	}
	s.work.Go(func() {
		defer close(r.ready)
		defer r.end()
		s.work.Go(func() { s.vigil.patience(ctx, redirectTakes, end) })
		err := s.beginRedirect(ctx)
		if err != nil && (ctx.Err() == nil || errors.Is(context.Cause(ctx), errSlow)) {
			r.err = err
			s.notRedirected(err)
		}
	})
}

// notRedirected tells the operator that connections break.
func (s *source) notRedirected(why error) {
	s.log.Warn("connections will not be redirected", "error", why)
	s.move.update(func(st *Status) {
		st.Findings = append(slices.Clone(st.Findings), Finding{Check: "redirect", Problem: "connections are not redirected: " + why.Error(),
			Remedy: "clients have to connect again to the VM's new place"})
	})
}

func (s *source) beginRedirect(ctx context.Context) error {
	address, err := addrOf(s.session.RemoteAddr())
	if err != nil {
		return err
	}
	ch, err := s.session.Open(ctx, redirectChannel, tunnel.Control)
	if err != nil {
		return err
	}
	c := &control{ch: ch}
	call := func(ctx context.Context, op string, request, reply any) error {
		answer, err := c.redirect(ctx, s.entry.Move, op, request)
		if err != nil {
			return err
		}
		return answer.read(reply)
	}
	peer := netredirect.Peer{Site: s.req.To, ID: string(s.session.Peer()), Address: address}
	vm := netredirect.VM{Move: s.entry.Move, Name: s.dom.Name, UUID: s.dom.UUID}
	for {
		began := time.Now()
		x, err := s.Redirects.Begin(ctx, vm, peer, s.redirect.ask, s.redirect.offer, call)
		if err == nil {
			s.redirect.live = x
			return nil
		}
		if ctx.Err() != nil || !s.vigil.wasSilent(began) {
			return err
		}
		s.log.Info("the link went while the redirect was made: it is made again", "error", err)
		for s.vigil.isSilent() && ctx.Err() == nil {
			select {
			case <-time.After(vigilEvery):
			case <-ctx.Done():
			}
		}
	}
}

// redirectReady reports whether the stop need not wait for the redirect, and the
// error of one that was asked for by name and can't be had.
func (s *source) redirectReady() (bool, error) {
	select {
	case <-s.redirect.ready:
		if s.redirect.err != nil && s.redirect.ask.Options.Kind != netredirect.Auto {
			return true, fmt.Errorf("--redirect %s: %w", s.redirect.ask.Options.Kind, s.redirect.err)
		}
		return true, nil
	default:
		return false, nil
	}
}

// switchRedirect sends the VM's packets into the tunnel: it has stopped.
func (s *source) switchRedirect() {
	if ready, _ := s.redirectReady(); ready && s.redirect.live != nil {
		s.redirect.live.Switch()
	}
}

// standRedirect begins what follows when the VM has gone. A redirect that is
// not ready by now is given up: the destination makes nothing more for it.
func (s *source) standRedirect() {
	if ready, _ := s.redirectReady(); ready {
		s.Redirects.Decide(s.entry.Move, true)
		return
	}
	s.notRedirected(errors.New("the tunnel was not ready when the VM had gone"))
	s.undoRedirect("the VM has gone without it")
}

// undoRedirect ends the redirect of a VM that stays, or has gone before it was
// ready. What takes long to end is undone when it has.
func (s *source) undoRedirect(why string) {
	r := &s.redirect
	if r.ready == nil {
		return
	}
	r.end()
	undo := func() {
		if r.live != nil {
			r.live.Undo(why)
		}
	}
	select {
	case <-r.ready:
		undo()
	case <-time.After(2 * time.Second):
		s.work.Go(func() { <-r.ready; undo() })
	}
}

// offerRedirect answers what a redirect to this host would be.
func (e *Engine) offerRedirect(ctx context.Context, session *tunnel.Session, ask check) (*netredirect.Offer, error) {
	if ask.Redirect == nil {
		return nil, nil
	}
	from, err := addrOf(session.RemoteAddr())
	if err != nil {
		return nil, err
	}
	list, err := e.Host.PlannedNICs(ctx, ask.XML)
	if err != nil {
		return nil, err
	}
	offer, err := e.Redirects.Answer(*ask.Redirect, nicsOf(list), from)
	return &offer, err
}

// NICs are those of a VM at this host, without addresses.
func (e *Engine) NICs(ctx context.Context, uuid string) ([]netredirect.NIC, error) {
	list, err := e.Host.NICs(ctx, uuid)
	return nicsOf(list), err
}

func nicsOf(list []hypervisor.NIC) []netredirect.NIC {
	var all []netredirect.NIC
	for _, n := range list {
		all = append(all, netredirect.NIC{MAC: strings.ToLower(n.MAC), Bridge: n.Bridge, Tap: n.Tap})
	}
	return all
}

// serveRedirect answers the source of a guest that arrives, until its session ends.
func (in *incoming) serveRedirect(ctx context.Context, ch *tunnel.Channel) error {
	from, err := addrOf(in.session.RemoteAddr())
	if err != nil {
		return err
	}
	arrival := netredirect.Arrival{VM: netredirect.VM{Move: in.ask.Move, Name: in.ask.Name, UUID: in.ask.UUID},
		Peer: netredirect.Peer{Site: in.entry.Site, ID: in.entry.Peer, Address: from}}
	list, err := in.Host.NICs(ctx, in.ask.UUID)
	if err != nil {
		in.log.Warn("the arriving guest's interfaces are not known", "error", err)
	}
	arrival.NICs = nicsOf(list)
	c := &control{ch: ch}
	for {
		kind, body, err := c.recv(ctx)
		if err != nil {
			return nil // with the session, whose end is told elsewhere
		}
		var ask redirectRequest
		if kind != kindRedirect {
			return fmt.Errorf("message %d does not belong to the redirect", kind)
		}
		if err := decode(body, &ask); err != nil {
			return err
		}
		if err := c.answerRedirect(ctx, ask.Seq, func() (any, error) { return in.Redirects.Serve(ctx, arrival, ask.Op, ask.Body) }); err != nil {
			return nil
		}
	}
}
