package handoff

import "fmt"

// check is what must hold in every world.
func (m *model) check(w *world) error {
	a, b := w.hosts[0].guest, w.hosts[1].guest
	if a == running && b == running && m.operators != wrong {
		return fmt.Errorf("the guest runs twice")
	}
	if !w.hosts[0].disks && !w.hosts[1].disks {
		return fmt.Errorf("no host has its disks")
	}
	for i := range w.moves {
		mv := &w.moves[i]
		if !mv.begun {
			continue
		}
		at, p := w.host(uint8(i), dst), mv.side[dst]
		if m.last(w, uint8(i)) && at.guest == running && p.journal != pAccepted && p.journal != pRunning {
			return fmt.Errorf("the destination runs a guest that it has not durably accepted")
		}
		if m.operators == silent && mv.ran && mv.back {
			return fmt.Errorf("the guest goes on at the source after it has run at the destination")
		}
	}
	return nil
}

// ends of a move, when nothing more happens by itself.
const (
	endNone       = ""
	atSource      = "runs at the source"
	atDestination = "runs at the destination"
	inDoubt       = "in doubt: accepted, and not running"
	interrupted   = "returned, and not running: the operator says it again"
	endSplit      = "split"
	givenUp       = "given up at both sides: its disks are at the source"
	doubtGivenUp  = "given up at the source, in doubt at the destination"
)

// end tells which end the last move of a world has come to.
func (m *model) end(w *world) string {
	i := uint8(0)
	for ; !m.last(w, i); i++ {
		for _, p := range w.moves[i].side {
			if !places[p.state].Final() || p.busy() {
				return endNone
			}
		}
	}
	mv := &w.moves[i]
	s, d, from, to := mv.side[src], mv.side[dst], w.host(i, src), w.host(i, dst)
	if s.busy() || d.busy() || to.finish != idle || !from.up || !to.up {
		return endNone
	}
	there := to.guest == running || to.guest == off && to.fell
	here := from.guest == running || from.guest == off && from.fell
	switch {
	case s.state == pReturned && d.state == pAborted && to.guest == off && here:
		return atSource
	case s.state == pReturned && d.state == pAborted && to.guest == off && m.operators != silent:
		return interrupted
	case s.state == pReleased && d.state == pRunning && from.guest == off && there:
		return atDestination
	case s.state == pAbandoned && d.state == pRunning && from.guest == off && there:
		return atDestination
	case s.state == pOffered && d.state == pAccepted && to.guest == off && from.guest != running:
		return inDoubt
	case s.state == pSplit && d.state == pRunning && (m.operators == wrong || from.guest != running || to.guest != running):
		return endSplit
	case s.state == pAbandoned && d.state == pAborted && from.guest == off && to.guest == off:
		return givenUp
	case s.state == pAbandoned && d.state == pAccepted && to.guest == off:
		return doubtGivenUp
	}
	return endNone
}
