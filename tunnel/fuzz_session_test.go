package tunnel

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Whatever a peer sends on its carriers, a session neither panics nor keeps more
// than it has allowed.
func FuzzSession(f *testing.F) {
	header := channelHeader{name: "memory", priority: Memory}.append(nil)
	script := func(frames ...frame) (b []byte) {
		for _, f := range frames {
			b = f.append(b)
		}
		return b
	}
	f.Add(script(frame{kind: kindData, channel: 1, data: header}, frame{kind: kindData, channel: 1, offset: uint64(len(header)), data: []byte("\x00\x00\x00\x01x")}), []byte{})
	f.Add(script(frame{kind: kindData, channel: 1, offset: 300, data: []byte("ahead")}, frame{kind: kindData, channel: 1, data: header}),
		script(frame{kind: kindData, channel: 1, offset: uint64(len(header)), flags: flagEnd, data: []byte("\x00\x00\x00\x01x")}))
	f.Add(script(frame{kind: kindGone, channel: 2, offset: 1}), script(frame{kind: kindGone, channel: 0, offset: 3}, frame{kind: kindAck, offset: 1}))
	f.Add(script(frame{kind: kindDone, channel: 0, code: 2}, frame{kind: kindReset, channel: 0}), script(frame{kind: kindCredit, channel: 0, offset: 1 << 40}, frame{kind: kindPing}))
	f.Add(script(frame{kind: kindReset, channel: 1}, frame{kind: kindAck, offset: 1}, frame{kind: kindClose, data: []byte("bye")}), script(frame{kind: kindDone, channel: 129}))
	f.Add(script(frame{kind: kindData, channel: 255, data: header}), script(frame{kind: kindData, channel: 257, data: header}))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		synctest.Test(t, func(t *testing.T) {
			l := &line{delay: time.Millisecond}
			var running sync.WaitGroup
			s := newSession(sessionConfig{dialled: true, running: &running, log: slog.New(slog.DiscardHandler), peer: "peer", outage: 20 * time.Second})
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			var users sync.WaitGroup
			users.Go(func() { // channels that the peer opens
				for {
					c, err := s.Accept(ctx)
					if err != nil {
						return
					}
					users.Go(func() {
						var buf []byte
						for err == nil {
							buf, err = c.Recv(ctx, buf)
						}
						c.Send(ctx, make([]byte, 100_000))
						c.Close()
					})
				}
			})
			users.Go(func() {
				if c, err := s.Open(ctx, "own", Control); err == nil {
					c.Send(ctx, make([]byte, 50_000))
					c.Recv(ctx, nil)
					c.CloseSend()
				}
			})
			for i, script := range [][]byte{first, second} {
				a, b := l.pair(TCP)
				if err := s.carry(a, uint32(2*i)); err != nil {
					b.kill()
					continue
				}
				for len(script) > 0 {
					n := min(len(script), 1000)
					if _, err := b.Write(script[:n]); err != nil {
						break
					}
					script = script[n:]
				}
				users.Go(func() { // what the session sends goes nowhere
					buf := make([]byte, 64<<10)
					for {
						if _, err := b.Read(buf); err != nil {
							return
						}
					}
				})
			}
			time.Sleep(time.Second)
			held := 0
			s.mu.Lock()
			for _, c := range s.channels {
				for _, p := range c.in.ready {
					held += len(p.data)
				}
				held += c.in.waiting
			}
			if len(s.channels) > 3*MaxChannels || held > sessionWindow+3*MaxChannels*firstCredit || len(s.urgent) > len(first)+len(second)+10 {
				t.Errorf("%d channels, %d bytes held, %d frames to send", len(s.channels), held, len(s.urgent))
			}
			s.mu.Unlock()
			s.Close("over")
			cancel()
			users.Wait()
			running.Wait()
			for _, c := range l.ends {
				c.kill()
			}
			l.alive.Wait()
		})
	})
}
