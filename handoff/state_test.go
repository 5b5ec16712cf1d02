package handoff

import "testing"

func TestForeignEventsChangeNothing(t *testing.T) {
	states := []State{Owner, Offered, Claimed, Released, Returned, Abandoned, Split, Receiver, Accepted, Running, Aborted, "nonsense"}
	for _, s := range states {
		for e := Ready; e <= AbandonHere; e++ {
			next, actions, err := Step(s, e)
			if err != nil && (next != s || actions != nil) {
				t.Errorf("%v in %q: an error, and yet state %q and actions %v", e, s, next, actions)
			}
			if s.Final() && next != s {
				t.Errorf("%v leaves the final state %q for %q", e, s, next)
			}
		}
	}
}
