package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/blocksync/seed"
	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/tunnel"
)

// incoming is a guest that arrives. Its state is changed by run alone, which
// takes one event after the other.
type incoming struct {
	*Engine
	move             *Move
	ask              prepare
	session          *tunnel.Session
	ctl              *control
	log              *slog.Logger
	entry            handoff.Entry
	virt             *hypervisor.Incoming
	begun            bool // a guest of that UUID here is this move's
	unwatch          func()
	ramPath, nbdPath string // QEMU's sockets
	events           chan inEvent

	work    sync.WaitGroup
	have    *blocksync.Content      // of what the destination holds
	older   map[string]handoff.Copy // by target: images that stood here, and are brought up to date
	kept    Kept
	memory  *memorySeed   // that the guest had here; nil if it is not kept
	seeds   []*seed.Image // whose content it holds too
	disks   atomic.Int32  // that are not durable yet
	durable chan struct{} // closed when every disk is
	ranAt   atomic.Int64  // Unix nanoseconds, when libvirt said that the guest was resumed here; 0: never
	tailAt  atomic.Int64  // and when the end of the memory stream was here

	offeredAt, durableAt time.Time
	cookie               []byte
}

// inEvent is what a part of an incoming guest tells run.
type inEvent struct {
	event   handoff.Event
	err     error     // of Broken
	offer   *offer    // not nil: the offer, no event
	loaded  bool      // the memory stream ended well, no event
	durable bool      // every disk is durable, no event
	at      time.Time // when
}

// run takes the guest from the preparation to its end here.
func (in *incoming) run(ctx context.Context) {
	in.entry.State = handoff.Receiver
	partsCtx, stopParts := context.WithCancel(ctx)
	err := in.prepare(ctx)
	if err == nil {
		in.startParts(partsCtx)
		in.move.phase(PhaseSync)
		in.log.Info("incoming guest prepared", "disks", len(in.ask.Disks))
	} else {
		_ = in.step(ctx, handoff.Broken, err)
	}
	loaded, durable := false, false
	for in.entry.State == handoff.Receiver {
		select {
		case ev := <-in.events:
			switch {
			case ev.offer != nil:
				in.cookie, in.offeredAt = ev.offer.Cookie, ev.at
			case ev.loaded:
				loaded = true
			case ev.durable:
				durable, in.durableAt = true, ev.at
			default:
				_ = in.step(ctx, ev.event, ev.err)
			}
			if loaded && durable && in.cookie != nil && in.entry.State == handoff.Receiver {
				in.accept(ctx)
			}
		case word := <-in.move.inbox:
			word.reply <- in.hear(ctx, word.event)
		case <-ctx.Done():
			_ = in.step(ctx, handoff.Broken, context.Cause(ctx))
		case <-in.session.Done():
			_ = in.step(ctx, handoff.Broken, fmt.Errorf("session to the source: %w", in.session.Err()))
		}
	}
	stopParts()
	in.drainEvents()
	if !in.entry.State.Final() {
		in.wait()
	}
	if in.have != nil {
		if err := in.have.Close(); err != nil {
			in.log.Warn("memory of the content index not given back", "error", err)
		}
	}
	if in.memory != nil {
		if err := in.memory.Close(); err != nil {
			in.log.Warn("copy of the guest's memory not closed", "error", err)
		}
	}
	if in.entry.State == handoff.Running {
		in.dropMemory(in.ask.UUID)
	}
	for _, img := range in.seeds {
		if err := img.Close(); err != nil {
			in.log.Warn("seed image not closed", "image", img.Path(), "error", err)
		}
	}
	// Until now serveRedirect may have made something.
	if in.entry.State.Final() {
		in.Redirects.Decide(in.ask.Move, in.entry.State == handoff.Running)
	}
	if in.unwatch != nil {
		in.unwatch()
	}
	for _, socket := range []string{in.ramPath, in.nbdPath} {
		_ = os.Remove(socket) // libvirt leaves some
	}
}

// drainEvents lets every part end: they may wait to tell of an event.
func (in *incoming) drainEvents() {
	ended := make(chan struct{})
	go func() { in.work.Wait(); close(ended) }()
	for {
		select {
		case <-in.events:
		case <-ended:
			return
		}
	}
}

// step applies an event and carries its actions out. An error means that the
// state is as it was.
func (in *incoming) step(ctx context.Context, ev handoff.Event, cause error) error {
	before := in.entry.State
	next, actions, err := handoff.Step(before, ev)
	if err != nil {
		in.log.Debug("event ignored", "error", err)
		return err
	}
	if next != before {
		in.log.Info("handoff", "from", before, "event", ev, "to", next, "cause", cause)
	}
	late := false // its record is
	again := next == handoff.Aborted && before == handoff.Receiver && in.comesBack(ctx, cause)
	for _, a := range actions {
		switch a {
		case handoff.Record:
			in.show(next, cause)
			err := in.record(&in.entry, next, in.move)
			switch {
			case err != nil && handoff.Recurs(before, next):
				in.log.Warn("the move's end is not in the journal yet", "error", err)
				in.entry.State, late = next, true
			case err != nil:
				// Without it an agent that finds Accepted would be in doubt of what
				// the source has been told.
				if err := in.settle(in.log, &in.entry, next, in.move); err != nil {
					return err
				}
			}
		case handoff.Halt:
			if err := in.halt(ctx, in.entry); err != nil {
				return err
			}
		case handoff.Start:
			if err := in.startHere(ctx, in.entry); err != nil {
				return err
			}
		case handoff.Discard:
			in.discard(late)
		case handoff.ReplyAborted:
			in.reply(kindAborted, aborted{fmt.Sprint(cause), in.kept, again})
		}
	}
	if late {
		return in.settle(in.log, &in.entry, next, in.move)
	}
	return nil
}

// comesBack reports whether what keeps the guest from arriving may be over soon.
func (in *incoming) comesBack(ctx context.Context, cause error) bool {
	switch {
	case in.Engine.ctx.Err() != nil: // an agent that stops is started again
		return true
	case errors.Is(cause, io.EOF), errors.Is(cause, io.ErrUnexpectedEOF), errors.Is(cause, syscall.ECONNRESET), errors.Is(cause, syscall.EPIPE):
		return true // of QEMU, which libvirt may not have missed yet
	}
	return in.hasDied(ctx)
}

// hasDied reports whether what should receive the guest is not there any more.
func (in *incoming) hasDied(ctx context.Context) bool {
	if in.virt == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	state, err := in.Host.State(ctx, in.ask.UUID)
	return err != nil || !state.Active()
}

// show makes a final state the status.
func (in *incoming) show(next handoff.State, cause error) {
	shown := phaseOf(next)
	if !shown.Final() {
		return
	}
	in.move.update(func(st *Status) {
		st.Phase = shown
		st.Result = &Result{Result: string(shown), Move: st.Move, VM: st.VM, To: in.Site, TotalMS: time.Since(st.Started).Milliseconds()}
		if cause != nil {
			st.Result.Error = cause.Error()
		}
	})
}

// hear takes what the source says in another session, or an operator.
func (in *incoming) hear(ctx context.Context, ev handoff.Event) heard {
	cause := fmt.Errorf("an operator here said: %v", ev)
	switch ev {
	case handoff.Asked:
		cause = errors.New("the source lost the session and asked for the decision")
	case handoff.Overruled:
		cause = fmt.Errorf("an operator at %s has had the guest run there", in.entry.Site)
	}
	err := in.step(ctx, ev, cause)
	if in.entry.State == handoff.Aborted {
		return heard{kindAborted, err}
	}
	return heard{kindUndecided, err}
}

func (in *incoming) reply(kind byte, body any) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := in.ctl.send(ctx, kind, body); err != nil {
		in.log.Warn("decision not sent, the source will ask", "error", err)
	}
}

// wait stays with a guest that was accepted here until it is known to run, or
// somebody decides that it does not.
func (in *incoming) wait() {
	in.virt.Close()
	u := &undecided{Engine: in.Engine, move: in.move, entry: &in.entry, log: in.log, step: in.step}
	u.run(in.ctx)
}

// prepare makes the disks and the incoming domain.
func (in *incoming) prepare(ctx context.Context) error {
	if err := in.Host.CheckArrival(ctx, in.ask.Name, in.ask.UUID, in.ask.XML, in.ask.PersistXML); err != nil {
		return err
	}
	in.begun = true
	if err := in.createDisks(ctx); err != nil {
		return err
	}
	var err error
	if in.ramPath, in.nbdPath, err = in.Host.DestinationSockets(ctx, in.ask.Move, in.ask.Name); err != nil {
		return err
	}
	if in.unwatch, err = in.Host.Watch(ctx, in.ask.UUID, in.domainEvent); err != nil {
		return err
	}
	mirrored := make([]string, 0, len(in.ask.Disks))
	for _, d := range in.ask.Disks {
		if !d.Static {
			mirrored = append(mirrored, d.Target)
		}
	}
	in.virt, err = in.Host.PrepareIn(ctx, hypervisor.InOptions{Name: in.ask.Name, XML: in.ask.XML, PersistXML: in.ask.PersistXML,
		Cookie: in.ask.Cookie, RAMSocket: in.ramPath, NBDSocket: in.nbdPath, Disks: mirrored, Persist: in.ask.Persist, Paused: in.ask.Paused})
	if err != nil && len(in.older) > 0 {
		return fmt.Errorf("%w (with an older copy of a disk: --fresh makes it anew)", err)
	}
	if err != nil {
		return err
	}
	faults.At("prepared")
	return in.ctl.send(ctx, kindPrepared, prepared{Cookie: in.virt.Cookie, PageStore: in.PageStore})
}

// domainEvent learns of the end or the resume of the guest here.
func (in *incoming) domainEvent(ev hypervisor.Event) {
	switch ev.Kind {
	case hypervisor.EventResumed:
		in.ranAt.CompareAndSwap(0, ev.Time.UnixNano())
	case hypervisor.EventStopped, hypervisor.EventCrashed:
		in.log.Warn("the domain ended at the destination", "event", ev.Kind, "detail", ev.Detail)
	}
}

// startParts starts what receives: the control channel, the disks and memory.
func (in *incoming) startParts(ctx context.Context) {
	in.disks.Store(int32(len(in.ask.Disks)))
	if len(in.ask.Disks) == 0 {
		close(in.durable)
	}
	in.work.Go(func() { in.control(ctx) })
	meter := linkMeter{session: in.session}
	in.work.Go(func() { meter.watch(ctx, in.move) })
	in.work.Go(func() { in.accepting(ctx) })
	in.work.Go(func() {
		if in.awaitDurable(ctx) == nil {
			in.tell(ctx, inEvent{durable: true})
		}
	})
}

// awaitDurable returns when every disk is complete and on stable storage.
func (in *incoming) awaitDurable(ctx context.Context) error {
	select {
	case <-in.durable:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (in *incoming) tell(ctx context.Context, ev inEvent) {
	ev.at = time.Now()
	select {
	case in.events <- ev:
	case <-ctx.Done():
	}
}

// broken tells of a failure, unless it comes from the end of it all.
func (in *incoming) broken(ctx context.Context, what string, err error) {
	if ctx.Err() == nil {
		in.tell(ctx, inEvent{event: handoff.Broken, err: fmt.Errorf("%s: %w", what, err)})
	}
}

// control takes the source's offer, or its cancellation.
func (in *incoming) control(ctx context.Context) {
	for {
		kind, body, err := in.ctl.recv(ctx)
		if err != nil {
			in.broken(ctx, "session to the source", err)
			return
		}
		switch kind {
		case kindOffer:
			o := &offer{}
			if err := decode(body, o); err != nil || len(o.Cookie) > maxCookie {
				in.broken(ctx, "offer", errors.Join(errors.New("not readable"), err))
				return
			}
			if o.Cookie == nil {
				o.Cookie = []byte{}
			}
			in.tell(ctx, inEvent{offer: o})
		case kindPing:
			if err := in.ctl.send(ctx, kindPong, ping{faults.Now()}); err != nil {
				in.broken(ctx, "session to the source", err)
				return
			}
		case kindCancel:
			in.tell(ctx, inEvent{event: handoff.Broken, err: fmt.Errorf("the source cancelled: %w", peerReason(body))})
			return
		default:
			in.broken(ctx, "source", fmt.Errorf("control message %d out of turn", kind))
			return
		}
	}
}

// accepting takes the channels that the source opens: one for memory and one a disk.
func (in *incoming) accepting(ctx context.Context) {
	disks := map[string]wireDisk{}
	for _, d := range in.ask.Disks {
		disks["disk/"+d.Target] = d
	}
	memory, redirect := false, false
	for {
		ch, err := in.session.Accept(ctx)
		if err != nil {
			in.broken(ctx, "session to the source", err)
			return
		}
		d, isDisk := disks[ch.Name()]
		switch {
		case isDisk:
			delete(disks, ch.Name())
			in.work.Go(func() {
				if err := in.receiveDisk(ctx, d, ch); err != nil {
					in.broken(ctx, "disk "+d.Target+" at the destination", err)
				}
			})
		case ch.Name() == "memory" && !memory:
			memory = true
			in.work.Go(func() {
				if err := in.receiveMemory(ctx, ch); err != nil {
					in.broken(ctx, "memory at the destination", err)
					return
				}
				in.tell(ctx, inEvent{loaded: true})
			})
		case ch.Name() == redirectChannel && !redirect:
			redirect = true
			in.work.Go(func() {
				if err := in.serveRedirect(ctx, ch); err != nil {
					in.broken(ctx, "redirect", err)
				}
			})
		default:
			in.broken(ctx, "source", fmt.Errorf("channel %q does not belong to this move", ch.Name()))
			return
		}
	}
}

// accept makes the guest ours and lets it run. Nothing but libvirt's own failure
// stops it now, not even the end of the session.
func (in *incoming) accept(ctx context.Context) {
	if !in.move.decide(ctx) {
		_ = in.step(ctx, handoff.Broken, context.Cause(ctx))
		return
	}
	in.move.phase(PhaseHandoff)
	start := time.Now()
	if err := in.recordAccepted(ctx); err != nil {
		return
	}
	journaled := time.Now()
	in.Redirects.Resuming(in.ask.Move)
	faults.At("finish")
	finishCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := in.virt.Finish(finishCtx, in.cookie, false); err != nil {
		switch in.outcome(finishCtx, err) {
		case hasRun:
			in.log.Error("libvirt's Finish failed, and the guest runs or has run here", "error", err)
		case notRun:
			_ = in.step(ctx, handoff.FinishWrong, fmt.Errorf("libvirt could not finish: %w", err))
			return
		default:
			in.log.Error("libvirt's Finish failed, and whether the guest has run is not known", "error", err)
			return
		}
	}
	resumed := time.Now()
	if at := in.ranAt.Load(); at != 0 {
		resumed = time.Unix(0, at)
	}
	faults.At("finished")
	if err := in.step(ctx, handoff.Resumed, nil); err != nil {
		return // not durable: the next agent looks, and tells
	}
	ms := func(from, to time.Time) float64 { return max(0, float64(to.Sub(from).Microseconds())/1000) }
	drained := latest(in.durableAt, in.offeredAt)
	tail := latest(time.Unix(0, in.tailAt.Load()), drained)
	in.reply(kindRunning, running{DrainMS: ms(in.offeredAt, drained), TailMS: ms(drained, tail), LoadMS: ms(tail, start),
		JournalMS: ms(start, journaled), FinishMS: ms(journaled, resumed), Paused: in.ask.Paused})
	faults.At("told")
	in.virt.Close()
	in.Redirects.Decide(in.ask.Move, true)
	in.arrived(finishCtx, in.log, in.entry)
}

// recordAccepted makes the decision durable. A record whose write failed may be on
// the disk all the same: then it is taken back like one that was written.
func (in *incoming) recordAccepted(ctx context.Context) error {
	err := in.record(&in.entry, handoff.Accepted, in.move)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("acceptance is not durable: %w", err)
	written, readErr := in.Journal.Get(in.ask.Move)
	if readErr == nil && written.State == handoff.Receiver {
		_ = in.step(ctx, handoff.Broken, err)
		return err
	}
	in.entry.State = handoff.Accepted
	_ = in.step(ctx, handoff.FinishWrong, err)
	return err
}

// outcome is what became of a guest whose Finish failed.
type outcome int

const (
	unknownRun outcome = iota
	hasRun
	notRun // for certain: only such a one goes back to the source
)

func (in *incoming) outcome(ctx context.Context, finish error) outcome {
	state, err := in.Host.State(ctx, in.ask.UUID)
	switch {
	case err == nil && state == hypervisor.Running, in.ranAt.Load() != 0:
		return hasRun
	case errors.Is(finish, hypervisor.ErrNoAnswer):
		// libvirtd is gone or hangs: it alone knows. It resumes a guest in Finish
		// or kills it; wait for it to say which.
		return in.awaitLibvirt(ctx)
	}
	return notRun
}

// awaitLibvirt does not believe that a guest is paused: a libvirtd that was just
// started says so of one that runs, until it has asked its QEMU.
func (in *incoming) awaitLibvirt(ctx context.Context) outcome {
	for {
		state, err := in.Host.State(ctx, in.ask.UUID)
		switch {
		case err == nil && state == hypervisor.Running:
			return hasRun
		case err == nil && state == hypervisor.ShutOff, errors.Is(err, hypervisor.ErrNoDomain):
			return notRun
		case ctx.Err() != nil:
			return unknownRun
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// discard removes the incoming domain and the disks made for it. Once that is
// done the journal need not know of them.
func (in *incoming) discard(recordLate bool) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	faults.At("discard")
	in.Redirects.Decide(in.ask.Move, false)
	if !in.begun {
		return
	}
	if in.virt != nil {
		if err := in.virt.Finish(ctx, nil, true); err != nil {
			in.log.Warn("libvirt's Finish of the cancelled move", "error", err)
		}
		in.virt.Close()
	}
	bytes, err := in.discardLeft(ctx, in.entry)
	if err != nil {
		in.log.Error("incoming guest not cleared", "error", err)
	} else {
		in.entry.Created = nil
		if !recordLate {
			if err := in.Journal.Put(in.entry); err != nil {
				in.log.Debug("the next agent clears once more", "error", err)
			}
		}
	}
	in.kept = Kept{Bytes: bytes, Until: time.Now().Add(in.Keep)}
	faults.At("discarded")
}
