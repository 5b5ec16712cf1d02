package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// networkSettle is how long changes are collected before they are told: one
// address brings several messages, with its routes and its link.
const networkSettle = 250 * time.Millisecond

// networkWatch tells of changes of this host's addresses, routes and links.
type networkWatch struct {
	mu        sync.Mutex
	listeners map[chan struct{}]struct{}
}

// listen returns a channel that holds a value when something has changed since
// the last one was taken, until stop is called.
func (w *networkWatch) listen() (changed <-chan struct{}, stop func()) {
	c := make(chan struct{}, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listeners == nil {
		w.listeners = make(map[chan struct{}]struct{})
	}
	w.listeners[c] = struct{}{}
	return c, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.listeners, c)
	}
}

func (w *networkWatch) tell() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.listeners {
		select {
		case c <- struct{}{}:
		default: // it has not taken the last one
		}
	}
}

// watch tells the listeners what the kernel tells, until ctx ends. Without it
// sessions still find the way back, a little later.
func (w *networkWatch) watch(ctx context.Context, log *slog.Logger) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err == nil {
		stop := context.AfterFunc(ctx, socket.Close)
		err = w.follow(func() error {
			_, _, err := socket.Receive()
			return err
		})
		if stop() {
			socket.Close()
		}
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("changes of this host's network are not seen, so lost links come back later", "error", err)
	}
}

// follow calls receive until it fails, and tells once of what comes within
// networkSettle.
func (w *networkWatch) follow(receive func() error) error {
	var pending atomic.Bool
	timer := time.AfterFunc(networkSettle, func() {
		if pending.Swap(false) {
			w.tell()
		}
	})
	defer timer.Stop()
	for {
		err := receive()
		// More came than the socket holds: there are changes at any rate.
		if err != nil && !errors.Is(err, syscall.ENOBUFS) {
			return err
		}
		if !pending.Swap(true) {
			timer.Reset(networkSettle)
		}
	}
}
