package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/tunnel"
)

// greetTimeout bounds how long a peer may take to say what it wants.
const greetTimeout = 20 * time.Second

// Serve answers one session of a peer until it ends.
func (e *Engine) Serve(ctx context.Context, session *tunnel.Session) {
	if err := e.begin(); err != nil {
		session.Close(err.Error())
		return
	}
	defer e.work.Done()
	log := e.Log.With("peer", session.Peer(), "site", e.Known(session.Peer()), "address", session.RemoteAddr())
	err := e.serve(ctx, session)
	switch {
	case err == nil || session.Err() != nil:
		session.Close("served")
	default:
		log.Warn("session refused", "error", err)
		session.Close(err.Error())
	}
}

func (e *Engine) serve(ctx context.Context, session *tunnel.Session) error {
	greetCtx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	ch, err := session.Accept(greetCtx)
	if err != nil {
		return err
	}
	if ch.Name() != "control" {
		return fmt.Errorf("the first channel is %q, not control", ch.Name())
	}
	ctl := &control{ch: ch}
	var theirs hello
	if err := ctl.expect(greetCtx, kindHello, &theirs); err != nil {
		return err
	}
	mine := e.hello(ctx)
	greetCtx, cancel = context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	if err := ctl.send(greetCtx, kindHello, mine); err != nil {
		return err
	}
	if theirs.Protocol != Protocol {
		return fmt.Errorf("protocol %d, this agent speaks %d: install the same release on both", theirs.Protocol, Protocol)
	}
	cancel()
	return e.converse(ctx, session, ctl)
}

// converse answers requests until the session ends, or until one of them makes
// it the session of an arriving guest.
func (e *Engine) converse(ctx context.Context, session *tunnel.Session, ctl *control) error {
	for {
		kind, body, err := ctl.recv(ctx)
		if err != nil {
			return err
		}
		switch kind {
		case kindPing:
			err = ctl.send(ctx, kindPong, ping{faults.Now()})
		case kindCheck:
			var ask check
			if err = decode(body, &ask); err == nil {
				err = ask.validate()
			}
			if err == nil {
				err = ctl.send(ctx, kindChecked, e.answerCheck(ctx, session, ask))
			}
		case kindMeasure:
			err = ctl.answerMeasure(ctx, session)
		case kindRedirect:
			err = e.inquire(ctx, session, ctl, body)
		case kindQuery:
			var ask query
			if err = decode(body, &ask); err == nil {
				kind, answer := e.decision(ctx, ask, session.Peer())
				err = ctl.send(ctx, kind, answer)
			}
		case kindReturn:
			var ask giveBack
			if err = decode(body, &ask); err == nil {
				err = ask.validate()
			}
			var back givenBack
			if err == nil {
				back, err = e.giveBack(ctx, ask, session.Peer())
			}
			if err == nil {
				err = ctl.send(ctx, kindReturning, back)
			}
		case kindPrepare:
			var ask prepare
			if err = decode(body, &ask); err == nil {
				err = ask.validate()
			}
			if err == nil {
				return e.receive(ctx, session, ctl, ask)
			}
		default:
			err = fmt.Errorf("control message %d is not known here: update this agent", kind)
		}
		if err != nil {
			if ctl.send(ctx, kindRefused, reason{err.Error()}) == nil {
				awaitEnd(session)
			}
			return err
		}
	}
}

// decision answers a source that asks what became of its move, or tells that it
// has the guest.
func (e *Engine) decision(ctx context.Context, ask query, peer tunnel.ID) (kind byte, body any) {
	entry, err := e.Journal.Get(ask.Move)
	switch {
	case errors.Is(err, handoff.ErrNoEntry) || err == nil && entry.Peer != string(peer):
		return kindUnknown, reason{"no record of move " + ask.Move}
	case err != nil:
		return kindUndecided, reason{err.Error()}
	}
	s := said{handoff.Asked, make(chan heard, 1)}
	if ask.Claimed {
		s.event = handoff.Overruled
	}
	ctx, cancel := context.WithTimeout(ctx, answerWait)
	defer cancel()
	if m, ok := e.Move(ask.Move); ok && !entry.State.Final() {
		select {
		case m.inbox <- s:
			var h heard
			select {
			case h = <-s.reply:
			case <-ctx.Done():
				return kindUndecided, reason{"the destination is still ending the move: ask again"}
			}
			if h.err != nil {
				e.Log.Warn("the source's question is not answered", "move", ask.Move, "error", h.err)
			}
			if h.kind == kindUndecided {
				break
			}
			return h.kind, reason{"asked"}
		case <-m.Done():
		case <-ctx.Done():
		}
		if entry, err = e.Journal.Get(ask.Move); err != nil {
			return kindUndecided, reason{err.Error()}
		}
	}
	switch entry.State {
	case handoff.Running:
		return kindRunning, running{}
	case handoff.Aborted:
		return kindAborted, reason{"the destination aborted the move"}
	}
	return kindUndecided, reason{"the move stands at " + string(entry.State) + " there: see wanmig status at the destination"}
}

// answerWait is how long a source that asks waits for a move that is busy.
const answerWait = 10 * time.Second

// receive makes ready for a guest and stays with it until it runs or is discarded.
func (e *Engine) receive(ctx context.Context, session *tunnel.Session, ctl *control, ask prepare) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m := newMove(Status{Move: ask.Move, Role: "destination", VM: ask.Name, UUID: ask.UUID, Peer: e.Known(session.Peer()),
		Phase: PhasePrepare, Started: time.Now()}, cancel)
	defer close(m.done)
	e.awaitEnding(ctx, ask.UUID)
	if err := e.claim(ask.UUID, m); errors.Is(err, errHereBefore) {
		return err // nothing is said of that one
	} else if err != nil {
		_ = ctl.send(ctx, kindAborted, reason{err.Error()})
		awaitEnd(session)
		return err
	}
	in := &incoming{Engine: e, move: m, ask: ask, session: session, ctl: ctl, events: make(chan inEvent), durable: make(chan struct{}),
		log: e.Log.With("move", ask.Move, "vm", ask.Name, "from", e.Known(session.Peer())),
		entry: handoff.Entry{Move: ask.Move, VM: ask.Name, UUID: ask.UUID, Site: e.Known(session.Peer()),
			Peer: string(session.Peer()), Started: m.Status().Started, Persistent: ask.Persist, Autostart: ask.Autostart, XML: ask.definition()}}
	e.mu.Lock()
	e.incoming[ask.Move] = in
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.incoming, ask.Move)
		e.mu.Unlock()
	}()
	in.run(ctx)
	e.release(ask.UUID, m) // the source may take its time to end the session
	awaitEnd(session)
	return nil
}

// awaitEnd lets the peer end the session, so that the last answer reaches it.
func awaitEnd(session *tunnel.Session) {
	select {
	case <-session.Done():
	case <-time.After(30 * time.Second):
	}
}

// answerCheck tells what a move to this host would meet.
func (e *Engine) answerCheck(ctx context.Context, session *tunnel.Session, ask check) checked {
	e.supersede(ask.UUID, session.Peer())
	answer := checked{Findings: e.checkIncoming(ctx, ask)}
	var err error
	if answer.Redirect, err = e.offerRedirect(ctx, session, ask); err != nil {
		answer.Findings = append(answer.Findings, Finding{Check: "redirect", Problem: "connections break: " + err.Error(), Remedy: "look at the agent's log there"})
	}
	return answer
}

// errSuperseded is returned when the source does not know of the move any more.
var errSuperseded = errors.New("its source begins another move of the VM")

// supersede ends an earlier move of a domain from the same source: it does not ask
// for another while it has one, so it was restarted, and its old session is only
// kept in case that the link comes back.
func (e *Engine) supersede(uuid string, peer tunnel.ID) {
	e.mu.Lock()
	in := e.incoming[e.busy[uuid]]
	e.mu.Unlock()
	if in == nil || in.entry.Peer != string(peer) || in.move.Cancel(errSuperseded) != nil {
		return
	}
	select {
	case <-in.move.Done():
	case <-time.After(endingWait):
	}
}

// checkIncoming finds what would keep a guest from running here.
func (e *Engine) checkIncoming(ctx context.Context, ask check) []Finding {
	ctx, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	e.awaitEnding(ctx, ask.UUID)
	spec := hypervisor.IncomingSpec{SourceHost: ask.Host, CPU: ask.CPU, XML: ask.XML}
	for _, d := range ask.Disks {
		c, older := e.olderCopy(ask.UUID, d)
		older = older && (fits(c, d) || ask.Fresh || !c.Kept())
		spec.Disks = append(spec.Disks, hypervisor.IncomingDisk{Target: d.Target, Allocated: d.Allocated, Older: older, DiskSpec: d.spec()})
	}
	var older []Finding
	for _, d := range spec.Disks {
		switch {
		case d.Older && ask.Fresh:
			older = append(older, Finding{Check: "disk " + d.Target, Problem: "an older copy of it stands at " + d.Path + " there, and is removed first"})
		case d.Older:
			older = append(older, Finding{Check: "disk " + d.Target, Problem: "an older copy of it stands at " + d.Path + " there: it is brought up to date, and what is the same is not sent"})
		}
	}
	found, err := e.Host.CheckIncoming(ctx, spec)
	findings := convert(found, err, "checks at the destination", "start libvirtd there: wanmig site check shows more")
	findings = append(append(findings, older...), e.checkJournal("at the destination")...)
	e.mu.Lock()
	defer e.mu.Unlock()
	if other, taken := e.busy[ask.UUID]; taken {
		findings = append(findings, Finding{Check: "other moves", Problem: fmt.Sprintf("move %s of this VM is not over at the destination", other),
			Remedy: "see wanmig status there", Fatal: true})
	}
	return findings
}

// spec is the disk as this host makes it.
func (d wireDisk) spec() hypervisor.DiskSpec {
	kind := "file"
	if d.Block {
		kind = "block"
	}
	return hypervisor.DiskSpec{Path: d.Path, Type: kind, Format: d.Format, VirtualSize: d.Size, ClusterSize: d.ClusterSize}
}
