package routes

import (
	"context"
	"log/slog"
	"net/netip"
)

// libraryLog takes what the BGP library logs: all of it at level debug, since it
// is the library's view and Speaker logs its own. Why a connection does not come
// about the library tells nowhere else, so it is read from there.
type libraryLog struct {
	status *status
	next   slog.Handler
	peer   netip.Addr // of the logger, if any
}

// Enabled is true for all, since failures to connect are logged at debug.
func (l *libraryLog) Enabled(context.Context, slog.Level) bool { return true }

func (l *libraryLog) Handle(ctx context.Context, r slog.Record) error {
	if l.peer.IsValid() {
		l.notice(r)
	}
	if !l.next.Enabled(ctx, slog.LevelDebug) {
		return nil
	}
	quiet := slog.NewRecord(r.Time, slog.LevelDebug, "gobgp: "+r.Message, r.PC)
	r.Attrs(func(a slog.Attr) bool {
		quiet.AddAttrs(a)
		return true
	})
	return l.next.Handle(ctx, quiet)
}

// notice reports what keeps a peer from coming up.
func (l *libraryLog) notice(r slog.Record) {
	var failure string
	var code, subcode int64
	switch r.Message {
	case "failed to connect", "sent notification", "outgoing connection IO error":
	default:
		return
	}
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "Error":
			failure = a.Value.String()
		case "Code":
			code = a.Value.Int64()
		case "Subcode":
			subcode = a.Value.Int64()
		}
		return true
	})
	l.status.report(l.peer, func(p Peer, own uint32) string {
		switch r.Message {
		case "failed to connect":
			return p.unconnected(failure)
		case "sent notification":
			return p.unopened(own, uint8(code), uint8(subcode))
		}
		return p.refused(own)
	})
}

func (l *libraryLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *l
	with.next = l.next.WithAttrs(attrs)
	for _, a := range attrs {
		if a.Key == "Key" {
			with.peer, _ = netip.ParseAddr(a.Value.String())
		}
	}
	return &with
}

func (l *libraryLog) WithGroup(name string) slog.Handler {
	with := *l
	with.next = l.next.WithGroup(name)
	return &with
}
