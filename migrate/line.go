package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// redirect asks the other side to serve an operation on a redirect. Its error
// is of the conversation; that of the operation is in the answer.
func (c *control) redirect(ctx context.Context, move, op string, request any) (redirectAnswer, error) {
	var answer redirectAnswer
	body, err := json.Marshal(request)
	if err != nil {
		return answer, err
	}
	c.seq++
	if err := c.send(ctx, kindRedirect, redirectRequest{c.seq, move, op, body}); err != nil {
		return answer, err
	}
	for {
		answer = redirectAnswer{}
		if err := c.expect(ctx, kindRedirected, &answer); err != nil {
			return answer, err
		}
		if answer.Seq > c.seq {
			return answer, fmt.Errorf("the peer answers operation %d on a redirect, %d was asked for", answer.Seq, c.seq)
		}
		if answer.Seq == c.seq {
			return answer, nil
		} // else of a question that nobody waits for any more
	}
}

// read takes what came of an operation, or the peer's error.
func (a redirectAnswer) read(reply any) error {
	switch {
	case a.Unknown:
		return netredirect.ErrUnknown
	case a.Error != "":
		return fmt.Errorf("at the other side: %.*s", maxReason, a.Error)
	}
	return decode(a.Body, reply)
}

// answerRedirect serves an operation and sends what came of it.
func (c *control) answerRedirect(ctx context.Context, seq uint64, serve func() (any, error)) error {
	answer := redirectAnswer{Seq: seq}
	reply, err := serve()
	if err == nil {
		answer.Body, err = json.Marshal(reply)
	}
	if err != nil {
		answer.Error, answer.Unknown = err.Error(), errors.Is(err, netredirect.ErrUnknown)
	}
	return c.send(ctx, kindRedirected, answer)
}

// inquire serves an operation on the redirect of a move that is over.
func (e *Engine) inquire(ctx context.Context, session *tunnel.Session, ctl *control, body []byte) error {
	var ask redirectRequest
	if err := decode(body, &ask); err != nil {
		return err
	}
	return ctl.answerRedirect(ctx, ask.Seq, func() (any, error) {
		from, err := addrOf(session.RemoteAddr())
		if err != nil {
			return nil, err
		}
		peer := netredirect.Peer{Site: e.Known(session.Peer()), ID: string(session.Peer()), Address: from}
		return e.Redirects.Inquire(ctx, peer, ask.Move, ask.Op, ask.Body)
	})
}

// line is a session to a site that is kept for questions about redirects.
type line struct {
	turn    chan struct{} // has one place: who fills it has what follows
	session *tunnel.Session
	ctl     *control
}

// CallRedirect asks the agent of a site to serve an operation on a redirect. The
// session is kept for the next question.
func (e *Engine) CallRedirect(ctx context.Context, site, peer, move, op string, request, reply any) error {
	return e.onLine(ctx, site, peer, func(l *line) error {
		answer, err := l.ctl.redirect(ctx, move, op, request)
		if err != nil {
			l.close("no answer")
			return err
		}
		return answer.read(reply)
	})
}

// Reach connects to the agent of a site and tells its address.
func (e *Engine) Reach(ctx context.Context, site, peer string) (address netip.Addr, err error) {
	err = e.onLine(ctx, site, peer, func(l *line) error {
		address, err = addrOf(l.session.RemoteAddr())
		return err
	})
	return address, err
}

// onLine uses the session that is kept to a site.
func (e *Engine) onLine(ctx context.Context, site, peer string, use func(*line) error) error {
	e.mu.Lock()
	l := e.lines[site]
	if l == nil {
		l = &line{turn: make(chan struct{}, 1)}
		e.lines[site] = l
	}
	e.mu.Unlock()
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return fmt.Errorf("wait to ask site %s: %w", site, context.Cause(ctx))
	}
	if err := e.connect(ctx, l, site, peer); err != nil {
		return err
	}
	return use(l)
}

// connect makes a line one to the peer, which has the site's name.
func (e *Engine) connect(ctx context.Context, l *line, site, peer string) error {
	if l.session != nil && l.session.Err() == nil && string(l.session.Peer()) == peer {
		return nil
	}
	l.close("another session takes its place")
	session, err := e.Dial(ctx, site, asks)
	if err != nil {
		return err
	}
	if string(session.Peer()) != peer {
		session.Close("not who was asked for")
		return fmt.Errorf("site %s is another agent now: the VM was moved to %s", site, peer)
	}
	ctl, _, err := e.greet(ctx, session)
	if err != nil {
		session.Close("not greeted")
		return err
	}
	l.session, l.ctl = session, ctl
	return nil
}

func (l *line) close(why string) {
	if l.session != nil {
		l.session.Close(why)
	}
	l.session, l.ctl = nil, nil
}

// hangUp ends the kept sessions.
func (e *Engine) hangUp() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range e.lines {
		select {
		case l.turn <- struct{}{}:
			l.close("the agent stops")
			<-l.turn
		default: // it is in use, and ends with the endpoint
		}
	}
}
