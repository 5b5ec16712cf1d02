package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/tunnel"
)

// source is a move as the host sees it that the guest leaves.
type source struct {
	*Engine
	move  *Move
	dom   *hypervisor.Domain
	req   Request
	log   *slog.Logger
	entry handoff.Entry

	session   *tunnel.Session
	ctl       *control
	answers   chan answer   // what the destination says once it is prepared; closed with the session
	pongs     chan struct{} // its answers to the vigil
	listening bool          // answers is being fed
	meter     linkMeter
	vigil     vigil
	aborted   bool // the destination has said that it cleaned up
	gave      bool // it gave the move up by itself
	again     bool // and thinks that another attempt may do better
	next      *Move
	kept      Kept // what it keeps all the same
	plan      plan
	redirect  redirecting
	out       *hypervisor.Outgoing
	cookie    []byte        // libvirt's, of Perform
	memory    *memoryWriter // that is kept here; nil if not
	downtime  Downtime
	verified  *Verified
}

// answer is a control message of the destination.
type answer struct {
	kind byte
	body []byte
}

// moveAway carries a move out and leaves its result in the move's status. It
// returns the next attempt, if there is to be one.
func (e *Engine) moveAway(ctx context.Context, m *Move, dom *hypervisor.Domain, req Request) *Move {
	st := m.Status()
	s := &source{Engine: e, move: m, dom: dom, req: req, answers: make(chan answer, 4), pongs: make(chan struct{}, 1),
		log: e.Log.With("move", st.Move, "vm", dom.Name, "to", req.To)}
	m.phase(PhaseCheck)
	s.log.Info("move begins", "uuid", dom.UUID, "attempt", m.attempt)
	err := s.run(ctx)
	if left, ok := errors.AsType[unfinished](err); ok {
		s.goOn(left)
	}
	s.end(err)
	return s.next
}

func (s *source) run(ctx context.Context) error {
	if err := s.check(ctx); err != nil {
		s.closeSession("check ended")
		return err
	}
	if s.req.DryRun {
		s.closeSession("checked")
		return nil
	}
	err := s.transfer(ctx)
	s.closeSession("move ended")
	return err
}

func (s *source) closeSession(reason string) {
	if s.session != nil {
		s.session.Close(reason)
	}
}

// check finds everything that can be known to fail before a byte moves.
func (s *source) check(ctx context.Context) error {
	var err error
	if s.plan, err = makePlan(s.dom, s.req); err != nil {
		return err
	}
	found, err := s.Host.CheckOutgoing(ctx, s.dom)
	findings := append(s.plan.findings, convert(found, err, "checks at the source", "look at libvirtd here")...)
	findings = append(findings, s.checkJournal("at the source")...)
	there, err := s.checkThere(ctx)
	if errors.Is(err, errRequest) {
		return err
	}
	if err != nil {
		findings = append(findings, Finding{Check: "destination", Problem: err.Error(),
			Remedy: fmt.Sprintf("try wanmig site check %s", s.req.To), Fatal: true})
	}
	for _, f := range there { // both hosts look at the domain, and may say the same
		if !slices.Contains(findings, f) {
			findings = append(findings, f)
		}
	}
	s.move.update(func(st *Status) { st.Findings = findings })
	for _, f := range findings {
		if f.Fatal {
			return refused{findings}
		}
	}
	return nil
}

// checkThere opens the session and asks the destination.
func (s *source) checkThere(ctx context.Context) ([]Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var err error
	o := tunnel.DialOptions{MaxOutage: s.req.MaxOutage}
	if s.req.DryRun {
		o = asks
	}
	if s.session, err = s.Dial(ctx, s.req.To, o); err != nil {
		return nil, err
	}
	s.meter.session = s.session
	if s.ctl, _, err = s.greet(ctx, s.session); err != nil {
		return nil, err
	}
	var findings []Finding
	if s.redirect.ask, findings, err = s.askRedirect(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", errRequest, err)
	}
	xml, err := hypervisor.Rewrite(s.dom.XML, s.plan.changes)
	if err != nil {
		return nil, err
	}
	info, err := s.Host.Info(ctx)
	if err != nil {
		return nil, err
	}
	ask := check{Host: info.UUID, Name: s.dom.Name, UUID: s.dom.UUID, CPU: s.dom.CPU, XML: xml, Disks: s.plan.disks, Fresh: s.req.Fresh, Redirect: &s.redirect.ask}
	if err := s.ctl.send(ctx, kindCheck, ask); err != nil {
		return nil, err
	}
	var reply checked
	if err := s.ctl.expect(ctx, kindChecked, &reply); err != nil {
		return nil, err
	}
	if len(reply.Findings) > maxFinding {
		return nil, fmt.Errorf("the destination reports %d findings: not plausible", len(reply.Findings))
	}
	if reply.Redirect != nil {
		s.redirect.offer = *reply.Redirect
		if err := s.redirect.offer.Validate(); err != nil {
			return nil, err
		}
		findings = append(findings, redirectFindings(s.redirect.offer.Findings)...)
	}
	return append(reply.Findings, findings...), nil
}

// errRequest is returned when what was asked for can't be meant.
var errRequest = errors.New("this move can't be made as asked")

// greet opens the control channel and exchanges hellos.
func (e *Engine) greet(ctx context.Context, session *tunnel.Session) (*control, hello, error) {
	var theirs hello
	ch, err := session.Open(ctx, "control", tunnel.Control)
	if err != nil {
		return nil, theirs, err
	}
	c := &control{ch: ch}
	if err := c.send(ctx, kindHello, e.hello(ctx)); err != nil {
		return nil, theirs, err
	}
	if err := c.expect(ctx, kindHello, &theirs); err != nil {
		return nil, theirs, err
	}
	if theirs.Protocol != Protocol {
		return nil, theirs, fmt.Errorf("the agent there speaks protocol %d (version %.40s), this one %d (version %s): install the same release on both",
			theirs.Protocol, theirs.Version, Protocol, e.Version)
	}
	return c, theirs, nil
}

// infoTimeout bounds how long libvirtd may take to describe itself: one that was
// just started looks at its QEMU first.
const infoTimeout = 30 * time.Second

func (e *Engine) hello(ctx context.Context) hello {
	h := hello{Protocol: Protocol, Version: e.Version, Site: e.Site, Time: faults.Now()}
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	info, err := e.Host.Info(ctx)
	if err != nil {
		h.Problem = err.Error()
		return h
	}
	h.Libvirt, h.QEMU = info.LibvirtVersion, info.QEMUVersion
	return h
}

// transfer moves the guest: prepare, sync, handoff and settle. From here on
// the journal knows of the move.
func (s *source) transfer(ctx context.Context) error {
	st := s.move.Status()
	s.entry = handoff.Entry{Move: st.Move, VM: s.dom.Name, UUID: s.dom.UUID, Site: s.req.To, Peer: string(s.session.Peer()),
		Started: st.Started, Persistent: s.dom.Persistent, Paused: s.dom.State == hypervisor.Paused, NVRAM: s.dom.NVRAM != "",
		Autostart: s.dom.Autostart, XML: s.dom.XML, Boot: bootID(), Back: wayBack(s.plan, s.req.Networks)}
	if s.dom.Persistent {
		s.entry.XML = s.dom.InactiveXML
	}
	if s.req.KeepSource {
		s.entry.Keep = leaving(s.dom, s.plan)
	} else {
		s.entry.Remove = s.plan.remove
	}
	if s.req.KeepMemory {
		s.entry.Keep = append(s.entry.Keep, handoff.Copy{Path: s.memoryPath(s.dom.UUID), VM: s.dom.Name, UUID: s.dom.UUID, Format: memoryFormat})
	}
	if err := s.record(&s.entry, handoff.Owner, s.move); err != nil {
		if _, unread := s.Journal.Get(st.Move); errors.Is(unread, handoff.ErrNoEntry) {
			return err
		}
		s.entry.State = handoff.Owner // it may be on the disk all the same, and then it must be ended there
		return s.step(handoff.Failed, err)
	}
	if s.req.KeepMemory {
		var err error
		if s.memory, err = s.keepMemory(s.dom.UUID); err != nil {
			return s.step(handoff.Failed, err)
		}
	}
	watchCtx, unwatch := context.WithCancel(context.WithoutCancel(ctx))
	var watching sync.WaitGroup
	watching.Go(func() { s.meter.watch(watchCtx, s.move) })
	defer watching.Wait()
	defer unwatch()
	s.move.phase(PhasePrepare)
	ready, err := s.prepare(ctx)
	if err != nil {
		return s.step(handoff.Failed, err)
	}
	s.prepareRedirect(ctx)
	s.move.phase(PhaseSync)
	sy, err := s.startSync(ctx, ready)
	if err != nil {
		return s.step(handoff.Failed, err)
	}
	defer sy.stop()
	cookie, err := sy.tail()
	if err != nil {
		return s.step(handoff.Failed, err)
	}
	return s.handOff(ctx, sy, cookie)
}

// prepare has libvirt begin here and the destination make its disks and domain.
func (s *source) prepare(ctx context.Context) (ready prepared, err error) {
	destXML, err := hypervisor.Rewrite(s.dom.XML, s.plan.changes)
	if err != nil {
		return ready, err
	}
	persistXML := ""
	if s.dom.Persistent {
		if persistXML, err = hypervisor.Rewrite(s.dom.InactiveXML, s.plan.changes); err != nil {
			return ready, err
		}
	}
	if err := s.fence(ctx, s.entry); err != nil {
		return ready, err
	}
	s.out, err = s.Host.BeginOut(ctx, s.dom, hypervisor.OutOptions{DestXML: destXML, PersistXML: persistXML,
		Disks: s.plan.mirrored(), Persist: s.dom.Persistent,
		Paused: s.req.Paused || s.entry.Paused, Throttle: s.req.onStall() == StallThrottle})
	if err != nil {
		return ready, err
	}
	err = s.ctl.send(ctx, kindPrepare, prepare{Move: s.entry.Move, Name: s.dom.Name, UUID: s.dom.UUID, XML: s.out.XML,
		PersistXML: persistXML, Persist: s.dom.Persistent, Autostart: s.dom.Autostart,
		Paused: s.req.Paused || s.entry.Paused, Cookie: s.out.Cookie, Disks: s.plan.disks, Fresh: s.req.Fresh})
	if err != nil {
		return ready, err
	}
	s.listening = true
	go s.listen()
	select {
	case a, ok := <-s.answers:
		switch {
		case !ok:
			return ready, fmt.Errorf("session to the destination: %w", s.session.Err())
		case a.kind == kindPrepared:
			err = decode(a.body, &ready)
		default:
			err = s.gaveUp(a)
		}
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if len(ready.Cookie) > maxCookie {
		return ready, errors.New("the destination's libvirt cookie is out of bounds")
	}
	return ready, err
}

// gaveUp is the error of a destination that ends the move before the offer.
func (s *source) gaveUp(a answer) error {
	if a.kind != kindAborted && a.kind != kindRefused {
		return fmt.Errorf("the destination sent message %d out of turn", a.kind)
	}
	s.noteAborted(a)
	s.gave = true
	return fmt.Errorf("the destination gave up: %w", peerReason(a.body))
}

// noteAborted takes the destination's word that it has cleaned up.
func (s *source) noteAborted(a answer) {
	var word aborted
	s.aborted = true
	if a.kind == kindAborted && decode(a.body, &word) == nil {
		s.kept, s.again = word.Kept, word.Again
	}
}

// listen passes on what the destination says, until the session ends.
func (s *source) listen() {
	defer close(s.answers)
	for {
		kind, body, err := s.ctl.recv(context.Background())
		if err != nil {
			return
		}
		if kind == kindPong {
			select {
			case s.pongs <- struct{}{}:
			default: // nobody waits for it
			}
			continue
		}
		select {
		case s.answers <- answer{kind, append([]byte(nil), body...)}:
		default:
			s.session.Close("too many control messages")
			return
		}
	}
}
