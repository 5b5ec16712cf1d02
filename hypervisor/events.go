package hypervisor

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// EventKind says what happened to a domain.
type EventKind string

// The events of Watch, and the details that they carry.
const (
	EventDefined   EventKind = "defined"
	EventUndefined EventKind = "undefined"
	EventStarted   EventKind = "started"
	EventSuspended EventKind = "suspended"
	EventResumed   EventKind = "resumed"
	EventStopped   EventKind = "stopped"
	EventShutdown  EventKind = "shut down"
	EventCrashed   EventKind = "crashed"
	EventIteration EventKind = "iteration" // memory pre-copy began its next pass
	EventLost      EventKind = "lost"      // the connection to libvirtd broke; no event follows
)

// Event is one happening.
type Event struct {
	Kind      EventKind
	Detail    string    // of suspended, resumed, started and stopped, such as "migrated"; else ""
	Iteration int       // of EventIteration, from 1
	Time      time.Time // when it arrived here
}

// details name libvirt's numbers by their place.
var details = map[EventKind][]string{
	EventStarted:   {"booted", "migrated", "restored", "from snapshot", "wakeup", "recreated"},
	EventSuspended: {"paused", "migrated", "I/O error", "watchdog", "restored", "from snapshot", "API error", "postcopy", "postcopy failed"},
	EventResumed:   {"unpaused", "migrated", "from snapshot", "postcopy", "postcopy failed"},
	EventStopped:   {"shut down", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot", "recreated"},
}

// lifecycle names libvirt's lifecycle events by their number.
var lifecycle = []EventKind{EventDefined, EventUndefined, EventStarted, EventSuspended, EventResumed,
	EventStopped, EventShutdown, EventSuspended, EventCrashed}

// Watch reports a domain's events to f, one at a time, until stop is called;
// stop returns after the last call of f. What happened before Watch returned may
// be missing: read the domain's state afterwards. f must not call stop.
//
// At a move's end EventSuspended comes 2 to 4 ms after QEMU has stopped the guest
// at the source, some 40 ms before Perform returns; EventResumed comes 2 to 4 ms
// after it runs at the destination, some 10 ms before Finish returns.
//
// libvirt's job-completed event is not among them, because go-libvirt cannot
// decode it: Perform's return tells the same, and CompletedJobStats the figures.
func (h *Host) Watch(ctx context.Context, uuid string, f func(Event)) (stop func(), err error) {
	id, ok := parseUUID(uuid)
	if !ok {
		return nil, fmt.Errorf("watch domain: %q is no UUID", uuid)
	}
	// A connection of its own: closing it is the one way to end the
	// subscriptions that cannot block.
	c, err := dial(ctx, h.socket)
	if err != nil {
		return nil, err
	}
	streamCtx, cancel := context.WithCancel(context.Background())
	var life, iterations <-chan any
	err = c.call(ctx, "watch domain", func(l *libvirt.Libvirt) error {
		var err error
		if life, err = l.SubscribeEvents(streamCtx, libvirt.DomainEventIDLifecycle, nil); err != nil {
			return err
		}
		iterations, err = l.SubscribeEvents(streamCtx, libvirt.DomainEventIDMigrationIteration, nil)
		return err
	})
	var readers sync.WaitGroup
	if err != nil {
		cancel()
		c.close()
		if life != nil {
			for range life {
			}
		}
		return nil, err
	}
	var one sync.Mutex // f is called by one reader at a time
	var stopped bool
	report := func(e Event) {
		e.Time = time.Now()
		one.Lock()
		defer one.Unlock()
		if !stopped {
			f(e)
		}
	}
	readers.Go(func() {
		for ev := range life {
			if m, ok := ev.(*libvirt.DomainEventCallbackLifecycleMsg); ok && m.Msg.Dom.UUID == id {
				report(lifecycleEvent(m.Msg.Event, m.Msg.Detail))
			}
		}
		report(Event{Kind: EventLost})
	})
	readers.Go(func() {
		for ev := range iterations {
			if m, ok := ev.(*libvirt.DomainEventCallbackMigrationIterationMsg); ok && m.Dom.UUID == id {
				report(Event{Kind: EventIteration, Iteration: int(m.Iteration)})
			}
		}
	})
	return func() {
		one.Lock()
		stopped = true
		one.Unlock()
		c.close()
		cancel()
		readers.Wait()
	}, nil
}

func lifecycleEvent(kind, detail int32) Event {
	e := Event{Kind: EventKind(fmt.Sprintf("event %d", kind))}
	if kind >= 0 && int(kind) < len(lifecycle) {
		e.Kind = lifecycle[kind]
	}
	if names := details[e.Kind]; detail >= 0 && int(detail) < len(names) {
		e.Detail = names[detail]
	}
	return e
}
