package migrate

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/compress"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
)

// keeper is an engine with copies and no guests.
func keeper(t *testing.T) *Engine {
	t.Helper()
	j, err := handoff.OpenJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return &Engine{Config: Config{Journal: j, Host: &hypervisor.Host{}, Keep: time.Hour, KeepSpace: 8 << 20, CopyDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}}
}

func image(t *testing.T, dir, name string, size int) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, slices.Repeat([]byte{1}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// What has arrived is kept if it is worth it, and the rest is left to be removed.
func TestKeepArrived(t *testing.T) {
	e, dir := keeper(t), t.TempDir()
	large, small, operators := image(t, dir, "large", 2<<20), image(t, dir, "small", 4096), image(t, dir, "operators", 4096)
	entry := handoff.Entry{VM: "web", UUID: "u", Created: []string{large, small, dir + "/cdrom"}, Arriving: []handoff.Copy{
		{Path: large, UUID: "u", Format: "raw", Size: 2 << 20, Until: time.Now()},
		{Path: small, UUID: "u", Format: "raw", Size: 4096, Until: time.Now()},
		{Path: operators, UUID: "u", Format: "raw", Size: 4096, Whole: true},
		{Path: dir + "/never made", UUID: "u", Until: time.Now()},
	}}
	remove, bytes := e.keepArrived(entry)
	if !slices.Equal(remove, []string{small, dir + "/cdrom"}) || bytes < 2<<20 {
		t.Errorf("to be removed: %q, %d bytes kept", remove, bytes)
	}
	if c, ok := e.olderCopy("u", wireDisk{Path: large}); !ok || c.Whole || time.Until(c.Until) < 50*time.Minute {
		t.Errorf("%+v, %v", c, ok)
	}
	if c, ok := e.olderCopy("u", wireDisk{Path: operators}); !ok || !c.Kept() || c.Whole {
		t.Errorf("what the operator keeps has changed in part and stays: %+v, %v", c, ok)
	}
	for what, d := range map[string]struct {
		uuid string
		disk wireDisk
	}{
		"another guest's": {"v", wireDisk{Path: large}},
		"another path":    {"u", wireDisk{Path: small}},
		"a device":        {"u", wireDisk{Path: large, Block: true}},
	} {
		if _, ok := e.olderCopy(d.uuid, d.disk); ok {
			t.Errorf("%s is taken for an older copy", what)
		}
	}
}

// A file that is something else by now is neither written to nor removed, and
// counts again when it is back.
func TestCopyThatChanges(t *testing.T) {
	e, dir := keeper(t), t.TempDir()
	path := image(t, dir, "disk", 2<<20)
	if err := e.keepCopies([]handoff.Copy{{Path: path, VM: "web", UUID: "u", Until: time.Now().Add(time.Hour)}}); err != nil {
		t.Fatal(err)
	}
	c, ok := e.olderCopy("u", wireDisk{Path: path})
	if !ok {
		t.Fatal("not kept")
	}
	if err := os.Rename(path, path+".aside"); err != nil {
		t.Fatal(err)
	}
	for _, now := range []func(){func() {}, func() { image(t, dir, "disk", 2<<20) }} { // gone, and another
		now()
		if _, ok := e.olderCopy("u", wireDisk{Path: path}); ok || e.takeCopy(c) == nil {
			t.Error("a file that changed is taken for the copy")
		}
		if list, err := e.Copies(); err != nil || len(list) != 0 {
			t.Errorf("listed: %+v, %v", list, err)
		}
	}
	if n, err := e.RemoveCopies(t.Context(), "other"); err != nil || n != 0 {
		t.Errorf("%d copies of another guest removed, %v", n, err)
	}
	if err := os.Rename(path+".aside", path); err != nil {
		t.Fatal(err)
	}
	if list, err := e.Copies(); err != nil || len(list) != 1 || list[0].Storage < 2<<20 {
		t.Errorf("not listed when it is back: %+v, %v", list, err)
	}
}

// Copies go when their time is over, and the oldest when they take too much room;
// those that an operator keeps do not.
func TestCopiesGo(t *testing.T) {
	now := time.Now()
	var all []standing
	keep := func(name string, age, left time.Duration, change func(*standing)) {
		c := standing{handoff.Copy{Path: name, Since: now.Add(-age)}, true, 3 << 20, true}
		if left != 0 {
			c.Until = now.Add(left)
		}
		change(&c)
		all = append(all, c)
	}
	as := func(*standing) {}
	keep("over", time.Minute, -time.Second, as)
	keep("oldest", 4*time.Hour, time.Hour, as)
	keep("middle", 3*time.Hour, time.Hour, as)
	keep("changed", 2*time.Hour, time.Hour, func(c *standing) { c.unchanged = false })
	keep("changed and over", 2*time.Hour, -time.Hour, func(c *standing) { c.unchanged = false })
	keep("full", 2*time.Hour, time.Hour, func(c *standing) { c.room = false })
	keep("newest", time.Hour, time.Hour, as)
	keep("operator's", 9*time.Hour, 0, func(c *standing) { c.room = false })
	got := surplus(all, now, 8<<20)
	for _, c := range all {
		why := map[string]string{"over": "time", "changed and over": "time", "oldest": "keep_space", "full": "nearly full"}[c.Path]
		if (got[c.Path] != "") != (why != "") || !strings.Contains(got[c.Path], why) {
			t.Errorf("%s goes because %q, want %q", c.Path, got[c.Path], why)
		}
	}
}

// The memory of a guest is found as long as it is what was kept, and a file that
// belongs to nothing goes when the agent starts.
func TestMemoryCopy(t *testing.T) {
	e := keeper(t)
	m, err := e.keepMemory("u")
	if err != nil {
		t.Fatal(err)
	}
	content := slices.Repeat([]byte{7}, 4096)
	m.page(5, slices.Repeat([]byte{6}, 4096))
	m.page(5, content)
	m.page(1000, slices.Repeat([]byte{8}, 4096))
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
	if s, err := e.openMemory("u"); s != nil || err != nil {
		t.Errorf("memory of a guest that has not left: %v, %v", s, err)
	}
	if err := e.keepCopies([]handoff.Copy{{Path: e.memoryPath("u"), UUID: "u", Format: memoryFormat}}); err != nil {
		t.Fatal(err)
	}
	stray := image(t, e.CopyDir, "gone.ram", 10)
	e.dropStrayMemory(nil)
	if there(stray) || !there(e.memoryPath("u")) {
		t.Error("not the stray file has gone")
	}
	s, err := e.openMemory("u")
	if err != nil || s == nil {
		t.Fatalf("%v, %v", s, err)
	}
	s.done.Wait()
	at, ok := s.Find(compress.Sum(content))
	got := make([]byte, 4096)
	if !ok || at != 5 || s.ReadAt(t.Context(), got, at*4096) != nil || !slices.Equal(got, content) {
		t.Errorf("page %d, %v", at, ok)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	e.dropMemory("u")
	if list, err := e.Copies(); there(e.memoryPath("u")) || err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}
