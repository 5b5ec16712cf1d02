package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/mattn/go-runewidth"

	"github.com/wanmig/wanmig/migrate"
)

var update = flag.Bool("update", false, "write the golden files anew")

var began = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func syncing() migrate.Status {
	return migrate.Status{
		Move: "m1", Role: "source", VM: "web", Peer: "remote-dc", Phase: migrate.PhaseSync, Started: began, ETAMS: 40_000,
		Disks: []migrate.Disk{
			{Target: "vda", Size: 4 << 30, Done: 1288490189, Sent: 1 << 30, Held: 400 << 20, Pending: 120 << 20, Spooled: 20 << 20, Rate: 11 << 20},
			{Target: "a-disk-with-a-long-name", Size: 1 << 40, Done: 1 << 20, Rate: 999 << 10},
		},
		Memory: migrate.Memory{Size: 1 << 30, Remaining: 310 << 20, Rate: 8 << 20, DirtyRate: 1 << 20, Round: 2, Held: true},
		Link:   migrate.Link{Sent: 812 << 20, Received: 3 << 20, Rate: 11848909, RTTMS: 51.2},
	}
}

// TestFrames compares what a terminal shows with testdata/frames.golden, for
// several widths and kinds of terminals.
func TestFrames(t *testing.T) {
	preparing := migrate.Status{VM: "my vm", Peer: "remote-dc", Phase: migrate.PhasePrepare, Started: began}
	troubled := syncing()
	troubled.Disks[0].Problem = "the spool file is full: back-pressure\nuntil the link is back"
	done := syncing()
	done.Phase, done.ETAMS, done.Link.Rate, done.Memory = migrate.PhaseDone, 0, 0, migrate.Memory{Size: 1 << 30, Round: 4}
	for i := range done.Disks {
		d := &done.Disks[i]
		d.Done, d.Pending, d.Spooled, d.Rate = d.Size, 0, 0, 0
	}
	since := began.Add(40 * time.Second)
	away := syncing()
	away.Link.LostSince, away.Link.Rate = &since, 0
	limited := syncing()
	limited.Link.Limit, limited.Link.Allowed, limited.Link.LimitedBy = migrate.Limit{Auto: true}, 16666666, "site remote-dc"
	stuck := syncing()
	stuck.Disks, stuck.ETAMS = stuck.Disks[:1], 0
	stuck.Memory = migrate.Memory{Size: 1 << 30, Remaining: 210 << 20, Rate: 30 << 20, DirtyRate: 41 << 20, Round: 9, LinkTakes: 31 << 20, PredictedMS: 6912, Stalled: true, Throttled: 41}
	arriving := syncing()
	arriving.Role = "destination"

	var got strings.Builder
	for _, c := range []struct {
		title string
		m     migrate.Status
		width int
		st    style
	}{
		{"wide", syncing(), 140, style{unicode: true}},
		{"ordinary", syncing(), 80, style{unicode: true}},
		{"without UTF-8", syncing(), 80, style{}},
		{"in colour", syncing(), 80, style{unicode: true, colour: true}},
		{"narrow", syncing(), 60, style{unicode: true}},
		{"narrower", syncing(), 40, style{unicode: true}},
		{"hardly", syncing(), 20, style{}},
		{"preparing", preparing, 80, style{unicode: true}},
		{"troubled", troubled, 60, style{unicode: true}},
		{"done", done, 80, style{unicode: true}},
		{"link lost", away, 140, style{unicode: true}},
		{"link lost, narrow", away, 60, style{unicode: true}},
		{"limited", limited, 140, style{unicode: true}},
		{"does not converge", stuck, 140, style{unicode: true}},
		{"does not converge, narrow", stuck, 60, style{unicode: true}},
		{"at the destination", arriving, 80, style{unicode: true}},
	} {
		head, lines := drawFrame(c.m, c.width, c.st, began.Add(72*time.Second))
		fmt.Fprintf(&got, "== %s: %d columns\n%s\n", c.title, c.width, head)
		for _, line := range lines {
			got.WriteString(strings.ReplaceAll(line, "\x1b", "<ESC>") + "\n")
		}
	}
	slowed := syncing()
	slowed.Memory.Throttled = 21
	for _, m := range []migrate.Status{stuck, slowed} {
		fmt.Fprintf(&got, "== elsewhere\n%s\n%s", progressLine(m, began.Add(72*time.Second)), describe(m, began.Add(72*time.Second)))
	}
	golden(t, "testdata/frames.golden", got.String())
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%s\nwant %s:\n%s", got, file, want)
	}
}

func TestStyleOf(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want style
	}{
		{map[string]string{"LANG": "en_GB.UTF-8"}, style{unicode: true, colour: true}},
		{map[string]string{"LANG": "de_DE.utf8", "NO_COLOR": "1"}, style{unicode: true}},
		{map[string]string{"LANG": "en_GB.UTF-8", "LC_ALL": "C"}, style{colour: true}},
		{map[string]string{"LANG": "C", "LC_CTYPE": "C.UTF-8"}, style{unicode: true, colour: true}},
		{nil, style{colour: true}},
	} {
		if got := styleOf(func(k string) string { return c.env[k] }); got != c.want {
			t.Errorf("styleOf(%v) = %+v, want %+v", c.env, got, c.want)
		}
	}
}

// TestLines tells when a line is printed: at once at a new phase, else every
// five seconds, and not while the operator is asked something.
func TestLines(t *testing.T) {
	var out strings.Builder
	now := began
	l := &lines{w: &out, now: func() time.Time { return now }}
	m := syncing()
	for i := range 12 {
		now = began.Add(time.Duration(i) * time.Second)
		if i == 7 {
			m.Phase = migrate.PhaseHandoff
		}
		l.show(m)
	}
	l.pause()
	now = now.Add(time.Hour)
	l.show(m)
	l.resume()
	l.say("said")
	l.show(m)
	for i := range 4 { // at once when the link goes and comes, too
		now = now.Add(time.Second)
		m.Link.LostSince = nil
		if i == 1 || i == 2 {
			m.Link.LostSince = &began
		}
		l.show(m)
	}
	var heads []string
	for line := range strings.Lines(out.String()) {
		head, _, _ := strings.Cut(strings.TrimSpace(line), ";")
		heads = append(heads, head)
	}
	want := "web sync: 0 s, web sync: 5 s, web handoff: 7 s, said, web handoff: 1h00m, web handoff: 1h00m, web handoff: 1h00m"
	if got := strings.Join(heads, ", "); got != want {
		t.Errorf("printed %s, want %s", got, want)
	}
}

func TestFormats(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{size(0), "0 B"}, {size(999), "999 B"}, {size(1000), "1.0 KiB"}, {size(1 << 20), "1.0 MiB"}, {size(1<<20 - 1), "1.0 MiB"},
		{size(104805172), "100 MiB"}, {size(999<<20 + 1<<19), "1.0 GiB"}, {size(1<<63 - 1), "8.0 EiB"}, {size(-1 << 63), "-8.0 EiB"},
		{sizeOf(1288490189, 4<<30), "1.2 of 4.0 GiB"}, {sizeOf(310<<20, 4<<30), "310 MiB of 4.0 GiB"},
		{percent(1, 3), "33 %"}, {percent(1, 0), ""},
		{span(412 * time.Millisecond), "412 ms"}, {span(9990 * time.Millisecond), "9.9 s"}, {span(38200 * time.Millisecond), "38 s"},
		{span(98200 * time.Millisecond), "1m38s"}, {span(3*time.Hour + 59*time.Minute + 59*time.Second), "3h59m"}, {span(-1), "0 ms"},
		{clock(1999 * time.Millisecond), "1 s"}, {millis(0.04), "0.0 ms"}, {millis(51.2), "51 ms"}, {millis(1234.5), "1.2 s"}, {millis(1e300), "277777h46m"},
		{round(133333328).String(), "133mbit"}, {round(999999999).String(), "1gbit"}, {round(8).String(), "8bit"}, {round(-5).String(), "-5bit"},
		{count(1, "round"), "1 round"}, {count(2, "round"), "2 rounds"},
		{name("web"), "web"}, {name("my vm"), `"my vm"`}, {name(""), `""`}, {name("\x1b[2J"), "?[2J"},
		{oneLine("a\nb\r\n\x07c"), "a; b; ?c"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

func TestMapping(t *testing.T) {
	m := mapping{}
	for _, bad := range []string{"", "=", "a", "a=", "=b"} {
		if err := m.Set(bad); err == nil {
			t.Errorf("Set(%q) is accepted", bad)
		}
	}
	for _, good := range []string{"vda=/srv/a=b", "br0=my bridge", "br0=my bridge"} {
		if err := m.Set(good); err != nil {
			t.Errorf("Set(%q): %v", good, err)
		}
	}
	if len(m) != 2 || m["vda"] != "/srv/a=b" || m["br0"] != "my bridge" {
		t.Errorf("mapping is %v", m)
	}
}

// FuzzRender shows statuses of any content: no view may panic, let a name
// drive the terminal, or draw beyond its width.
func FuzzRender(f *testing.F) {
	seed := syncing()
	seed.Disks[0].Problem = "full"
	seed.Memory.Stalled, seed.Memory.PredictedMS, seed.Memory.LinkTakes, seed.Memory.Throttled = true, 1<<62, -1, -7
	seed.Findings = []migrate.Finding{{Check: "space", Problem: "none", Remedy: "free some", Fatal: true}}
	seed.Link = migrate.Link{LostSince: &began, LostMS: 1 << 62, Allowed: 1 << 62, LimitedBy: "\x1b[2J", Resent: 1, Carriers: []migrate.Carrier{{Transport: "tcp", RTTMS: -1}}}
	for _, r := range []string{"", "done", "rolled-back", "refused", "checked", "in-doubt", "abandoned", "split"} {
		if r != "" {
			seed.Result = &migrate.Result{Result: r, Error: "x", DowntimeMS: 4, DiskBytes: 4, Notices: []string{"n"}, LinkLostMS: 1 << 62, Carriers: []migrate.CarriersUsed{{Transport: "\x07"}}, Ways: []migrate.Way{{Command: "c\n", Does: "\x1b"}}, Findings: seed.Findings}
		}
		b, err := json.Marshal(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint8(80))
		f.Add(b, uint8(0))
	}
	f.Add([]byte(`{"vm":"\u001b]0;x\u0007","disks":[{"target":"世界\n","size":-1,"done":9223372036854775807}],"memory":{"size":1,"remaining":-9}}`), uint8(30))
	f.Fuzz(func(t *testing.T, b []byte, columns uint8) {
		var m migrate.Status
		if json.Unmarshal(b, &m) != nil {
			return
		}
		width := 2 + int(columns)
		head, rows := drawFrame(m, width, style{unicode: true}, began)
		for _, line := range append(rows, head) {
			if w := runewidth.StringWidth(line); w > width {
				t.Errorf("%d columns in %d: %q", w, width, line)
			}
		}
		text := head + strings.Join(rows, "") + progressLine(m, began) + describe(m, began)
		if m.Result != nil {
			text += summary(*m.Result)
			if err := ending(*m.Result); err != nil {
				text += oneLine(err.Error())
			}
		}
		for _, r := range text {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%q is shown in %q", r, text)
			}
		}
	})
}
