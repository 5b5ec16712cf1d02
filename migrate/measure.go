package migrate

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

// measureChannel carries what is sent to see how fast that is.
const measureChannel = "measure"

const (
	// measureFor is how long that is; its first half is for the carriers to begin.
	measureFor = time.Second
	// measureMost is how long a measurement is listened to, and measureBytes for how
	// much.
	measureMost  = 15 * time.Second
	measureBytes = 4 << 30
	measureFrame = 64 << 10
	measureGrain = time.Millisecond // arrivals closer than that are one
)

// measured is what arrived in the second half of a measurement.
type measured struct {
	Bytes int64   `json:"bytes"`
	MS    float64 `json:"ms"`
}

// arrivals says how much had arrived when.
type arrivals []arrival

type arrival struct {
	at    time.Time
	bytes int64
}

func (a arrivals) add(now time.Time, total int64) arrivals {
	if n := len(a); n > 1 && now.Sub(a[n-2].at) < measureGrain {
		a[n-1] = arrival{now, total}
		return a
	}
	return append(a, arrival{now, total})
}

// secondHalf is what came in the second half of the time.
func (a arrivals) secondHalf() measured {
	if len(a) == 0 {
		return measured{}
	}
	first, last := a[0], a[len(a)-1]
	middle := first.at.Add(last.at.Sub(first.at) / 2)
	for _, x := range a {
		if !x.at.Before(middle) {
			return measured{last.bytes - x.bytes, ms(last.at.Sub(x.at))}
		}
	}
	return measured{}
}

// measure sends to the peer as fast as it goes, and returns how fast that was in
// bytes per second.
func (c *control) measure(ctx context.Context, session *tunnel.Session) (rate int64, err error) {
	if err := c.send(ctx, kindMeasure, struct{}{}); err != nil {
		return 0, err
	}
	ch, err := session.Open(ctx, measureChannel, tunnel.Background)
	if err != nil {
		return 0, err
	}
	defer ch.Close()
	frame := make([]byte, measureFrame)
	rand.Read(frame) // never fails
	for until := time.Now().Add(measureFor); time.Now().Before(until); {
		if err := ch.Send(ctx, frame); err != nil {
			return 0, err
		}
	}
	if err := ch.CloseSend(); err != nil {
		return 0, err
	}
	var m measured
	if err := c.expect(ctx, kindMeasured, &m); err != nil {
		return 0, err
	}
	if m.MS <= 0 || m.Bytes < 0 {
		return 0, fmt.Errorf("the peer measured %d bytes in %g ms: too little to tell", m.Bytes, m.MS)
	}
	return int64(float64(m.Bytes) / m.MS * 1000), nil
}

// answerMeasure takes what the peer sends and tells how fast it came.
func (c *control) answerMeasure(ctx context.Context, session *tunnel.Session) error {
	ctx, cancel := context.WithTimeout(ctx, measureMost)
	defer cancel()
	ch, err := session.Accept(ctx)
	if err != nil {
		return err
	}
	defer ch.Close()
	if ch.Name() != measureChannel {
		return fmt.Errorf("channel %q is not for a measurement", ch.Name())
	}
	var came arrivals
	var total int64
	var frame []byte
	for {
		if frame, err = ch.Recv(ctx, frame); errors.Is(err, io.EOF) {
			return c.send(ctx, kindMeasured, came.secondHalf())
		}
		if err != nil {
			return err
		}
		if total += int64(len(frame)); total > measureBytes {
			return errors.New("a measurement without an end")
		}
		came = came.add(time.Now(), total)
	}
}
