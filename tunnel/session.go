package tunnel

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"
)

const (
	// MaxChannels is how many channels each side of a session may have opened
	// and not finished; Open waits for one to end.
	MaxChannels = 64
	// MaxUnordered is the largest frame of an unordered channel in bytes.
	MaxUnordered = maxData

	// firstCredit is what each side may send on a channel before it hears of
	// more; so a reader that never begins holds no more than that.
	firstCredit = 256 << 10
	// channelWindow is how far a channel may run ahead of its reader, and what comes over
	// fast carriers ahead of what a slow one owes: 32 MiB are 1.3 s of 200 Mbit/s.
	channelWindow = 32 << 20
	// sessionWindow bounds these of all channels together.
	sessionWindow = 96 << 20
	// maxPieces bounds the frames in these windows: a peer could send them byte by byte.
	maxPieces = 256 << 10

	// flightBytes and flightLimit bound what is kept until the peer has
	// acknowledged it, in bytes and in segments.
	flightBytes = 64 << 20
	flightLimit = flightBytes / len(block{})
)

// sessionConfig is what an Endpoint gives a session.
type sessionConfig struct {
	peer      ID
	token     token
	dialled   bool          // this side has opened the session
	outage    time.Duration // how long it may be without a carrier
	transport Transport     // Auto, or what carriers are restricted to

	// redial makes one more connection of the session to the peer. It is nil when
	// this side cannot.
	redial func(ctx context.Context, t Transport, number uint32) (conn, error)
	// network tells when the addresses or routes of this host have changed.
	network func() (changed <-chan struct{}, stop func())

	running *sync.WaitGroup // the endpoint's, which waits for it
	log     *slog.Logger
}

// Session carries channels to one agent whose identity was verified. It outlives
// its carriers. Its methods are safe for concurrent use.
type Session struct {
	sessionConfig

	ctx    context.Context // ends with the session, and has the reason
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	farewell *frame // what the carriers still say when the session has ended

	// Channels.
	channels map[uint32]*Channel
	mine     int    // of channels, opened here
	nextOwn  uint32 // number of the next channel opened here
	nextPeer uint32 // least number that the peer has not used
	opened   chan struct{}
	accepts  []*Channel    // opened by the peer, and not accepted yet
	accepted chan struct{} // holds a token when accepts has grown
	pieces   int           // of all channels, that wait for their users or for others before them

	// Sending.
	flows    []*outflow // that has not sent for the longest time first
	urgent   []*segment // numbered frames other than data
	echoes   []echo     // small control frames for a second carrier
	small    int        // of urgent, waiting or not acknowledged
	flight   int        // bytes of data that were taken and are not acknowledged
	segments int        // and in how many segments
	stalled  bool       // a frame waits for acknowledgements of others
	bucket   bucket

	steering  steering
	delivered uint64          // bytes of data that the peer has
	brought   [TCP + 1]uint64 // of them, by transport
	resent    uint64          // bytes of data that went a second time
	starved   bool            // a carrier had nothing to carry for a while, since look
	capped    bool            // frames waited for the bucket since look

	// Carriers.
	carriers []*carrier          // alive
	departed map[uint32]*carrier // closed, and the peer has not said what they had brought
	settled  map[uint32]struct{} // numbers that will not be used again
	reserved *carrier            // for control frames alone
	ever     connStats           // of carriers that are gone
	link     linkState
}

func newSession(c sessionConfig) *Session {
	s := &Session{
		sessionConfig: c,
		channels:      make(map[uint32]*Channel),
		opened:        make(chan struct{}, 1),
		accepted:      make(chan struct{}, 1),
		departed:      make(map[uint32]*carrier),
		settled:       make(map[uint32]struct{}),
	}
	if c.dialled {
		s.nextPeer = 1
	} else {
		s.nextOwn = 1
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.link.changed = make(chan struct{}, 1)
	s.link.heard = time.Now()
	s.bucket.wake = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wake(Memory)
	}
	if s.outage == 0 {
		s.outage = DefaultOutage
	}
	s.run(s.tend)
	return s
}

// run runs f, for which the endpoint waits, unless the session has ended.
func (s *Session) run(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() == nil {
		s.running.Go(f)
	}
}

// Open makes a channel to the peer. The name has 1 to 64 of the characters a-z,
// 0-9, '.', '_', '-' and '/'. Open waits while MaxChannels are open.
func (s *Session) Open(ctx context.Context, name string, p Priority) (*Channel, error) {
	return s.open(ctx, channelHeader{name: name, priority: p})
}

// OpenUnordered makes a channel whose frames come as they arrive.
func (s *Session) OpenUnordered(ctx context.Context, name string, p Priority) (*Channel, error) {
	return s.open(ctx, channelHeader{name: name, priority: p, unordered: true})
}

func (s *Session) open(ctx context.Context, header channelHeader) (*Channel, error) {
	if err := header.check(); err != nil {
		return nil, fmt.Errorf("open channel: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.mine == MaxChannels && s.ctx.Err() == nil {
		s.mu.Unlock()
		select {
		case <-s.opened:
		case <-s.ctx.Done():
		case <-ctx.Done():
		}
		s.mu.Lock()
		if ctx.Err() != nil {
			if s.mine < MaxChannels {
				signal(s.opened) // it may have been the word to this one
			}
			return nil, fmt.Errorf("open channel %s: %w", header.name, context.Cause(ctx))
		}
	}
	if s.ctx.Err() != nil {
		return nil, fmt.Errorf("open channel %s: %w", header.name, s.Err())
	}
	c := newChannel(s, s.nextOwn, header.priority)
	c.name = header.name
	s.nextOwn += 2
	s.mine++
	if s.mine < MaxChannels {
		signal(s.opened)
	}
	c.out.push(nil, header.append(nil))
	c.setUnordered(header.unordered)
	s.add(c)
	s.wake(header.priority)
	return c, nil
}

// setUnordered is for both directions of a channel, when its header is queued.
func (c *Channel) setUnordered(unordered bool) {
	c.out.unordered, c.in.unordered = unordered, unordered
}

// add enters a channel into the books.
func (s *Session) add(c *Channel) {
	s.channels[c.id] = c
	s.flows = append(s.flows, c.out)
}

// remove forgets a channel when both sides have done with both directions.
func (s *Session) remove(c *Channel) {
	if !c.out.finished || !c.in.closed || !c.in.sealed || s.channels[c.id] != c {
		return
	}
	delete(s.channels, c.id)
	s.pieces -= c.in.counted
	s.flows = slices.DeleteFunc(s.flows, func(o *outflow) bool { return o == c.out })
	s.accepts = slices.DeleteFunc(s.accepts, func(other *Channel) bool { return other == c })
	if s.own(c.id) {
		s.mine--
		signal(s.opened)
	}
}

// own says whether a channel of this number is opened here.
func (s *Session) own(id uint32) bool { return id%2 == s.nextOwn%2 }

// Accept returns the next channel that the peer has opened.
func (s *Session) Accept(ctx context.Context) (*Channel, error) {
	for {
		s.mu.Lock()
		if s.ctx.Err() != nil {
			s.mu.Unlock()
			return nil, fmt.Errorf("accept channel: %w", s.Err())
		}
		if len(s.accepts) > 0 {
			c := s.accepts[0]
			s.accepts = s.accepts[1:]
			if len(s.accepts) > 0 {
				signal(s.accepted)
			}
			s.mu.Unlock()
			return c, nil
		}
		s.mu.Unlock()
		select {
		case <-s.accepted:
		case <-s.ctx.Done():
		case <-ctx.Done():
			return nil, fmt.Errorf("accept channel: %w", context.Cause(ctx))
		}
	}
}

// queue adds bytes to a channel, when there is room.
func (s *Session) queue(ctx context.Context, o *outflow, head, p []byte) error {
	for {
		s.mu.Lock()
		var err error
		switch {
		case s.ctx.Err() != nil:
			err = s.Err()
		case o.cause != nil:
			err = o.cause
		case o.sealed:
			err = fmt.Errorf("%w for sending", ErrClosed)
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		}
		if err != nil {
			s.mu.Unlock()
			return err
		}
		if o.unsent < queueLimit {
			o.push(head, p)
			s.wake(o.priority)
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		select {
		case <-o.room:
		case <-s.ctx.Done():
		case <-ctx.Done():
		}
	}
}

// await waits until a channel has bytes, and takes them.
func (s *Session) await(ctx context.Context, c *Channel, take func()) error {
	for {
		s.mu.Lock()
		if ctx.Err() != nil {
			s.mu.Unlock()
			return context.Cause(ctx)
		}
		if len(c.in.ready) > 0 && s.ctx.Err() == nil {
			take()
			s.count(c)
			if c.in.drained() {
				s.finish(c, doneAll)
			} else if !c.in.sealed {
				s.grant(c)
			}
			s.mu.Unlock()
			return nil
		}
		var err error
		switch {
		case s.ctx.Err() != nil:
			err = s.Err()
		case c.in.cause != nil:
			err = c.in.cause
		case c.in.drained():
			s.finish(c, doneAll)
			err = io.EOF
		}
		s.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-c.in.arrived:
		case <-s.ctx.Done():
		case <-ctx.Done():
		}
	}
}

// grant lets the peer send more when the reader has used enough.
func (s *Session) grant(c *Channel) {
	c.in.window = s.windowOf(c)
	if limit, due := c.in.grant(); due {
		c.in.limit = limit
		s.post(frame{kind: kindCredit, channel: c.id, offset: limit})
	}
}

// count notes how many pieces a channel has.
func (s *Session) count(c *Channel) {
	if s.channels[c.id] == c {
		n := c.in.pieces()
		s.pieces += n - c.in.counted
		c.in.counted = n
	}
}

// windowOf returns how far a channel may run ahead of its reader: its share of
// what all have together.
func (s *Session) windowOf(c *Channel) uint64 {
	others := uint64(0)
	for _, other := range s.channels {
		if other != c {
			others += other.in.limit - other.in.used
		}
	}
	share := min(channelWindow, sessionWindow/uint64(len(s.channels)))
	return max(firstCredit, min(share, sessionWindow-min(sessionWindow, others)))
}

// sealChannel ends the bytes to the peer.
func (s *Session) sealChannel(c *Channel) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ctx.Err() != nil:
		return s.Err()
	case c.out.cause != nil:
		return c.out.cause
	case c.out.sealed:
		return fmt.Errorf("%w for sending", ErrClosed)
	}
	c.out.seal()
	s.wake(c.out.priority)
	return nil
}

func (s *Session) resetUnsealed(c *Channel) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.out.sealed {
		s.reset(c, resetClosed, ErrClosed)
	}
}

func (s *Session) resetChannel(c *Channel, code resetCode, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reset(c, code, cause)
}

// reset ends the bytes to the peer before their end.
func (s *Session) reset(c *Channel, code resetCode, cause error) {
	if c.out.cause != nil || c.out.finished || s.ctx.Err() != nil {
		return
	}
	c.out.cause = cause
	s.void(c.out)
	s.post(frame{kind: kindReset, channel: c.id, code: uint8(code)})
}

// void takes back what a channel has queued, and forgets what of it is on its way.
func (s *Session) void(o *outflow) {
	o.sealed = true
	for _, g := range o.queue {
		s.settleSegment(g)
		if g.users == 0 {
			g.free()
		}
	}
	o.queue, o.unsent = nil, 0
	forget := func(c *carrier) {
		for _, g := range c.book {
			if g.out == o {
				s.settleSegment(g)
			}
		}
	}
	for _, c := range s.carriers {
		forget(c)
	}
	for _, c := range s.departed {
		forget(c)
	}
	signal(o.room)
	s.wakeAll()
}

func (s *Session) stopChannel(c *Channel, code resetCode, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop(c, code, cause)
}

// stop has the peer send no more on a channel.
func (s *Session) stop(c *Channel, code resetCode, cause error) {
	if !c.in.closed && s.ctx.Err() == nil {
		s.finish(c, code)
	}
	c.in.stop(cause)
	s.count(c)
	s.remove(c)
}

// finish tells the peer that no more is wanted of a channel.
func (s *Session) finish(c *Channel, code resetCode) {
	if c.in.closed {
		return
	}
	c.in.closed = true
	s.post(frame{kind: kindDone, channel: c.id, code: uint8(code)})
	s.remove(c)
}

// Peer returns the peer's verified ID.
func (s *Session) Peer() ID { return s.peer }

// Close ends the session and all its channels, and tells the peer the reason, of
// which it gets at most 256 bytes. What the peer has not received yet is lost: a
// protocol that needs to know ends with an acknowledgement.
func (s *Session) Close(reason string) {
	reason = printable(reason)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end(fmt.Errorf("%w here: %s", ErrClosed, reason), closeReason, reason)
}

// farewellTime is how long the carriers have to tell the peer that the session is
// over.
const farewellTime = 500 * time.Millisecond

// end ends the session, the first time that it is called.
func (s *Session) end(cause error, code closeCode, reason string) {
	if s.ctx.Err() != nil {
		return
	}
	s.farewell = &frame{kind: kindClose, code: uint8(code), data: []byte(reason)}
	carriers := slices.Clone(s.carriers)
	s.running.Go(func() {
		timer := time.NewTimer(farewellTime)
		defer timer.Stop()
		for _, c := range carriers {
			select {
			case <-c.written:
			case <-timer.C:
				timer.Reset(0)
			}
			c.conn.close(code, reason)
		}
	})
	s.cancel(cause)
	s.wakeAll()
	for _, c := range s.channels {
		for _, p := range c.in.ready {
			p.free()
		}
		c.in.ready, c.in.ahead = nil, nil
	}
}

// Done is closed at the end.
func (s *Session) Done() <-chan struct{} { return s.ctx.Done() }

// Err returns nil before the end, and then its reason: ErrClosed, ErrClosedByPeer
// or ErrLost, with the details.
func (s *Session) Err() error { return context.Cause(s.ctx) }
