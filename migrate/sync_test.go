package migrate

import (
	"testing"

	"github.com/wanmig/wanmig/hypervisor"
)

func TestOnlyTheMigrationStopsForGood(t *testing.T) {
	for _, detail := range []string{"", "paused", "I/O error", "watchdog", "API error", "postcopy"} {
		if finalStop(hypervisor.Event{Kind: hypervisor.EventSuspended, Detail: detail}) {
			t.Errorf("suspended, %q, counts as the move's stop", detail)
		}
	}
	if finalStop(hypervisor.Event{Kind: hypervisor.EventStopped, Detail: "migrated"}) {
		t.Error("the end of the domain counts as the guest's stop")
	}
	if !finalStop(hypervisor.Event{Kind: hypervisor.EventSuspended, Detail: "migrated"}) {
		t.Error("the move's own stop does not count")
	}
}
