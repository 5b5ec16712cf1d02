package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

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

// moveAway carries a move out and leaves its result in the move's status.
func (e *Engine) moveAway(ctx context.Context, m *Move, dom *hypervisor.Domain, req Request) {
	st := m.Status()
	s := &source{Engine: e, move: m, dom: dom, req: req, answers: make(chan answer, 4), pongs: make(chan struct{}, 1),
		log: e.Log.With("move", st.Move, "vm", dom.Name, "to", req.To)}
	s.log.Info("move begins", "uuid", dom.UUID)
	err := s.run(ctx)
	s.end(err)
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

func (e *Engine) hello(ctx context.Context) hello {
	h := hello{Protocol: Protocol, Version: e.Version, Site: e.Site, Time: time.Now()}
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
		Started: st.Started, Persistent: s.dom.Persistent, Paused: s.dom.State == hypervisor.Paused, NVRAM: s.dom.NVRAM != ""}
	if s.req.KeepSource {
		s.entry.Keep = leaving(s.dom, s.plan)
	} else {
		s.entry.Remove = s.plan.remove
	}
	if s.req.KeepMemory {
		s.entry.Keep = append(s.entry.Keep, handoff.Copy{Path: s.memoryPath(s.dom.UUID), VM: s.dom.Name, UUID: s.dom.UUID, Format: memoryFormat})
	}
	if err := s.record(&s.entry, handoff.Owner, s.move); err != nil {
		return err
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
	s.out, err = s.Host.BeginOut(ctx, s.dom, hypervisor.OutOptions{DestXML: destXML, PersistXML: persistXML,
		Disks: s.plan.mirrored(), Persist: s.dom.Persistent, Undefine: s.dom.Persistent,
		Paused: s.req.Paused || s.entry.Paused})
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
	return fmt.Errorf("the destination gave up: %w", peerReason(a.body))
}

// noteAborted takes the destination's word that it has cleaned up.
func (s *source) noteAborted(a answer) {
	var word aborted
	s.aborted = true
	if a.kind == kindAborted && decode(a.body, &word) == nil {
		s.kept = word.Kept
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

// handOff gives the decision away, learns it and acts on it.
func (s *source) handOff(ctx context.Context, sy *syncer, cookie []byte) error {
	if !s.move.decide(ctx) {
		return s.step(handoff.Failed, context.Cause(ctx))
	}
	s.cookie = cookie
	if err := s.step(handoff.Ready, nil); err != nil {
		// Not durable, so not offered: the guest is still ours.
		return s.step(handoff.Failed, fmt.Errorf("%w: free some space in the state folder and try again", err))
	}
	offered := time.Now()
	decision, err := s.learn(ctx)
	if err != nil {
		return err
	}
	if decision.kind == kindAborted {
		return s.step(handoff.AnswerAborted, s.gaveUp(decision))
	}
	var r running
	if decision.body != nil {
		if err := decode(decision.body, &r); err != nil {
			s.log.Warn("the destination's account of the downtime is not readable", "error", err)
		}
	}
	s.measure(sy, offered, r)
	s.verified = sy.verified()
	return s.step(handoff.AnswerRunning, nil)
}

// step applies an event of the handoff and carries its actions out. It returns
// what the operator reads: why the guest is not at the destination, or what is
// left to do here. A cancelled move does not cancel them: only the destination
// knows, from the offer on.
func (s *source) step(ev handoff.Event, cause error) error {
	next, actions, err := handoff.Step(s.entry.State, ev)
	if err != nil {
		return errors.Join(cause, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, a := range actions {
		switch a {
		case handoff.Record:
			if err := s.recordState(next, cause); err != nil {
				return err
			}
		case handoff.SendOffer:
			if err := s.ctl.send(ctx, kindOffer, offer{Cookie: s.cookie}); err != nil {
				s.log.Warn("the offer may not have arrived, asking", "error", err)
			}
		case handoff.Resume:
			cause = s.resume(ctx, cause)
		case handoff.Release:
			cause = s.releaseGuest(ctx)
		}
	}
	return cause
}

// recordState makes a state durable. That of a final state may fail: the next
// start of the agent finds the move and ends it again, which does no harm.
func (s *source) recordState(next handoff.State, cause error) error {
	before := s.entry.State
	if next.Final() {
		s.entry.State = next
		s.summarise(cause)
	}
	err := s.record(&s.entry, next, s.move)
	if err == nil {
		return nil
	}
	if !next.Final() {
		s.entry.State = before
		return err
	}
	s.log.Error("the move's end is not in the journal", "error", err)
	return nil
}

// decisionWait is how long the decision may take until the move counts as in doubt.
const decisionWait = 30 * time.Second

// learn waits for the decision, and asks for it when the session is gone. It
// returns an error only when the agent stops: the journal then asks again.
func (s *source) learn(ctx context.Context) (answer, error) {
	late, stopping := time.After(decisionWait), ctx.Done()
	var latest <-chan time.Time
	for open := true; open; {
		select {
		case a, ok := <-s.answers:
			if ok && (a.kind == kindRunning || a.kind == kindAborted) {
				return a, nil
			}
			if ok {
				s.log.Warn("unexpected control message", "kind", a.kind)
			}
			open = ok
		case <-late:
			s.move.doubt(fmt.Sprintf("no answer for %v; this agent goes on waiting", decisionWait))
		case <-stopping: // the agent ends what it can
			latest, stopping = time.After(decisionWait), nil
		case <-latest:
			return answer{}, errAsksAgain
		}
	}
	s.log.Warn("session lost with the offer out: asking the destination for its decision", "error", s.session.Err())
	return s.ask(ctx, s.move, s.entry)
}

// resume lets the guest run here again, and gives the cause as an operator reads it.
func (s *source) resume(ctx context.Context, cause error) error {
	if s.memory != nil {
		defer s.dropMemory(s.dom.UUID)
	}
	s.undoRedirect("the VM stays here")
	if errors.Is(cause, ErrCancelled) {
		cause = ErrCancelled // whatever part it interrupted
	}
	if s.entry.State == handoff.Owner && !s.aborted {
		s.tellCancel(ctx, cause)
	}
	if s.out != nil {
		if err := s.out.Confirm(ctx, nil, true); err != nil {
			s.log.Warn("libvirt's Confirm", "error", err)
		}
		s.out.Close()
	}
	switch err := s.revive(ctx, s.entry); {
	case errors.Is(err, errStopped):
		cause = fmt.Errorf("%w: %w", err, cause)
	case err != nil:
		cause = fmt.Errorf("%w; and the guest is not running here: %w: try virsh resume %q", cause, err, s.dom.Name)
	}
	s.awaitAborted()
	return cause
}

// tellCancel tells the destination why nothing more comes, if it can be told at
// once: the session's end says the same, and a guest may be waiting.
func (s *source) tellCancel(ctx context.Context, cause error) {
	if s.lost() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_ = s.ctl.send(ctx, kindCancel, reason{cause.Error()})
}

// lost reports whether nothing carries the session now.
func (s *source) lost() bool { return !s.session.Link().LostSince.IsZero() }

// awaitAborted gives the destination time to say that it has cleaned up, so
// that "rolled back" means both hosts.
func (s *source) awaitAborted() {
	if !s.listening || s.aborted {
		return
	}
	if s.lost() {
		s.log.Warn("the destination is not reached: it cleans up when it is told, or after the longest outage")
		return
	}
	late := time.After(time.Minute) // it may be starting QEMU
	for {
		select {
		case a, ok := <-s.answers:
			if ok && a.kind == kindAborted {
				s.noteAborted(a)
			}
			if !ok || s.aborted {
				return
			}
		case <-late:
			s.log.Warn("the destination did not confirm that it has cleaned up")
			return
		}
	}
}

// releaseGuest removes the guest here: it runs at the destination.
func (s *source) releaseGuest(ctx context.Context) error {
	s.move.phase(PhaseSettle)
	s.standRedirect()
	if err := s.out.Confirm(ctx, nil, false); err != nil {
		s.log.Warn("libvirt's Confirm, clearing the source by hand", "error", err)
	}
	s.out.Close()
	if s.memory != nil {
		if err := s.memory.close(); err != nil {
			s.log.Warn("memory", "error", err)
		}
	}
	err := s.clear(ctx, s.entry)
	s.runHook(s.log, AfterResume, s.hookEnv())
	return err
}
