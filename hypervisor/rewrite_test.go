package hypervisor

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

var uefiChanges = Changes{
	Disks: map[string]DiskChange{
		"vda": {Path: "/data/web-1.qcow2", Type: "file"},
		"vdb": {Path: "/data/web-1 log & more.img", Type: "file"},
		"sda": {Path: "/dev/vg1/web", Type: "block"},
		"sdb": {Drop: true},
		"xyz": {Path: "/data/not-there", Type: "file"},
	},
	Networks: map[string]string{"default": "dmz", "br-dmz": "br0", "": "nothing"},
}

func TestRewrite(t *testing.T) {
	before := testdata(t, "uefi.xml")
	after, err := Rewrite(before, uefiChanges)
	if err != nil {
		t.Fatal(err)
	}
	dom, err := readDomain(after)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []Disk{
		{Target: "vda", Bus: "virtio", Device: "disk", Type: "file", Format: "qcow2", Path: "/data/web-1.qcow2"},
		{Target: "vdb", Bus: "virtio", Device: "disk", Type: "file", Format: "raw", Path: "/data/web-1 log & more.img"},
		{Target: "sda", Bus: "scsi", Device: "disk", Type: "block", Format: "raw", Path: "/dev/vg1/web"},
		{Target: "sdb", Bus: "sata", Device: "cdrom", Type: "file", Format: "raw", ReadOnly: true},
		{Target: "sdc", Bus: "sata", Device: "cdrom", Type: "file", Format: "raw", ReadOnly: true},
	} {
		if dom.Disks[i] != want {
			t.Errorf("disk %d is\n%+v, want\n%+v", i, dom.Disks[i], want)
		}
	}
	for i, want := range []string{"dmz", "br0", "eno2", ""} {
		if dom.Networks[i].Source != want {
			t.Errorf("network %d is %q, want %q", i, dom.Networks[i].Source, want)
		}
	}
	// Whatever stands between the changed lines is the same, byte for byte.
	old, now := strings.Split(before, "\n"), strings.Split(after, "\n")
	same := map[string]bool{}
	for _, line := range now {
		same[strings.ReplaceAll(line, `"`, `'`)] = true
	}
	for _, line := range old {
		gone := strings.Contains(line, "<source ") || strings.Contains(line, "<disk type='volume'")
		if !gone && !same[strings.ReplaceAll(line, `"`, `'`)] {
			t.Errorf("lost: %s", line)
		}
	}
	if !strings.Contains(after, `<source dev="eno2" mode="bridge"/>`) {
		t.Error("the direct interface lost its mode")
	}
	if strings.Contains(after, "pool=") {
		t.Error("the volume's pool is still there")
	}
}

func TestRewriteFlattens(t *testing.T) {
	for _, name := range []string{"chain-live.xml", "chain-migratable.xml"} {
		after, err := Rewrite(testdata(t, name), Changes{Disks: map[string]DiskChange{
			"vda": {Path: "/srv/images/db.raw", Type: "file"},
			"vdb": {Path: "/srv/images/db.qcow2", Type: "file"},
			"hdc": {Drop: true},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(after, "backingStore") || strings.Contains(after, "db.base") || strings.Contains(after, "db.iso") || strings.Contains(after, "index=\"2\"") {
			t.Errorf("%s:\n%s", name, after)
		}
	}
}

func TestRewriteTwice(t *testing.T) {
	once, err := Rewrite(testdata(t, "uefi.xml"), uefiChanges)
	if err != nil {
		t.Fatal(err)
	}
	uefi := uefiChanges
	uefi.Networks = nil
	twice, err := Rewrite(once, uefi)
	if err != nil {
		t.Fatal(err)
	}
	if once != twice {
		t.Errorf("once:\n%s\ntwice:\n%s", once, twice)
	}
}

func TestRewriteRefuses(t *testing.T) {
	uefi := testdata(t, "uefi.xml")
	vda := func(c DiskChange) Changes { return Changes{Disks: map[string]DiskChange{"vda": c}} }
	for name, test := range map[string]struct {
		xml string
		c   Changes
	}{
		"dropped disk":    {uefi, vda(DiskChange{Drop: true})},
		"relative path":   {uefi, vda(DiskChange{Path: "web.img", Type: "file"})},
		"unclean path":    {uefi, vda(DiskChange{Path: "/data/../etc/shadow", Type: "file"})},
		"no path":         {uefi, vda(DiskChange{Type: "file"})},
		"control":         {uefi, vda(DiskChange{Path: "/data/a\x01", Type: "file"})},
		"no UTF-8":        {uefi, vda(DiskChange{Path: "/data/a\xff", Type: "file"})},
		"network disk":    {uefi, vda(DiskChange{Path: "/data/a", Type: "network"})},
		"no network name": {uefi, Changes{Networks: map[string]string{"default": ""}}},
		"no XML":          {"<domain", Changes{}},
		"two sources":     {fmt.Sprintf(small, `<disk><source file="/a"/><source file="/b"/><target dev="vda"/></disk>`), vda(DiskChange{Path: "/c", Type: "file"})},
		"target twice":    {fmt.Sprintf(small, `<disk><source file="/a"/><target dev="vda"/></disk><disk><source file="/b"/><target dev="vda"/></disk>`), vda(DiskChange{Path: "/c", Type: "file"})},
	} {
		if got, err := Rewrite(test.xml, test.c); err == nil {
			t.Errorf("%s is no error:\n%s", name, got)
		}
	}
}

func TestRewriteEveryPrefixFails(t *testing.T) {
	doc := strings.TrimSpace(testdata(t, "chain-live.xml"))
	for i := range len(doc) {
		if _, err := Rewrite(doc[:i], Changes{}); !errors.Is(err, ErrBadXML) {
			t.Fatalf("the first %d bytes: %v", i, err)
		}
	}
}

func FuzzRewrite(f *testing.F) {
	for _, name := range []string{"uefi.xml", "chain-live.xml"} {
		f.Add(testdata(f, name), "vda", "/data/x", "default", "dmz")
	}
	f.Add(fmt.Sprintf(small, `<disk><source file="/a"/><target dev="vda"/></disk>`), "vda", `/data/"<>'`, "", "&")
	f.Fuzz(func(t *testing.T, doc, target, path, from, to string) {
		c := Changes{Disks: map[string]DiskChange{target: {Path: path, Type: "file"}}, Networks: map[string]string{from: to}}
		out, err := Rewrite(doc, c)
		if err != nil {
			return
		}
		before, berr := readDomain(doc)
		after, err := readDomain(out)
		if berr != nil {
			return // never offered to libvirt
		}
		if err != nil {
			t.Fatalf("unreadable now: %v\n%s", err, out)
		}
		if after.Name != before.Name || after.UUID != before.UUID || len(after.Disks) != len(before.Disks) || len(after.Networks) != len(before.Networks) {
			t.Fatalf("before %+v\nafter %+v", before, after)
		}
		for i, d := range after.Disks {
			want := before.Disks[i].Path
			if d.Target == target {
				want = path
			}
			if d.Path != want {
				t.Errorf("disk %s is %q, want %q", d.Target, d.Path, want)
			}
		}
	})
}
