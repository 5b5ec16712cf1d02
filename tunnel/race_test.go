package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func addrsOf(t *testing.T, list string) []netip.AddrPort {
	t.Helper()
	var addrs []netip.AddrPort
	for s := range strings.FieldsSeq(list) {
		addrs = append(addrs, mustAddrPort(t, s))
	}
	return addrs
}

func TestPlanOfAttempts(t *testing.T) {
	for _, test := range []struct {
		addrs     string
		transport Transport
		want      string
	}{
		{"192.0.2.1:1", Auto, "0s UDP 192.0.2.1:1, 300ms TCP 192.0.2.1:1, 2.3s TCP 192.0.2.1:1 narrow"},
		{"192.0.2.1:1", QUIC, "0s UDP 192.0.2.1:1"},
		{"192.0.2.1:1", TCP, "0s TCP 192.0.2.1:1, 2s TCP 192.0.2.1:1 narrow"},
		{"192.0.2.1:1 192.0.2.2:1 [2001:db8::1]:1 [2001:db8::2]:1 [2001:db8::3]:1", QUIC,
			"0s UDP 192.0.2.1:1, 250ms UDP [2001:db8::1]:1, 500ms UDP 192.0.2.2:1, 750ms UDP [2001:db8::2]:1, 1s UDP [2001:db8::3]:1"},
		{"[2001:db8::1]:1 192.0.2.1:1", Auto,
			"0s UDP [2001:db8::1]:1, 250ms UDP 192.0.2.1:1, 300ms TCP [2001:db8::1]:1, 550ms TCP 192.0.2.1:1, 2.3s TCP [2001:db8::1]:1 narrow, 2.55s TCP 192.0.2.1:1 narrow"},
	} {
		var got []string
		for _, a := range planAttempts(addrsOf(t, test.addrs), test.transport) {
			text := fmt.Sprintf("%v %v", a.start, a)
			if a.narrow {
				text += " narrow"
			}
			got = append(got, text)
		}
		if got := strings.Join(got, ", "); got != test.want {
			t.Errorf("%s over %v:\n got %s\nwant %s", test.addrs, test.transport, got, test.want)
		}
	}
	if n := len(planAttempts(slices.Repeat(addrsOf(t, "192.0.2.1:1"), 1000), QUIC)); n != maxAddresses {
		t.Errorf("%d attempts at a name of 1000 addresses", n)
	}
}

// runner is what an attempt of a scripted race meets.
type runner struct {
	after time.Duration
	err   error
}

func TestRace(t *testing.T) {
	refused, verdictErr := errors.New("refused"), errors.New("not you")
	never := time.Hour
	for _, test := range []struct {
		name      string
		runners   map[string]runner
		timeout   time.Duration
		won       string
		took      time.Duration
		errs      []error
		discarded []string
	}{
		{"QUIC answers", map[string]runner{"UDP": {after: 100 * time.Millisecond}, "TCP": {}}, 0, "UDP", 100 * time.Millisecond, nil, nil},
		{"a slow path", map[string]runner{"UDP": {after: 600 * time.Millisecond}, "TCP": {after: 600 * time.Millisecond}}, 0, "UDP", 600 * time.Millisecond, nil, nil},
		{"UDP is silent", map[string]runner{"UDP": {after: never}, "TCP": {after: 200 * time.Millisecond}}, 0, "TCP", 500 * time.Millisecond, nil, nil},
		{"UDP is refused", map[string]runner{"UDP": {after: 10 * time.Millisecond, err: refused}, "TCP": {after: 20 * time.Millisecond}}, 0, "TCP", 30 * time.Millisecond, nil, nil},
		{"large packets vanish", map[string]runner{"UDP": {after: never}, "TCP": {after: never}, "TCP narrow": {after: 100 * time.Millisecond}}, 0, "TCP narrow", 2400 * time.Millisecond, nil, nil},
		{"all refuse", map[string]runner{"UDP": {err: refused}, "TCP": {err: refused}, "TCP narrow": {err: refused}}, 0, "", 0, []error{refused}, nil},
		{"a verdict", map[string]runner{"UDP": {after: time.Millisecond, err: verdictErr}, "TCP": {}}, 0, "", time.Millisecond, []error{verdictErr}, nil},
		{"no time left", map[string]runner{"UDP": {after: never}, "TCP": {after: never}}, 400 * time.Millisecond, "", 400 * time.Millisecond, []error{context.DeadlineExceeded}, nil},
		{"a loser that does not listen", map[string]runner{"UDP": {after: -time.Second}, "TCP": {after: 10 * time.Millisecond}}, 0, "TCP", time.Second, nil, []string{"UDP"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx := context.Background()
				if test.timeout > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, test.timeout)
					defer cancel()
				}
				began := time.Now()
				var discarded []string
				won, err := race(ctx, planAttempts(addrsOf(t, "192.0.2.1:1"), Auto),
					func(ctx context.Context, a attempt) (string, error) {
						name := a.transport.network()
						if a.narrow {
							name += " narrow"
						}
						r, ok := test.runners[name]
						if !ok {
							t.Errorf("%s was tried", name)
						}
						if r.after < 0 { // goes on when it is told to stop
							time.Sleep(-r.after)
							return name, nil
						}
						select {
						case <-time.After(r.after):
							return name, r.err
						case <-ctx.Done():
							return "", ctx.Err()
						}
					},
					func(late string) { discarded = append(discarded, late) },
					func(err error) bool { return err == verdictErr })
				if won != test.won || time.Since(began) != test.took || (err == nil) != (test.errs == nil) {
					t.Errorf("%q won, %v, after %v, want %q after %v", won, err, time.Since(began), test.won, test.took)
				}
				for _, want := range test.errs {
					if !errors.Is(err, want) {
						t.Errorf("error %v, want %v", err, want)
					}
				}
				if !slices.Equal(discarded, test.discarded) {
					t.Errorf("discarded %q, want %q", discarded, test.discarded)
				}
			})
		})
	}
}

func TestErrorOfALostRace(t *testing.T) {
	at := addrsOf(t, "192.0.2.1:1")[0]
	err := failures{{attempt{addr: at}, errors.New("a")}, {attempt{addr: at, narrow: true}, errors.New("b")}, {attempt{addr: at}, ErrBusy}}
	if got, want := err.Error(), "a; "+ErrBusy.Error(); got != want || !errors.Is(err, ErrBusy) {
		t.Errorf("%q, want %q", got, want)
	}
}
