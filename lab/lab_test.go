package lab

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestSaveAndOpen(t *testing.T) {
	l := newLab(t.TempDir())
	l.Link, l.Supervisor, l.Wanmig = DefaultLink(), 42, "/usr/bin/wanmig"
	l.Sites[LocalDC].Pid = 43
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	got, err := Open(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, l) {
		t.Errorf("read %+v, want %+v", got, l)
	}
}

func TestOpenRefusesWhatIsNoLab(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir); !errors.Is(err, ErrNoLab) {
		t.Errorf("empty directory: %v, want ErrNoLab", err)
	}
	whole, err := json.Marshal(newLab(dir))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "lab.json")
	for n := range len(whole) {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); err == nil {
			t.Fatalf("the first %d of %d bytes were read as a lab", n, len(whole))
		}
	}
	if err := os.WriteFile(path, []byte(`{"sites": {"local-dc": {}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), RemoteDC) {
		t.Errorf("lab without remote-dc: %v", err)
	}
}

func TestUnknownSiteNamesTheKnown(t *testing.T) {
	_, err := newLab("/lab").Site("paris")
	if want := `no site "paris": there are local-dc, remote-dc, users`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestLabsDifferByDirectory(t *testing.T) {
	one, other, again := newLab("/a"), newLab("/b"), newLab("/a")
	for name := range one.Sites {
		if one.Sites[name].Namespace == other.Sites[name].Namespace {
			t.Errorf("labs in two directories share the namespace %s", one.Sites[name].Namespace)
		}
		if one.Sites[name].Namespace != again.Sites[name].Namespace {
			t.Errorf("a lab's namespace changed from %s to %s", one.Sites[name].Namespace, again.Sites[name].Namespace)
		}
	}
	local, remote := one.Sites[LocalDC], one.Sites[RemoteDC]
	if local.hostUUID(one.ID) == remote.hostUUID(one.ID) || local.hostUUID(one.ID) == other.Sites[LocalDC].hostUUID(other.ID) {
		t.Error("two libvirtd share a host UUID")
	}
}

func TestCheckDir(t *testing.T) {
	if err := checkDir(DefaultDir); err != nil {
		t.Error(err)
	}
	fits := "/" + strings.Repeat("d", maxSocketPath-len("//sites/remote-dc/run/libvirt/libvirt-sock"))
	if err := checkDir(fits); err != nil {
		t.Errorf("directory of %d bytes: %v", len(fits), err)
	}
	for _, dir := range []string{fits + "d", "/run/lab", "/etc/libvirt", "/var/lib/libvirt/lab", "/proc/lab"} {
		if checkDir(dir) == nil {
			t.Errorf("directory %s is accepted", dir)
		}
	}
	if err := checkDir("/runner/lab"); err != nil {
		t.Error(err)
	}
}

func TestClaim(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "lab")
	lock, err := claim(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if _, err := claim(dir); err == nil {
		t.Error("the same directory was claimed twice")
	}
	if _, err := claim(parent); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("claim of a directory with someone's files: %v", err)
	}
	if _, err := claim(filepath.Join(parent, "missing", "lab")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("claim below a missing directory: %v", err)
	}
}

// TestRemoveFiles claims a directory that existed and one that did not.
func TestRemoveFiles(t *testing.T) {
	parent := t.TempDir()
	found, made := filepath.Join(parent, "found"), filepath.Join(parent, "made")
	if err := os.Mkdir(found, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{found, made} {
		lock, err := claim(dir)
		if err != nil {
			t.Fatal(err)
		}
		lock.Close()
		l := newLab(dir)
		for _, s := range l.Sites {
			if err := l.makePrivateDirs(s); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.save(); err != nil {
			t.Fatal(err)
		}
		if err := l.removeFiles(); err != nil {
			t.Fatal(err)
		}
		if err := l.removeFiles(); err != nil {
			t.Errorf("remove %s again: %v", dir, err)
		}
	}
	if entries, err := os.ReadDir(found); err != nil || len(entries) > 0 {
		t.Errorf("of a directory that was there, empty, is left: %v, %v", entries, err)
	}
	if _, err := os.Stat(made); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that the lab made is left: %v", err)
	}
}

func TestRemoveFilesLeavesOthersAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "precious")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := newLab(dir).removeFiles(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestParseMountPoints(t *testing.T) {
	text := "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" +
		`30 27 0:27 / /mnt/a\040b\134c rw shared:1 - tmpfs none rw` + "\n" +
		"bad line\n"
	if got, want := parseMountPoints(text), []string{`/mnt/a b\c`, "/"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	points, err := mountPoints()
	if err != nil || !slices.Contains(points, "/proc") {
		t.Errorf("this system's mounts %q, %v: want /proc among them", points, err)
	}
}

func TestConfigNamesTheSite(t *testing.T) {
	l := newLab(t.TempDir())
	if err := l.writeConfig(); err != nil {
		t.Fatal(err)
	}
	want := "site: remote-dc\nlisten: \"10.255.0.2:7946\"\napi: /run/wanmig/agent.sock\nstate: /var/lib/wanmig\nlibvirt: /run/libvirt/libvirt-sock\n"
	if got, err := os.ReadFile(l.Sites[RemoteDC].Dir + "/etc/wanmig/agent.yaml"); err != nil || string(got) != want {
		t.Errorf("agent.yaml is %q, %v", got, err)
	}
	passwd, err := os.ReadFile(l.Sites[LocalDC].Dir + "/etc/passwd")
	if err != nil || strings.Count("\n"+string(passwd), "\n"+libvirtUser+":") != 1 {
		t.Errorf("passwd does not have %s once: %v\n%s", libvirtUser, err, passwd)
	}
}
