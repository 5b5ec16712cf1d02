package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/tunnel"
)

// ErrNotReached is returned when the other site does not answer.
var ErrNotReached = errors.New("not reached")

// ErrNoRollback is returned when a move is not one to be taken back here.
var ErrNoRollback = errors.New("nothing to take back")

// wayBack maps what a guest has at the destination to what it has here.
func wayBack(p plan, networks map[string]string) handoff.Back {
	b := handoff.Back{Storage: map[string]string{}, Networks: map[string]string{}}
	for _, d := range p.disks {
		if here := p.source[d.Target]; here != d.Path && !d.Static { // a CD-ROM does not come back
			b.Storage[d.Path] = here
		}
	}
	for here, there := range networks {
		if _, twice := b.Networks[there]; !twice && here != there {
			b.Networks[there] = here
		}
	}
	return b
}

// left is the journal's entry of a move whose guest has gone from here, and has not
// been moved since as far as this host knows.
func (e *Engine) left(move string) (handoff.Entry, error) {
	entry, err := e.Journal.Get(move)
	switch {
	case errors.Is(err, handoff.ErrNoEntry):
		return entry, fmt.Errorf("%w %q here: wanmig list shows them", ErrNoMove, move)
	case err != nil:
		return entry, err
	case entry.State != handoff.Released:
		return entry, fmt.Errorf("%w: the guest of %s has not gone from here by it: it is %s", ErrNoRollback, move, entry.State)
	}
	gone, err := e.Journal.Gone(entry)
	if gone {
		err = fmt.Errorf("%w: %q was moved again since %s: wanmig list shows its latest move", ErrNoRollback, entry.VM, move)
	}
	return entry, err
}

// Rollback has the guest of a move come back from where it has gone, by a move of
// the other site's, whose ID it returns when that has begun. ErrNotReached is
// returned when that site does not answer.
func (e *Engine) Rollback(ctx context.Context, move string) (string, error) {
	entry, err := e.left(move)
	if err != nil {
		return "", err
	}
	session, err := e.Dial(ctx, entry.Site, asks)
	if err != nil {
		return "", fmt.Errorf("%s is %w: %w", entry.Site, ErrNotReached, err)
	}
	defer session.Close("asked")
	if session.Peer() != tunnel.ID(entry.Peer) {
		return "", fmt.Errorf("site %s is another agent now: the move was made to %s", entry.Site, entry.Peer)
	}
	ctl, _, err := e.greet(ctx, session)
	if err != nil {
		return "", fmt.Errorf("%s is %w: %w", entry.Site, ErrNotReached, err)
	}
	if err := ctl.send(ctx, kindReturn, giveBack{Move: move, Storage: entry.Back.Storage, Networks: entry.Back.Networks}); err != nil {
		return "", err
	}
	var back givenBack
	switch err := ctl.expect(ctx, kindReturning, &back); {
	case err != nil && ctx.Err() != nil:
		return "", fmt.Errorf("%s has not answered yet, and %q may still come: look at wanmig list in a minute: %w", entry.Site, entry.VM, err)
	case err != nil:
		return "", fmt.Errorf("%s does not give %q back: %w", entry.Site, entry.VM, err)
	}
	if !moveID.MatchString(back.Move) {
		return "", fmt.Errorf("bad move ID %.40q from %s", back.Move, entry.Site)
	}
	return back.Move, nil
}

// giveBack moves a guest back that a peer has given here, and returns when that is
// past its checks.
func (e *Engine) giveBack(ctx context.Context, ask giveBack, peer tunnel.ID) (givenBack, error) {
	entry, err := e.Journal.Get(ask.Move)
	switch {
	case errors.Is(err, handoff.ErrNoEntry) || err == nil && entry.Peer != string(peer):
		return givenBack{}, fmt.Errorf("no record of move %s", ask.Move)
	case err != nil:
		return givenBack{}, err
	case entry.State != handoff.Running:
		return givenBack{}, fmt.Errorf("the guest did not come here by move %s: it is %s here", ask.Move, entry.State)
	}
	if gone, err := e.Journal.Gone(entry); err != nil || gone {
		return givenBack{}, cmp.Or(err, fmt.Errorf("%q was moved again since", entry.VM))
	}
	site := e.Known(peer)
	if site == "" {
		return givenBack{}, errors.New("the peer is not a site here: wanmig site add names it")
	}
	e.Log.Info("the guest of a move is wanted back", "move", ask.Move, "vm", entry.VM, "site", site)
	m, err := e.Start(e.ctx, Request{VM: entry.UUID, To: site, Storage: ask.Storage, Networks: ask.Networks, Retries: DefaultRetries})
	if err != nil {
		return givenBack{}, err
	}
	for {
		s, changed := m.Changed()
		switch {
		case s.Phase == PhaseCheck:
		case s.Phase.Final() && s.Result != nil:
			return givenBack{}, errors.New(s.Result.Error)
		case !s.Phase.Final():
			return givenBack{s.Move}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return givenBack{}, context.Cause(ctx)
		}
	}
}

// keptSince finds the disks that the guest of a move has left here, all of them
// whole, and since when they stand.
func (e *Engine) keptSince(entry handoff.Entry) (time.Time, []handoff.Copy, error) {
	var since time.Time
	all, err := e.Journal.Copies()
	if err != nil {
		return since, nil, err
	}
	var disks []handoff.Copy
	for _, c := range entry.Keep {
		if c.Format == memoryFormat {
			continue
		}
		i := slices.IndexFunc(all, func(o handoff.Copy) bool { return o.Path == c.Path && o.UUID == c.UUID })
		if i < 0 || !all[i].Whole || !unchanged(all[i]) {
			return since, nil, fmt.Errorf("%w: %s is not there any more as %q has left it", ErrNoRollback, c.Path, entry.VM)
		}
		if since.IsZero() || all[i].Since.Before(since) {
			since = all[i].Since
		}
		disks = append(disks, all[i])
	}
	if len(disks) == 0 || entry.XML == "" {
		return since, nil, fmt.Errorf("%w: no copy of %q was kept here: --keep-source keeps one", ErrNoRollback, entry.VM)
	}
	return since, disks, nil
}

// CopySince tells when the guest left whose copy StartCopy would start.
func (e *Engine) CopySince(move string) (time.Time, error) {
	entry, err := e.left(move)
	if err != nil {
		return time.Time{}, err
	}
	since, _, err := e.keptSince(entry)
	return since, err
}

// StartCopy starts the guest of a move from the disks that it has left here. What it
// has done since is not in them, and it runs twice should the other host come back
// with it: who says this answers for it.
func (e *Engine) StartCopy(ctx context.Context, move string) error {
	entry, err := e.left(move)
	if err != nil {
		return err
	}
	if err := e.reserve(entry.UUID, statusOf(entry)); err != nil {
		return err
	}
	defer e.unreserve(entry.UUID, move)
	since, disks, err := e.keptSince(entry)
	if err != nil {
		return err
	}
	if state, err := e.Host.State(ctx, entry.UUID); err == nil && state.Active() {
		return fmt.Errorf("guest %q is %s here already", entry.VM, state)
	} else if err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
		return err
	}
	for i, c := range disks { // a move must not write into what a guest has
		if err := e.takeCopy(c); err != nil {
			return errors.Join(err, e.keepCopies(disks[:i]))
		}
	}
	if err := e.startHere(ctx, entry); err != nil {
		return e.unstart(entry, disks, err)
	}
	e.Redirects.Decide(move, false) // its packets went where the guest was
	e.Log.Warn("a guest was started from the copy that it has left here", "move", move, "vm", entry.VM, "since", since)
	e.note(entry, fmt.Sprintf("started here from the copy of %s: end the one at %s before that site is reached again", since.Local().Format(time.DateTime), entry.Site))
	return nil
}

// unstart leaves nothing of a guest that could not be started from its copy, which
// stays one. What may run all the same is not touched.
func (e *Engine) unstart(entry handoff.Entry, disks []handoff.Copy, cause error) error {
	ctx, cancel := context.WithTimeout(e.ctx, 30*time.Second)
	defer cancel()
	state, err := e.Host.State(ctx, entry.UUID)
	switch {
	case err == nil && state == hypervisor.ShutOff:
		err = e.Host.Undefine(ctx, entry.UUID, false)
	case err == nil:
		return fmt.Errorf("%w; the guest is %s here", cause, state)
	case errors.Is(err, hypervisor.ErrNoDomain):
		err = nil
	}
	if err != nil {
		return errors.Join(cause, err)
	}
	return errors.Join(cause, e.keepCopies(disks))
}

// note adds a notice to what is shown of a move that is over.
func (e *Engine) note(entry handoff.Entry, text string) {
	m, ok := e.Move(entry.Move)
	if !ok {
		return
	}
	m.update(func(s *Status) {
		r := Result{Result: string(s.Phase), Move: s.Move, VM: s.VM, To: s.Peer}
		if s.Result != nil {
			r = *s.Result
		}
		r.Notices = append(slices.Clone(r.Notices), text)
		s.Result = &r
	})
	if err := e.record(&entry, entry.State, m); err != nil {
		e.Log.Error("a notice is not in the journal", "error", err)
	}
}

func (g giveBack) validate() error {
	if !moveID.MatchString(g.Move) {
		return fmt.Errorf("bad move ID %.40q", g.Move)
	}
	if len(g.Storage) > maxDisks || len(g.Networks) > maxDisks {
		return errors.New("mappings out of bounds")
	}
	for _, m := range []map[string]string{g.Storage, g.Networks} {
		for k, v := range m {
			if len(k) > 4096 || len(v) > 4096 {
				return errors.New("mappings out of bounds")
			}
		}
	}
	return nil
}
