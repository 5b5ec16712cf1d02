package migrate

import (
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

func TestArrivals(t *testing.T) {
	var a arrivals
	began := time.Unix(1000, 0)
	if m := a.secondHalf(); m != (measured{}) {
		t.Errorf("of nothing: %+v", m)
	}
	if m := a.add(began, 5).secondHalf(); m.Bytes != 0 || m.MS != 0 {
		t.Errorf("of one: %+v", m)
	}
	total := int64(0)
	for i := range 100_000 { // 10 MB/s for half a second, then 100 MB/s
		total += 100
		if i >= 50_000 {
			total += 900
		}
		a = a.add(began.Add(time.Duration(i)*10*time.Microsecond), total)
	}
	if len(a) > 1100 {
		t.Errorf("%d arrivals are kept", len(a))
	}
	if m := a.secondHalf(); m.Bytes < 49_000_000 || m.Bytes > 51_000_000 || m.MS < 490 || m.MS > 510 {
		t.Errorf("the second half is %+v", m)
	}
}

// TestMeasureOfAnotherChannel lets a peer be asked to measure what is not of a measurement.
func TestMeasureOfAnotherChannel(t *testing.T) {
	own, _ := newEndpoint(t)
	there, id := newEndpoint(t)
	answered := make(chan error, 1)
	go func() {
		session, err := there.Accept(t.Context())
		if err == nil {
			var ch *tunnel.Channel
			if ch, err = session.Accept(t.Context()); err == nil {
				err = (&control{ch: ch}).answerMeasure(t.Context(), session)
			}
		}
		answered <- err
	}()
	session, err := own.Dial(t.Context(), there.Addr().String(), id, tunnel.DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"control", "disk/vda"} {
		ch, err := session.Open(t.Context(), name, tunnel.Disk)
		if err != nil {
			t.Fatal(err)
		}
		if err := ch.Send(t.Context(), []byte{kindPing, '{', '}'}); err != nil {
			t.Fatal(err)
		}
	}
	if err := wait(t, answered); err == nil || !strings.Contains(err.Error(), `"disk/vda" is not for a measurement`) {
		t.Errorf("answered %v", err)
	}
}
