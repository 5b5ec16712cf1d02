package tunnel

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestChannelsAreBoundedAndMakeRoom(t *testing.T) {
	from, to := pair(t)
	var a, b *Channel
	for range MaxChannels {
		a, b = openPair(t, from, to, "c", Control)
	}
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := from.Open(ctx, "c", Control); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("channel %d: %v", MaxChannels+1, err)
	}
	exchange(t, to, from) // the other side has its own
	for range MaxChannels / 2 {
		a.Close()
		b.Close()
		a, b = openPair(t, from, to, "c", Control)
	}
}

func TestAcceptPassesOverChannelsClosedAtOnce(t *testing.T) {
	from, to := pair(t)
	for range 20 {
		c, err := from.Open(testContext(t), "gone", Disk)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if _, err := from.Open(testContext(t), "stays", Control); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := to.Accept(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if c.Name() == "stays" {
			return
		}
		c.Close()
	}
}

func TestOpenChecksItsArguments(t *testing.T) {
	from, _ := pair(t)
	for _, name := range []string{"", strings.Repeat("a", maxName+1), "Memory", "a b", "ä"} {
		if _, err := from.Open(testContext(t), name, Disk); !errors.Is(err, ErrFormat) {
			t.Errorf("Open(%q): %v", name, err)
		}
	}
	if _, err := from.Open(testContext(t), "a", Background+1); !errors.Is(err, ErrFormat) {
		t.Errorf("Open with an unknown priority: %v", err)
	}
}

func TestSessionCloseTellsTheReason(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "control", Control)
	if from.Err() != nil || to.Err() != nil {
		t.Fatal("open sessions have errors", from.Err(), to.Err())
	}
	from.Close("move done\x1b[1m" + strings.Repeat("!", 1000))
	<-from.Done()
	<-to.Done()
	if err := from.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "closed here: move done?[1m!!") {
		t.Errorf("here: %v", err)
	}
	if err := to.Err(); !errors.Is(err, ErrClosedByPeer) || !strings.Contains(err.Error(), "closed by peer: move done?[1m!!") {
		t.Errorf("there: %v", err)
	}
	ctx := testContext(t)
	_, openErr := to.Open(ctx, "c", Control)
	_, acceptErr := to.Accept(ctx)
	_, recvErr := b.Recv(ctx, nil)
	for what, err := range map[string]error{
		"Open": openErr, "Accept": acceptErr, "Recv": recvErr, "Send": b.Send(ctx, nil), "CloseSend": b.CloseSend(),
	} {
		if !errors.Is(err, ErrClosedByPeer) {
			t.Errorf("%s on the closed session: %v", what, err)
		}
	}
	if err := a.Send(ctx, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after Close: %v", err)
	}
}

func TestStats(t *testing.T) {
	from, to := pair(t)
	a, b := openPair(t, from, to, "memory", Memory)
	frame := make([]byte, 1<<20)
	go a.Send(testContext(t), frame)
	if _, err := b.Recv(testContext(t), nil); err != nil {
		t.Fatal(err)
	}
	if st := from.Stats(); st.BytesSent < 1<<20 || st.BytesReceived == 0 || st.RTT <= 0 || st.MinRTT <= 0 {
		t.Errorf("sender: %+v", st)
	}
	if st := to.Stats(); st.BytesReceived < 1<<20 || st.BytesSent == 0 {
		t.Errorf("receiver: %+v", st)
	}
}

// After a blackout the governor may be at its lowest rate.
func TestTheLowestRateLetsFramesGo(t *testing.T) {
	var s Session
	s.bucket.governor = minRate
	for _, rtt := range []time.Duration{0, time.Millisecond, 100 * time.Millisecond} {
		s.steering.governor.minRTT = rtt
		if most := s.flightMost(); most < MaxUnordered {
			t.Errorf("%d bytes may be on their way over a round trip of %v, and a frame has %d", most, rtt, MaxUnordered)
		}
	}
}
