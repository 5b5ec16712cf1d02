package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/migrate"
)

// errDetached is returned when the operator left a move that goes on.
var errDetached = errors.New("detached")

// view shows a move to the operator.
type view interface {
	show(migrate.Status)
	say(message string)
	pause() // leave the terminal to a question
	resume()
	close()
}

// follower watches a move until it ends, through restarts of the agent, and
// lets the operator leave or cancel it.
type follower struct {
	client   *agent.Client
	view     view
	signals  <-chan os.Signal
	stop     func()                       // ends the delivery of signals
	ask      func(context.Context) answer // nil without a terminal
	patience time.Duration                // how long an agent may be away
}

// news is what the watching goroutine tells: a status or a message.
type news struct {
	status  migrate.Status
	message string
}

// follow shows a move until its phase is final or in doubt and returns its
// last status, which then has a result.
func (f *follower) follow(ctx context.Context, m migrate.Status) (migrate.Status, error) {
	var owned sync.WaitGroup
	defer owned.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer f.view.close()

	updates := make(chan news)
	watched := make(chan error, 1)
	owned.Go(func() { watched <- f.watch(ctx, m.Move, updates) })
	answers := make(chan answer, 1)
	asking := false
	again := time.NewTicker(time.Second)
	defer again.Stop()

	f.view.show(m)
	for {
		select {
		case n := <-updates:
			if n.message != "" {
				f.view.say(n.message)
				continue
			}
			m = n.status
			f.view.show(m)
		case <-again.C:
			// The running time goes on where nothing else does.
			f.view.show(m)
		case err := <-watched:
			return m, err
		case sig := <-f.signals:
			if f.ask == nil || sig == syscall.SIGTERM || asking {
				return m, errDetached
			}
			asking = true
			f.view.pause()
			owned.Go(func() { answers <- f.ask(ctx) })
		case a := <-answers:
			asking = false
			if a == answerDetach {
				return m, errDetached
			}
			f.view.resume()
			if a == answerCancel {
				f.cancel(ctx, m.Move)
			}
		}
	}
}

func (f *follower) cancel(ctx context.Context, move string) {
	if err := f.client.CancelMove(ctx, move); err != nil {
		f.view.say("Can't cancel: " + oneLine(err.Error()))
		return
	}
	f.view.say("Cancelling: the guest stays at the source.")
}

// watch tells updates each status of a move until it has ended. It connects
// again when the agent goes away, and gives up when it stays away.
func (f *follower) watch(ctx context.Context, move string, updates chan<- news) error {
	tell := func(n news) error {
		select {
		case updates <- n:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	var lost time.Time // zero: the agent answers
	for {
		ended, next, why := false, "", ""
		err := f.client.WatchMove(ctx, move, func(m migrate.Status) error {
			if !lost.IsZero() {
				lost = time.Time{}
				if err := tell(news{message: "The agent answers again."}); err != nil {
					return err
				}
			}
			ended = m.Phase.Final() || m.Phase == migrate.PhaseInDoubt
			if ended && m.Result == nil {
				return fmt.Errorf("%w: a move that ended without a result", agent.ErrBadAnswer)
			}
			if ended {
				next, why = m.Result.Next, m.Result.Error
			}
			return tell(news{status: m})
		})
		_, refused := errors.AsType[*agent.APIError](err)
		switch {
		case ended && err == nil && next != "":
			if err := tell(news{message: fmt.Sprintf("Rolled back: %s. It is tried again, as %s.", oneLine(why), printable(next))}); err != nil {
				return err
			}
			move = next
			continue
		case ended && err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case refused, errors.Is(err, agent.ErrBadAnswer):
			return err
		case err == nil:
			err = io.ErrUnexpectedEOF
		}
		if lost.IsZero() {
			lost = time.Now()
			if err := tell(news{message: fmt.Sprintf("The connection to the agent broke; trying again for %s. The move is the agent's and may go on.", span(f.patience))}); err != nil {
				return err
			}
		}
		if time.Since(lost) > f.patience {
			return err
		}
		select {
		case <-time.After(f.patience / 60):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// answer is what the operator wants after Ctrl-C.
type answer int

const (
	answerWatch answer = iota
	answerCancel
	answerDetach
)

const question = "\nCancel the move? The guest stays at the source.\n[y = cancel, d = detach and let it go on, Enter = keep watching] "

// ask asks the operator on the terminal until there is an answer or ctx ends.
func ask(ctx context.Context, out io.Writer) answer {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return answerDetach
	}
	defer tty.Close()
	defer context.AfterFunc(ctx, func() { tty.SetReadDeadline(time.Now()) })()
	// What was typed before the question is no answer to it.
	if raw, err := tty.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.IoctlSetInt(int(fd), unix.TCFLSH, unix.TCIFLUSH) })
	}
	fmt.Fprint(out, question)
	lines := bufio.NewReader(io.LimitReader(tty, 4096))
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			fmt.Fprintln(out)
			return answerWatch
		}
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "":
			return answerWatch
		case "y", "yes", "c", "cancel":
			return answerCancel
		case "d", "detach":
			return answerDetach
		}
		fmt.Fprint(out, "[y, d or Enter] ")
	}
}
