package migrate

import (
	"testing"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/netredirect"
)

func TestHasGone(t *testing.T) {
	for _, c := range []struct {
		move     handoff.State // "": not in the journal any more
		redirect netredirect.State
		gone     bool
	}{
		{handoff.Released, netredirect.Standing, true},
		{handoff.Running, netredirect.Armed, true},
		{handoff.Returned, netredirect.Standing, false},
		{handoff.Aborted, netredirect.Armed, false},
		{"", netredirect.Opening, false},
		{"", netredirect.Armed, false},
		{"", netredirect.Standing, true},
		{"", netredirect.Draining, true},
		{"", netredirect.Resident, true},
	} {
		if got := hasGone(c.move, c.redirect); got != c.gone {
			t.Errorf("move %q, redirect %s: gone %v", c.move, c.redirect, got)
		}
	}
}
