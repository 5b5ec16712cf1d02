package migrate

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
)

// A libvirtd that does not answer says nothing of a guest that was accepted here: it may
// run, and neither a peer's claim nor an operator's word ends it then.
func TestNoWordEndsAGuestThatMayRun(t *testing.T) {
	host := hypervisor.New(filepath.Join(t.TempDir(), "nobody"), slog.New(slog.DiscardHandler))
	for _, word := range []handoff.Event{handoff.Overruled, handoff.AbandonHere, handoff.RunHere, handoff.Asked} {
		entry := handoff.Entry{Move: "mv-1", UUID: "u", State: handoff.Accepted}
		u := &undecided{Engine: &Engine{Config: Config{Host: host}}, entry: &entry,
			step: func(_ context.Context, ev handoff.Event, _ error) error {
				t.Errorf("%v is carried out", ev)
				return nil
			}}
		if h := u.hear(t.Context(), word); h.kind != kindUndecided || h.err == nil {
			t.Errorf("%v is answered with %d, %v", word, h.kind, h.err)
		}
	}
}
