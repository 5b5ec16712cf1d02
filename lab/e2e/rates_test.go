//go:build lab

package e2e

import (
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// TestRates moves two guests at once under the limit of a site, and then limits one
// of them while it runs. Rates are those of a line that is slower than the machine,
// whatever else it does.
func TestRates(t *testing.T) {
	t.Parallel()
	const mbit = 1e6 / 8
	w := newWorldWith(t, lab.Options{AgentConfig: map[string]string{lab.LocalDC: "rates: [{site: remote-dc, rate: 20mbit}]\n"}}, "400mbit", "20ms")
	var guests []*lab.VM
	for _, name := range []string{"first", "second"} {
		guests = append(guests, w.vm(lab.VMOptions{Name: name, Memory: 192 << 20, Disks: []lab.DiskOptions{disk(t, "192MiB")}, WorkingSet: 16 << 20}))
	}
	second := w.begin("second", "--priority", "low")
	first := w.begin("first", "--priority", "high")
	sent := func(move string) float64 { return float64(w.status(lab.LocalDC, move).Link.Sent) }
	// during tells how many Mbit/s each move sent in a while, from a moment on when it
	// has what it may.
	during := func(moves ...string) (rates []float64) {
		time.Sleep(3 * time.Second)
		const while = 4 * time.Second
		var before []float64
		began := time.Now()
		for _, m := range moves {
			before = append(before, sent(m))
		}
		time.Sleep(while)
		for i, m := range moves {
			rates = append(rates, (sent(m)-before[i])/time.Since(began).Seconds()/mbit)
		}
		return rates
	}
	sending := func(s migrate.Status) bool { return s.Phase == migrate.PhaseSync && s.Link.Rate > mbit }
	for _, m := range []string{first, second} {
		w.await(lab.LocalDC, m, "data on the link", sending)
	}
	got := during(first, second)
	if sum := got[0] + got[1]; sum > 21 || sum < 14 || got[0] < 2.5*got[1] {
		t.Errorf("under 20 Mbit/s moves of high and low priority sent %.1f and %.1f Mbit/s", got[0], got[1])
	}
	w.wanmig(lab.LocalDC, "cancel", second)
	w.wanmig(lab.LocalDC, "limit", "first", "5mbit")
	if got := during(first); got[0] > 5.25 || got[0] < 3 {
		t.Errorf("at most 5 Mbit/s were allowed, %.1f were sent", got[0])
	}
	if l := w.status(lab.LocalDC, first).Link; l.Limit.String() != "5mbit" || l.Allowed != 5*mbit || len(l.Carriers) == 0 {
		t.Errorf("the status of the link is %+v", l)
	}
	w.wanmig(lab.LocalDC, "limit", first, "none")
	if s := w.await(lab.LocalDC, first, "its end", final); s.Result.Result != "done" || s.Link.Limit != (migrate.Limit{}) {
		t.Errorf("the move ended as %+v, limited to %v", s.Result, s.Link.Limit)
	}
	w.healthy(lab.RemoteDC, guests[0])
	w.await(lab.LocalDC, second, "its end", final)
	w.healthy(lab.LocalDC, guests[1])
}
