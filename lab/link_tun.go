package lab

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// tun is a TUN device by the descriptor that keeps it alive.
type tun struct {
	name string
	fd   int // non-blocking
}

// openTUN makes a TUN device in the network namespace of the calling thread.
// Without a header of virtio-net the kernel hands over finished packets:
// segmented, and with checksums.
func openTUN(name string) (tun, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return tun{}, fmt.Errorf("open %s: %w", tunDevice, err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		unix.Close(fd)
		return tun{}, fmt.Errorf("make TUN device %s: %w", name, err)
	}
	return tun{name, fd}, nil
}

// emulator carries packets between pairs of TUN devices as LinkSettings say.
type emulator struct {
	sites      []string
	directions []*direction

	mu       sync.Mutex
	settings LinkSettings
	nats     map[string]*nat // by site
	err      error           // why the link does not run any more
}

// direction is one thread that reads packets of the site named from, lets path
// decide and writes them to the other site. A single thread cannot reorder.
type direction struct {
	from    string
	to      string
	name    string // of its counters
	in, out tun
	wake    int // eventfd: settings changed
	epoch   time.Time

	mu        sync.Mutex
	path      *path
	near, far *nat // of from and of to; nil: none
}

// wire is a link to be: tuns[0] is a device of sites[0].
type wire struct {
	sites [2]string
	tuns  [2]tun
}

// newEmulator makes links, of which the first is between the pair.
func newEmulator(settings LinkSettings, wires ...wire) (*emulator, error) {
	e := &emulator{settings: settings, nats: map[string]*nat{}}
	epoch := time.Now()
	for n, w := range wires {
		for i, from := range w.sites {
			wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			if err != nil {
				return nil, fmt.Errorf("make eventfd: %w", err)
			}
			name := from
			if n > 0 {
				name += ">" + w.sites[1-i]
			}
			if !slices.Contains(e.sites, from) {
				e.sites = append(e.sites, from)
			}
			e.directions = append(e.directions, &direction{
				from: from, to: w.sites[1-i], name: name, in: w.tuns[i], out: w.tuns[1-i], wake: wake, epoch: epoch,
				path: newPath(settings, slices.Contains(settings.Cut, from), uint64(2*n+i)),
			})
		}
	}
	e.connectNATs()
	return e, nil
}

// connectNATs puts NATs where the settings have them. One that stays keeps what
// it knows.
func (e *emulator) connectNATs() {
	for _, site := range e.sites {
		switch behind := slices.Contains(e.settings.NAT, site); {
		case !behind:
			delete(e.nats, site)
		case e.nats[site] == nil:
			e.nats[site] = newNAT()
		}
	}
	for _, d := range e.directions {
		d.update(func(time.Duration) { d.near, d.far = e.nats[d.from], e.nats[d.to] })
	}
}

// rebind has a site's NAT use other ports from now on.
func (e *emulator) rebind(site string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := e.nats[site]
	if n == nil {
		return fmt.Errorf("no NAT stands before %q: put one there with wanlab link --nat", site)
	}
	n.rebind()
	return nil
}

// run carries packets until a device fails.
func (e *emulator) run() error {
	var running sync.WaitGroup
	for _, d := range e.directions {
		running.Go(func() {
			err := d.run()
			e.mu.Lock()
			defer e.mu.Unlock()
			e.err = errors.Join(e.err, fmt.Errorf("link %s: %w", d.name, err))
		})
	}
	running.Wait()
	return e.err
}

func (e *emulator) change(c LinkChange) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := c.ApplyTo(e.settings)
	if err := settings.validate(e.sites); err != nil {
		return err
	}
	e.settings = settings
	for _, d := range e.directions {
		d.update(func(now time.Duration) {
			d.path.configure(now, settings, slices.Contains(settings.Cut, d.from))
		})
	}
	e.connectNATs()
	return nil
}

func (e *emulator) state() (LinkState, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return LinkState{}, e.err
	}
	state := LinkState{Settings: e.settings, Counters: map[string]LinkCounters{}}
	state.Settings.Queue = e.settings.queue()
	for _, d := range e.directions {
		d.update(func(now time.Duration) {
			d.path.advance(now)
			state.Counters[d.name] = d.path.counters
		})
	}
	return state, nil
}

func (e *emulator) resetCounters() {
	for _, d := range e.directions {
		d.update(func(now time.Duration) {
			d.path.advance(now)
			d.path.counters = LinkCounters{}
		})
	}
}

// update changes the direction between two steps of its thread and wakes it.
func (d *direction) update(change func(now time.Duration)) {
	d.mu.Lock()
	change(time.Since(d.epoch))
	d.mu.Unlock()
	// A full counter means that a wake-up is pending already.
	_, _ = unix.Write(d.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// readBatch bounds how many packets are read before those that are due are
// delivered.
const readBatch = 256

func (d *direction) run() error {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	// Guests that use every core would delay packets by tens of milliseconds.
	err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	if err != nil {
		slog.Warn("no real-time priority: the link's delay suffers when the machine is busy", "from", d.name, "err", err)
	}
	buf := make([]byte, 1<<16)
	for {
		d.mu.Lock()
		received, err := d.receive(buf)
		delivered := d.deliver()
		next, busy := d.path.next()
		rest := pollInterval(d.path.delay)
		d.mu.Unlock()
		if err != nil {
			return err
		}
		if received || delivered {
			sleep := unix.NsecToTimespec(int64(rest))
			_ = unix.Nanosleep(&sleep, nil) // an interruption only shortens it
		} else if err := d.wait(next, busy); err != nil {
			return err
		}
	}
}

// pollInterval is the rest after packets were moved: it lets more of them come
// together, which saves most of the processor time of a busy link, and makes
// none later than by a hundredth of the delay. Lateness does not add up, since
// path counts in virtual time, and a packet that comes alone is not late.
func pollInterval(delay time.Duration) time.Duration {
	return min(max(delay/100, 50*time.Microsecond), 250*time.Microsecond)
}

func (d *direction) receive(buf []byte) (received bool, err error) {
	for range readBatch {
		n, err := unix.Read(d.in.fd, buf)
		switch {
		case err == nil && n == 0:
			return received, fmt.Errorf("read %s: %w", d.in.name, io.ErrUnexpectedEOF)
		case err == nil:
			d.take(buf[:n])
			received = true
		case errors.Is(err, unix.EAGAIN):
			return received, nil
		case errors.Is(err, unix.EINTR):
		default:
			return received, fmt.Errorf("read %s: %w", d.in.name, err)
		}
	}
	return received, nil
}

// take has a packet of the site go on its way.
func (d *direction) take(packet []byte) {
	answer, ok := d.path.admit(packet)
	switch {
	case ok:
		if d.near != nil {
			d.near.out(packet)
		}
		d.path.push(time.Since(d.epoch), packet)
	case answer != nil:
		if _, err := unix.Write(d.in.fd, answer); err != nil {
			d.path.counters.Dropped++ // the site's interface is down
		}
	}
}

func (d *direction) deliver() (delivered bool) {
	for {
		data, ok := d.path.pop(time.Since(d.epoch))
		if !ok {
			return delivered
		}
		if d.far != nil && !d.far.in(data) {
			d.path.counters.Blocked++
		} else if _, err := unix.Write(d.out.fd, data); err != nil {
			// The far interface is down: the wire ends in nothing.
			d.path.counters.Dropped++
		}
		d.path.recycle(data)
		delivered = true
	}
}

// wait returns when a packet arrives, one is due, or update was called.
func (d *direction) wait(next time.Duration, busy bool) error {
	fds := []unix.PollFd{{Fd: int32(d.wake), Events: unix.POLLIN}, {Fd: int32(d.in.fd), Events: unix.POLLIN}}
	var timeout *unix.Timespec
	if busy {
		left := unix.NsecToTimespec(int64(max(next-time.Since(d.epoch), 0)))
		timeout = &left
	}
	if _, err := unix.Ppoll(fds, timeout, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll %s: %w", d.in.name, err)
	}
	if fds[0].Revents != 0 {
		var counter [8]byte
		_, _ = unix.Read(d.wake, counter[:])
	}
	return nil
}
