package netredirect

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/netredirect/hostnet"
	"github.com/wanmig/wanmig/netredirect/names"
)

func goodRecord() *record {
	at := time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC)
	r := &record{Move: "mv-abcdefgh", VM: "web server", UUID: "u", Site: "b", Peer: "p", Role: Destination, State: Standing,
		Options: Options{Kind: Auto, Mode: New, Egress: EgressDirect, Max: time.Hour, Quiet: time.Minute, LowerTTL: true, Names: []string{"a.example."}},
		Kind:    QUIC, Device: "wmqtest", Local: addr("203.0.113.1"), Remote: addr("203.0.113.2"), MTU: 1400, Slot: 3, Priority: 6988,
		Plan:  planned()["destination-new-direct"],
		Began: at, Switched: at, Deadline: at, Mode: New, Mapped: map[netip.Addr]netip.Addr{addr("192.0.2.10"): addr("203.0.113.99"), addr("2001:db8:1::10"): addr("2001:db8:9::99")},
		Names: []names.Record{{Name: "a.example.", Zone: "example.", Address: addr("192.0.2.10"), TTL: 3600}}, Found: true, Lowered: at, NameMoved: at,
		Announced: []netip.Prefix{netip.MustParsePrefix("192.0.2.10/32")}, RouteSeen: at, Restored: true, Direct: true, NameBack: at, Removing: true, Ending: true,
		Vouched: []string{"q"}, Follows: "mv-hgfedcba"}
	r.setNICs([]hostNIC{web(false), storage(true)})
	return r
}

// noteAll fails for a field that a test has forgotten.
func noteAll(t *testing.T, v reflect.Value) {
	t.Helper()
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("the test's record has no %s", v.Type().Field(i).Name)
		}
	}
}

func TestJournalKeepsEveryField(t *testing.T) {
	r := goodRecord()
	noteAll(t, reflect.ValueOf(*r))
	j := journal{filepath.Join(t.TempDir(), "deep", "redirects")}
	if records, err := j.all(); err != nil || len(records) != 0 {
		t.Fatalf("a journal that is not there yet: %v, %v", records, err)
	}
	for range 2 {
		if err := j.put(r); err != nil {
			t.Fatal(err)
		}
	}
	records, err := j.all()
	if err != nil || len(records) != 1 {
		t.Fatalf("%d records, %v", len(records), err)
	}
	if !reflect.DeepEqual(records[0], r) {
		t.Errorf("read back:\n%+v\nnot\n%+v", records[0], r)
	}
	if info, err := os.Stat(j.path(r.Move)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its file: %v, %v", info.Mode(), err)
	}
	for range 2 {
		if err := j.remove(r.Move); err != nil {
			t.Errorf("removing: %v", err)
		}
	}
	if files, _ := os.ReadDir(j.dir); len(files) != 0 {
		t.Errorf("left: %v", files)
	}
}

// TestJournalReadsWhatItCan has files beside a good one that are none.
func TestJournalReadsWhatItCan(t *testing.T) {
	j := journal{t.TempDir()}
	good := goodRecord()
	if err := j.put(good); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(j.path(good.Move))
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string][]byte{
		"torn.json":     whole[:len(whole)/2],
		"empty.json":    {},
		"zeros.json":    make([]byte, 4096),
		"foreign.json":  []byte(`{"hello": 1}`),
		"list.json":     []byte(`[]`),
		"null.json":     []byte(`null`),
		"other.json":    whole, // of another move
		".json":         whole,
		"deep.json":     []byte(strings.Repeat(`{"plan":`, 1<<16)),
		"huge-int.json": []byte(`{"slot": 1e400}`),
	}
	for name, text := range bad {
		if err := os.WriteFile(filepath.Join(j.dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".mv-abcdefgh.json1234", "mv-abcdefgh.json~", "README", "mv-x.JSON"} { // no records, and no errors
		if err := os.WriteFile(filepath.Join(j.dir, name), whole[:100], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(j.dir, "folder.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(j.dir, "nowhere"), filepath.Join(j.dir, "link.json")); err != nil {
		t.Fatal(err)
	}
	records, err := j.all()
	if len(records) != 1 || !reflect.DeepEqual(records[0], good) {
		t.Errorf("%d records are read", len(records))
	}
	if err == nil {
		t.Fatal("no error tells of the others")
	}
	for name := range bad {
		if !strings.Contains(err.Error(), filepath.Join(j.dir, name)+":") {
			t.Errorf("nothing tells of %s", name)
		}
	}
	for _, name := range []string{"folder.json", "link.json"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("nothing tells of %s", name)
		}
	}
	if n := len(strings.Split(err.Error(), "\n")); n != len(bad)+2 {
		t.Errorf("%d errors for %d files:\n%v", n, len(bad)+2, err)
	}
}

func TestJournalTellsWhatItCantDo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	j := journal{file}
	if _, err := j.all(); err == nil || !strings.Contains(err.Error(), "open journal of redirects") {
		t.Errorf("all: %v", err)
	}
	if err := j.put(goodRecord()); err == nil || !strings.Contains(err.Error(), "mv-abcdefgh") {
		t.Errorf("put: %v", err)
	}
	if err := j.remove("mv-abcdefgh"); err == nil {
		t.Error("remove: no error")
	}
}

func TestRecordRefuses(t *testing.T) {
	if err := goodRecord().validate(); err != nil {
		t.Fatal(err)
	}
	step := func(s hostnet.Step) func(*record) { return func(r *record) { r.Plan.Stay = []hostnet.Step{s} } }
	for name, spoil := range map[string]func(*record){
		"no move":             func(r *record) { r.Move = "" },
		"path":                func(r *record) { r.Move = "../../etc/passwd" },
		"hidden":              func(r *record) { r.Move = ".a" },
		"long move":           func(r *record) { r.Move = strings.Repeat("a", 65) },
		"line end":            func(r *record) { r.Move = "a\n" },
		"role":                func(r *record) { r.Role = "both" },
		"no role":             func(r *record) { r.Role = "" },
		"state":               func(r *record) { r.State = "gone" },
		"no state":            func(r *record) { r.State = "" },
		"slot":                func(r *record) { r.Slot = maxSlots },
		"negative slot":       func(r *record) { r.Slot = -1 },
		"priority":            func(r *record) { r.Priority = 0 },
		"high priority":       func(r *record) { r.Priority = topPriority + 1 },
		"bridge's MAC":        func(r *record) { r.NICs[0].BridgeMAC = "" },
		"MAC":                 func(r *record) { r.NICs[0].MAC = "x" },
		"served":              func(r *record) { r.NICs[0].Served = "ff:ff:ff:ff:ff:ff" },
		"address":             func(r *record) { r.NICs[0].Addresses[0] = addr("127.0.0.1") },
		"mapped":              func(r *record) { r.Mapped[addr("192.0.2.10")] = addr("fe80::1%eth0") },
		"families":            func(r *record) { r.Mapped[addr("192.0.2.10")] = addr("2001:db8::1") },
		"kind":                func(r *record) { r.Options.Kind = "gre" },
		"longest time":        func(r *record) { r.Options.Max = -1 },
		"no change":           step(hostnet.Step{}),
		"other's table":       step(hostnet.Step{Table: &hostnet.Table{Family: "inet", Name: "filter"}}),
		"a way out":           step(hostnet.Step{Table: &hostnet.Table{Family: "inet", Name: "wanmig_r0", Body: "}\nflush ruleset"}}),
		"an include":          step(hostnet.Step{Table: &hostnet.Table{Family: "inet", Name: "wanmig_r0", Body: "include \"/etc/shadow\""}}),
		"sysctl":              step(hostnet.Step{Sysctl: &hostnet.Sysctl{Key: "net/../kernel/core_pattern", Value: "1", Was: "0"}}),
		"sysctl not read":     step(hostnet.Step{Sysctl: &hostnet.Sysctl{Key: "net/ipv4/conf/br0/forwarding", Value: "1"}}),
		"the host's routes":   step(hostnet.Step{Route: &hostnet.Route{Table: 255, Dst: host(addr("192.0.2.1")), Dev: "br0"}}),
		"the very first rule": step(hostnet.Step{Rule: &hostnet.Rule{Priority: 0, To: host(addr("192.0.2.1")), Table: 1}}),
	} {
		r := goodRecord()
		spoil(r)
		if r.validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzRecord(f *testing.F) {
	whole, err := json.Marshal(goodRecord())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(`{"move":"a","role":"source","state":"armed","priority":7000,"options":{"kind":"none"}}`))
	f.Add([]byte(`{"mapped":{"":""},"nics":[{"addresses":["fe80::1%\n","::ffff:1.2.3.4"]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r record
		if json.Unmarshal(b, &r) != nil || r.validate() != nil {
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var back record
		if err := json.Unmarshal(again, &back); err != nil || back.validate() != nil {
			t.Errorf("accepted, and not when it is read back: %v: %s", err, again)
		}
		for _, line := range r.Plan.text() {
			if strings.HasPrefix(line, "#") {
				t.Errorf("accepted with the step %q", line)
			}
		}
	})
}

// TestEachPrefixOfARecordIsAnError cuts a record short at every byte.
func TestEachPrefixOfARecordIsAnError(t *testing.T) {
	whole, err := json.Marshal(goodRecord())
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		var r record
		if json.Unmarshal(whole[:n], &r) == nil {
			t.Fatalf("the first %d of %d bytes are a record", n, len(whole))
		}
	}
}

func TestNumbersOfRedirects(t *testing.T) {
	m := &Manager{ctx: context.Background(), redirects: map[string]*redirect{}}
	add := func(move, uuid string) *redirect {
		t.Helper()
		x, err := m.add(&record{Move: move, UUID: uuid})
		if err != nil {
			t.Fatalf("%s: %v", move, err)
		}
		return x
	}
	a, b := add("a", "1"), add("b", "2")
	if a.Slot == b.Slot || a.Priority != topPriority || b.Priority != topPriority-rulesEach {
		t.Errorf("the first have %d and %d, slots %d and %d", a.Priority, b.Priority, a.Slot, b.Slot)
	}
	if _, err := m.add(&record{Move: "a"}); err == nil {
		t.Error("a move has two redirects")
	}
	delete(m.redirects, "a")
	if c := add("c", "2"); c.Priority >= b.Priority || c.Slot != 0 {
		t.Errorf("a later redirect of the same VM has %d in slot %d, not before %d", c.Priority, c.Slot, b.Priority)
	}
	if d := add("d", "3"); d.Priority != topPriority {
		t.Errorf("what is free again is not used: %d", d.Priority)
	}
	m.redirects = map[string]*redirect{}
	// Some redirect always stands.
	for i := range 3000 {
		add(strings.Repeat("x", i+1), "u"+strings.Repeat("x", i))
		delete(m.redirects, strings.Repeat("x", i))
	}
	m.redirects = map[string]*redirect{}
	priorities, slots := map[int]bool{}, map[int]bool{}
	for i := range maxSlots {
		x := add(strings.Repeat("x", i+1), strings.Repeat("u", i%7))
		if priorities[x.Priority] || slots[x.Slot] || x.Priority < 1 {
			t.Fatalf("redirect %d has priority %d, slot %d", i, x.Priority, x.Slot)
		}
		priorities[x.Priority], slots[x.Slot] = true, true
	}
	if _, err := m.add(&record{Move: "one more"}); err == nil || !strings.Contains(err.Error(), "wanmig redirect cut") {
		t.Errorf("one too many: %v", err)
	}
}

// TestHomeIsNotAnnounced leaves out the addresses that the destination's own
// networks have already.
func TestHomeIsNotAnnounced(t *testing.T) {
	x := &redirect{record: *goodRecord()}
	if got, want := x.prefixes(), nets("192.0.2.10/32", "2001:db8:1::10/128"); !slices.Equal(got, want) {
		t.Errorf("%v, not %v", got, want)
	}
}
