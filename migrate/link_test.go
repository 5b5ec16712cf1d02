package migrate

import (
	"testing"
	"time"

	"github.com/wanmig/wanmig/tunnel"
)

func TestLinkMeter(t *testing.T) {
	at := func(s float64) time.Time { return time.Unix(1000, 0).Add(time.Duration(s * float64(time.Second))) }
	quic := tunnel.Carrier{Transport: tunnel.QUIC, Remote: "192.0.2.1:7946", Sent: 10, RTT: 20 * time.Millisecond}
	tcp := tunnel.Carrier{Transport: tunnel.TCP, Remote: "192.0.2.1:7946"}
	s := &slowLink{carriers: []tunnel.Carrier{quic, quic, tcp}}
	m := &linkMeter{session: s}
	for _, step := range []struct {
		now, lost float64 // 0: it is up
		away      int64   // milliseconds
		since     bool
	}{
		{1, 0, 0, false},
		{2, 1.5, 500, true},
		{4, 1.5, 2500, true},
		{5, 0, 3500, false}, // up again, some time before
		{9, 0, 3500, false},
		{10, 9.5, 4000, true},
		{12, 11, 6000, true}, // up for a moment meanwhile: from the first loss to the second, and on
		{13, 0, 7000, false},
	} {
		s.lost = time.Time{}
		if step.lost > 0 {
			s.lost = at(step.lost)
		}
		s.sent += 1 << 20
		l := m.look(at(step.now))
		if l.LostMS != step.away || (l.LostSince != nil) != step.since || step.since && !l.LostSince.Equal(s.lost) {
			t.Errorf("at %g: %d ms without a link, lost since %v", step.now, l.LostMS, l.LostSince)
		}
		if l.Sent != s.sent || l.Received != 7 || l.RTTMS != 5 || len(l.Carriers) != len(s.carriers) {
			t.Errorf("at %g: %+v", step.now, l)
		}
		s.carriers = s.carriers[:1]
	}
	if got := m.carriersUsed(); len(got) != 2 || got[0] != (CarriersUsed{"quic", 2}) || got[1] != (CarriersUsed{"tcp", 1}) {
		t.Errorf("carriers used: %+v", got)
	}
	if c := m.look(at(14)).Carriers[0]; c != (Carrier{Transport: "quic", Remote: "192.0.2.1:7946", Sent: 10, RTTMS: 20}) {
		t.Errorf("a carrier: %+v", c)
	}
}
