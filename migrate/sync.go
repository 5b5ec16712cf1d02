package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/blocksync/nbd"
	"github.com/wanmig/wanmig/faults"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/memsync"
	"github.com/wanmig/wanmig/tunnel"
)

// syncer runs what copies the guest while it runs here: the NBD server that
// its QEMU mirrors into, an outbox and a sender per disk, the memory stream,
// and libvirt's Perform. Each may fail the whole.
type syncer struct {
	s         *source
	ctx       context.Context
	end       context.CancelCauseFunc
	failed    sync.Once
	unlink    func() bool // from the move's own context
	work      sync.WaitGroup
	budget    *blocksync.Budget
	disks     []*outgoingDisk
	pages     *tunnel.Channel
	memory    atomic.Pointer[memsync.Source] // nil until QEMU begins with memory
	pageStore int64                          // bytes of memory that both sides keep
	strict    bool                           // of the memory goroutine
	hooked    bool                           // of the memory goroutine: the hook before the stop has run
	unwatch   func()

	memoryDone chan error     // the memory stream's end
	performed  chan performed // libvirt's Perform's end
	over       chan struct{}  // closed with Perform's end

	shut    context.Context // what QEMU sends goes nowhere from its end on
	close   func()
	lost    atomic.Pointer[error] // of the memory channel, with the guest stopped
	failure atomic.Pointer[error] // what ended the sync

	leave  func()        // the division of the link
	still  chan struct{} // closed when the guest stands still
	tailed chan struct{} // closed when everything of it was sent
	watch  chan error    // has the vigil's end

	pacer      pacer
	adaptive   adaptive     // of meter's goroutine, as the next two
	readBefore int64        // of the memory stream
	readAt     time.Time    //
	heldBack   atomic.Bool  // memory, since the adaptive rate was last told
	held       atomic.Int64 // nanoseconds in all
	fullSpeed  atomic.Bool  // the rest, see adaptive

	newRound chan struct{}              // QEMU has begun another round of memory
	released atomic.Bool                // it may stop the guest
	clearing atomic.Bool                // the destination takes what was sent, before that
	foresee  atomic.Pointer[roundStart] // the last round that was judged

	stopAt    atomic.Int64 // Unix nanoseconds of the guest's stop, 0 while it runs
	tailAt    atomic.Int64 // and of when QEMU had sent its last page,
	endAt     atomic.Int64 // and everything,
	doneAt    atomic.Int64 // and of Perform's return
	diskRate  atomic.Int64 // bytes per second leaving the outboxes
	roundLeft atomic.Int64 // of this pass, as QEMU last told
	peak      atomic.Int64 // what was in the outboxes when memory began
	sent      atomic.Int64 // what had left them then
}

type outgoingDisk struct {
	wireDisk
	outbox *blocksync.Outbox
	ch     *tunnel.Channel
}

type performed struct {
	cookie []byte
	err    error
}

// startSync opens the channels and the two sockets and starts everything.
func (s *source) startSync(parent context.Context, ready prepared) (*syncer, error) {
	ctx, end := context.WithCancelCause(context.WithoutCancel(parent))
	sy := &syncer{s: s, ctx: ctx, end: end, memoryDone: make(chan error, 1), performed: make(chan performed, 1),
		over: make(chan struct{}), still: make(chan struct{}), tailed: make(chan struct{}), watch: make(chan error, 1), newRound: make(chan struct{}, 1),
		pageStore: min(s.PageStore, ready.PageStore)}
	sy.shut, sy.close = context.WithCancel(context.Background())
	sy.unlink = context.AfterFunc(parent, func() { sy.fail(context.Cause(parent)) })
	if err := sy.start(ready.Cookie); err != nil {
		sy.stop()
		return nil, err
	}
	return sy, nil
}

// reasonWait is how long the destination may take to say why it reset a channel.
const reasonWait = 10 * time.Second

// fail ends the sync with the first cause. The destination is told it before
// its channels end, so that its log says the same. A channel that it has reset
// is no cause: the destination is about to tell that.
func (sy *syncer) fail(cause error) {
	if errors.Is(cause, tunnel.ErrReset) {
		sy.work.Go(func() {
			select {
			case <-time.After(reasonWait):
				sy.finish(cause)
			case <-sy.ctx.Done():
			}
		})
		return
	}
	sy.finish(cause)
}

func (sy *syncer) finish(cause error) {
	sy.failed.Do(func() {
		sy.failure.Store(&cause)
		sy.s.tellCancel(sy.ctx, cause)
		sy.letQEMUEnd()
		sy.end(cause)
	})
}

func (sy *syncer) start(cookie []byte) error {
	s := sy.s
	ramPath, nbdPath, err := s.Host.SourceSockets(sy.ctx, s.entry.Move, s.dom.Name)
	if err != nil {
		return err
	}
	ram, err := s.Host.Listen(sy.ctx, ramPath)
	if err != nil {
		return err
	}
	context.AfterFunc(sy.ctx, func() { ram.Close() })
	nbdListener, err := s.Host.Listen(sy.ctx, nbdPath)
	if err != nil {
		return err
	}
	context.AfterFunc(sy.ctx, func() { nbdListener.Close() })

	if sy.budget, err = blocksync.NewBudget(s.Memory, s.Spool, s.SpoolMax); err != nil {
		return err
	}
	exports := map[string]nbd.Export{}
	for _, d := range s.plan.disks {
		disk := &outgoingDisk{wireDisk: d}
		if disk.outbox, err = blocksync.NewOutbox(d.Size, sy.budget); err != nil {
			return fmt.Errorf("disk %s: %w", d.Target, err)
		}
		sy.disks = append(sy.disks, disk)
		if disk.ch, err = s.session.Open(sy.ctx, "disk/"+d.Target, tunnel.Disk); err != nil {
			return err
		}
		if s.req.Verify {
			disk.outbox.WillVerify()
			sy.run("verify disk "+d.Target, func() error { return disk.outbox.Verify(sy.ctx, s.sourceImage(d)) })
		}
		sy.run("disk "+d.Target, func() error { return disk.outbox.Run(sy.ctx, disk.ch, disk.ch) })
		if d.Static {
			sy.run("disk "+d.Target, func() error { return copyStatic(sy.ctx, s.plan.source[d.Target], disk.outbox) })
			continue
		}
		exports[d.Export] = nbd.Export{Device: disk.outbox}
	}
	server := &nbd.Server{Exports: exports, Log: s.log}
	sy.run("NBD server", func() error { return server.Serve(sy.ctx, nbdListener) })

	if sy.pages, err = s.session.Open(sy.ctx, "memory", tunnel.Memory); err != nil {
		return err
	}
	if sy.unwatch, err = s.Host.Watch(sy.ctx, s.dom.UUID, sy.event); err != nil {
		return err
	}
	sy.work.Go(func() { sy.memoryDone <- sy.stream(ram) })
	sy.work.Go(func() {
		cookie, err := s.out.Perform(sy.ctx, cookie, ramPath, nbdPath)
		sy.doneAt.Store(time.Now().UnixNano())
		close(sy.over)
		sy.performed <- performed{cookie, err}
	})
	sy.leave = s.rates.join(&sender{move: s.move, site: s.req.To, session: s.session, weight: s.req.Priority.weight(),
		stopped: func() bool { return sy.stopAt.Load() != 0 }, full: sy.fullSpeed.Load})
	sy.work.Go(sy.meter)
	sy.work.Go(sy.steer)
	sy.work.Go(sy.keepVigil)
	sy.work.Go(sy.watchRedirect)
	return nil
}

// run starts a part whose failure fails the move.
func (sy *syncer) run(what string, part func() error) {
	sy.work.Go(func() {
		if err := part(); err != nil && sy.ctx.Err() == nil {
			sy.fail(fmt.Errorf("%s: %w", what, err))
		}
	})
}

// stream passes QEMU's memory to the destination.
func (sy *syncer) stream(l net.Listener) error {
	conn, err := l.Accept()
	if err != nil {
		return memsync.ErrAborted // Perform ended before memory began, and says why
	}
	l.Close()
	sy.withhold(withheld)
	pending, sent := sy.outboxes()
	sy.peak.Store(pending)
	sy.sent.Store(sent)
	for _, d := range sy.disks {
		d.outbox.Covered() // libvirt begins with memory when every mirror has caught up
	}
	pages := valve{sy.pages, sy}
	c := memsync.SourceConfig{QEMU: conn, Frames: pages, Return: pages, Store: sy.pageStore, Pace: sy.pace, OnTail: sy.tailBegins}
	if keeper := sy.s.memory; keeper != nil {
		c.Keep = keeper.page
	}
	memory := memsync.NewSource(c)
	sy.memory.Store(memory)
	err = memory.Run(sy.ctx)
	sy.endAt.Store(time.Now().UnixNano())
	if err != nil && !errors.Is(err, memsync.ErrAborted) && sy.ctx.Err() == nil {
		sy.fail(fmt.Errorf("memory: %w", err))
	}
	return err
}

// pace holds the memory stream back while the disks need the link.
func (sy *syncer) pace(ctx context.Context, n int) error {
	sy.guardOpaque()
	stopped := func() bool { return sy.stopAt.Load() != 0 }
	if err := sy.pacer.wait(ctx, n, func() bool { return stopped() || sy.released.Load() }); err != nil {
		return err
	}
	for began := time.Now(); !stopped() && !sy.mayRead(); {
		sy.heldBack.Store(true)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
		now := time.Now()
		sy.held.Add(int64(now.Sub(began)))
		began = now
	}
	return nil
}

// watchRedirect ends the sync as soon as a redirect that was asked for by name
// can't be had.
func (sy *syncer) watchRedirect() {
	select {
	case <-sy.s.redirect.ready:
		if _, err := sy.s.redirectReady(); err != nil {
			sy.fail(err)
		}
	case <-sy.ctx.Done():
	}
}

// mayRead decides whether QEMU's stream is read now. Its end waits for the
// redirect to be ready, for the disks to be compared, and for the hook that runs before the stop; where the
// stream is not understood all but its beginning does.
func (sy *syncer) mayRead() bool {
	l := sy.load()
	faults.At(passOf(l))
	if sy.clearing.Load() || !memoryMayRead(l) {
		return false
	}
	if sy.hooked || !sy.memoryStats().Opaque && farFromStop(l) {
		return true
	}
	if ready, err := sy.s.redirectReady(); !ready || err != nil {
		return false // watchRedirect ends the sync
	}
	for _, d := range sy.disks {
		if !d.outbox.Verified() {
			return false
		}
	}
	sy.hooked = true
	if err := sy.s.Hooks.run(sy.ctx, BeforeStop, sy.s.hookEnv()); err != nil {
		sy.fail(err)
		return false
	}
	return true
}

// passOf names the point where a fault may wait.
func passOf(l load) string {
	if l.FirstPassLeft > 0 || l.RAM == 0 {
		return "first-pass"
	}
	return "later-pass"
}

// guardOpaque makes the mirrors' flushes wait for the destination when the
// memory stream is not understood: its tail is not held back there then.
func (sy *syncer) guardOpaque() {
	if !sy.memoryStats().Opaque || sy.strict {
		return
	}
	sy.strict = true
	sy.s.log.Warn("QEMU's stream is not understood: the handoff takes longer, the move is safe")
	for _, d := range sy.disks {
		d.outbox.Strict(true)
	}
}

func (sy *syncer) memoryStats() memsync.Stats {
	if m := sy.memory.Load(); m != nil {
		return m.Stats()
	}
	return memsync.Stats{} // memory has not begun
}

func (sy *syncer) load() load {
	m := sy.memoryStats()
	pending, sent := sy.outboxes()
	return load{DiskPending: pending, DiskPeak: sy.peak.Load(), DiskSent: sent - sy.sent.Load(), DiskRate: float64(sy.diskRate.Load()),
		Silent: sy.s.vigil.isSilent(), Released: sy.released.Load(), FirstPassLeft: int64(m.UnseenPages * m.PageSize), RoundLeft: sy.roundLeft.Load(), RAM: int64(m.RAMBytes)}
}

// verified is what came of comparing the disks; nil if that was not asked for.
func (sy *syncer) verified() *Verified {
	if !sy.s.req.Verify {
		return nil
	}
	v := &Verified{}
	for _, d := range sy.disks {
		o := d.outbox.Stats()
		v.Same, v.Last = v.Same+o.Verified, v.Last+o.VerifiedLast
	}
	return v
}

// outboxes tells how much content they hold, and how much has left them.
func (sy *syncer) outboxes() (pending, sent int64) {
	for _, d := range sy.disks {
		st := d.outbox.Stats()
		pending += st.Pending()
		sent += st.SentData + st.Held
	}
	return pending, sent
}

// event learns of the rounds of memory and of the guest's stop.
func (sy *syncer) event(ev hypervisor.Event) {
	if ev.Kind == hypervisor.EventIteration {
		select {
		case sy.newRound <- struct{}{}:
		default: // one that has not been looked at yet
		}
	}
	if !finalStop(ev) {
		return
	}
	sy.stand(ev.Time)
	sy.s.switchRedirect()
	sy.s.move.phase(PhaseHandoff)
	faults.At("stopped")
}

// stand notes that the guest stands still: what remains of it goes before all else.
func (sy *syncer) stand(since time.Time) {
	if sy.stopAt.CompareAndSwap(0, since.UnixNano()) {
		close(sy.still)
		sy.pages.SetPriority(tunnel.Tail)
		for _, d := range sy.disks {
			d.ch.SetPriority(tunnel.Tail)
		}
		sy.s.rates.apply(time.Now())
	}
}

// keepVigil lets the guest go on here when the destination does not answer while it
// stands still. A guest that was paused before has nothing to wait for.
func (sy *syncer) keepVigil() {
	still := sy.still
	if sy.s.entry.Paused {
		still = nil
	}
	err := sy.s.vigil.keep(sy.ctx, still, sy.tailed, sy.ping, sy.s.pongs)
	sy.watch <- err
	if err != nil {
		sy.fail(err)
	}
}

// ping asks the destination whether it is there.
func (sy *syncer) ping() <-chan error {
	sent := make(chan error, 1)
	sy.work.Go(func() { sent <- sy.s.ctl.send(sy.ctx, kindPing, ping{faults.Now()}) })
	return sent
}

// finalStop reports whether the guest was stopped by its migration. An operator,
// an I/O error or a watchdog may stop it before.
func finalStop(ev hypervisor.Event) bool {
	return ev.Kind == hypervisor.EventSuspended && ev.Detail == "migrated"
}

// stopped is when the guest stopped, or zero.
func (sy *syncer) stopped() time.Time {
	if ns := sy.stopAt.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// tailBegins notes that the guest's memory has been sent.
func (sy *syncer) tailBegins() {
	sy.tailAt.Store(time.Now().UnixNano())
	sy.seal()
}

// seal closes the outboxes: the RAM section has ended, so the guest is stopped
// and libvirt has completed the mirrors.
func (sy *syncer) seal() {
	sy.stand(time.Now())
	for _, d := range sy.disks {
		d.outbox.Seal() // first: the guest's resume waits for the disks
	}
	sy.s.switchRedirect()
}

// tail returns when everything of the guest was sent, with libvirt's cookie for
// the destination. The disks' last blocks may still be on their way: the
// destination does not accept before they are durable.
func (sy *syncer) tail() ([]byte, error) {
	p, err := sy.awaitPerform()
	if err != nil {
		return nil, err
	}
	// Perform is good: QEMU has closed its socket, so this ends at once.
	select {
	case err := <-sy.memoryDone:
		if err != nil {
			return nil, fmt.Errorf("memory: %w", err)
		}
	case <-sy.ctx.Done():
		return nil, context.Cause(sy.ctx)
	}
	sy.seal() // not yet done when the stream passed opaque
	close(sy.tailed)
	faults.At("tailed")
	return p.cookie, <-sy.watch
}

// awaitPerform waits for Perform, and for what the destination says meanwhile.
func (sy *syncer) awaitPerform() (performed, error) {
	answers := sy.s.answers
	for {
		select {
		case p := <-sy.performed:
			if lost := sy.lost.Load(); p.err == nil && lost != nil {
				p.err = *lost
			}
			if failure := sy.failure.Load(); failure != nil {
				return p, *failure
			}
			if p.err == nil {
				return p, nil
			}
			return p, sy.cause(p.err)
		case a, ok := <-answers:
			switch {
			case !ok:
				answers = nil
				sy.fail(fmt.Errorf("session to the destination: %w", sy.s.session.Err()))
			default:
				sy.fail(sy.s.gaveUp(a))
			}
		}
	}
}

// cause finds the reason of a failed Perform: what failed first of our own
// parts or at the destination says more than libvirt's broken pipe.
func (sy *syncer) cause(perform error) error {
	if sy.ctx.Err() != nil {
		return context.Cause(sy.ctx)
	}
	select {
	case a, ok := <-sy.s.answers:
		if ok {
			return sy.s.gaveUp(a)
		}
	case <-sy.ctx.Done():
		return context.Cause(sy.ctx)
	case <-time.After(time.Second):
	}
	return perform
}

// stop ends every part and waits for it.
func (sy *syncer) stop() {
	sy.unlink()
	sy.close()
	sy.end(errors.New("the move ended"))
	if sy.unwatch != nil {
		sy.unwatch()
	}
	sy.work.Wait()
	if sy.leave != nil {
		sy.leave()
	}
	if sy.budget != nil {
		sy.budget.Close()
	}
}
