package migrate

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestParseLimit(t *testing.T) {
	for text, want := range map[string]Limit{
		"none":               {},
		"400mbit":            {Most: 400e6},
		"50MB/s":             {Most: 400e6},
		"auto":               {Auto: true, Least: 50e6},
		"auto:100mbit-1gbit": {Auto: true, Least: 100e6, Most: 1e9},
		"auto:1mbit-1mbit":   {Auto: true, Least: 1e6, Most: 1e6},
	} {
		got, err := ParseLimit(text)
		if err != nil || got != want {
			t.Errorf("%q is %+v, %v", text, got, err)
		}
		if again, err := ParseLimit(got.String()); err != nil || again != got {
			t.Errorf("%q is written %q, which is %+v, %v", text, got, again, err)
		}
	}
	for text, want := range map[string]string{"": "or auto, or none", "400": "or none", "fast": "400mbit", "auto:": "LEAST-MOST", "auto:1mbit": "LEAST-MOST",
		"auto:2mbit-1mbit": "LEAST-MOST", "auto:1mbit-2mbit-3mbit": "LEAST-MOST", "None": "or none", strings.Repeat("9", 1000): "or none"} {
		if got, err := ParseLimit(text); err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 250 {
			t.Errorf("%.40q is %+v, %v", text, got, err)
		}
	}
}

func FuzzParseLimit(f *testing.F) {
	for _, s := range []string{"none", "auto", "400mbit", "auto:50mbit-400mbit", "auto:1kbit-1tbit", "auto:-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLimit(s)
		if err != nil {
			return
		}
		if again, err := ParseLimit(l.String()); err != nil || again != l {
			t.Errorf("%q is %+v, which is written %s and read as %+v, %v", s, l, l, again, err)
		}
	})
}

func TestRequestIsChecked(t *testing.T) {
	for _, r := range []Request{{Priority: "urgent"}, {MaxOutage: 9 * time.Second}, {MaxOutage: 25 * time.Hour}, {MaxOutage: -1}} {
		if r.Validate() == nil {
			t.Errorf("%+v is taken", r)
		}
	}
	r := Request{Priority: Low, MaxOutage: LeastOutage, Rate: Limit{Auto: true, Least: 1e6, Most: 2e6}}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var got Request
	if err := json.Unmarshal(b, &got); err != nil || got.Rate != r.Rate || got.Validate() != nil {
		t.Errorf("%s is read as %+v, %v", b, got, err)
	}
	if b, err = json.Marshal(Request{VM: "a"}); err != nil || strings.Contains(string(b), "rate") {
		t.Errorf("a request without a rate is %s, %v", b, err)
	}
}

func TestLimitOfAMove(t *testing.T) {
	e, err := New(t.Context(), keeper(t).Config)
	if err != nil {
		t.Fatal(err)
	}
	add := func(s Status) *Move {
		m := newMove(s, func(error) {})
		e.moves[s.Move] = m
		return m
	}
	add(Status{Move: "mv-1", VM: "web", Role: "source", Phase: PhaseDone})
	going := add(Status{Move: "mv-2", VM: "web", Role: "source", Phase: PhaseSync})
	add(Status{Move: "mv-3", VM: "db", Role: "destination", Peer: "north", Phase: PhaseSync})
	for name, want := range map[string]error{"mv-1": ErrOver, "mv-3": ErrNotSource, "db": ErrNotSource, "mv-4": ErrNoMove, "wob": ErrNoMove} {
		if err := e.Limit(name, Limit{Most: 1e6}); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"mv-2", "web"} {
		l := Limit{Most: 1e6 * (1 + 1<<len(name))}
		if err := e.Limit(name, l); err != nil || going.Limit() != l || going.Status().Link.Limit != l {
			t.Errorf("%s: %v, the limit is %v", name, err, going.Limit())
		}
	}
}
