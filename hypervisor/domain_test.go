package hypervisor

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
)

func testdata(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestReadDomain(t *testing.T) {
	dom, err := readDomain(testdata(t, "uefi.xml"))
	if err != nil {
		t.Fatal(err)
	}
	dom.XML = ""
	want := &Domain{
		Name: "web-1", UUID: "7c5f0d0e-1d2c-4f6e-9a53-0b6a4a8e7a11",
		CPU:         dom.CPU,
		MemoryBytes: 2 << 30, VirtType: "qemu", Arch: "x86_64", Machine: "pc-q35-7.2",
		Emulator: "/usr/bin/qemu-system-x86_64",
		Loader:   "/usr/share/OVMF/OVMF_CODE_4M.fd",
		NVRAM:    "/var/lib/libvirt/qemu/nvram/web-1_VARS.fd",
		Disks: []Disk{
			{Target: "vda", Bus: "virtio", Device: "disk", Type: "file", Format: "qcow2", Path: "/srv/images/web-1.qcow2"},
			{Target: "vdb", Bus: "virtio", Device: "disk", Type: "volume", Format: "raw"},
			{Target: "sda", Bus: "scsi", Device: "disk", Type: "block", Format: "raw", Path: "/dev/vg0/web-1-data"},
			{Target: "sdb", Bus: "sata", Device: "cdrom", Type: "file", Format: "raw", Path: "/srv/iso/debian-12.iso", ReadOnly: true},
			{Target: "sdc", Bus: "sata", Device: "cdrom", Type: "file", Format: "raw", ReadOnly: true},
		},
		Networks: []NIC{
			{MAC: "52:54:00:00:00:01", Kind: "network", Source: "default", Model: "virtio"},
			{MAC: "52:54:00:00:00:02", Kind: "bridge", Source: "br-dmz", Bridge: "br-dmz", Model: "virtio"},
			{MAC: "52:54:00:00:00:03", Kind: "direct", Source: "eno2", Model: "virtio"},
			{MAC: "52:54:00:00:00:04", Kind: "user", Model: "virtio"},
		},
	}
	if !reflect.DeepEqual(dom, want) {
		t.Errorf("got  %+v\nwant %+v", dom, want)
	}
	if !strings.HasPrefix(dom.CPU, "<cpu ") || !strings.Contains(dom.CPU, "Nehalem") {
		t.Errorf("CPU %q", dom.CPU)
	}
}

func TestReadLiveDomain(t *testing.T) {
	dom, err := readDomain(testdata(t, "chain-live.xml"))
	if err != nil {
		t.Fatal(err)
	}
	vdb := dom.Disks[1]
	if vdb.Alias != "virtio-disk1" || vdb.Export != "drive-virtio-disk1" || !vdb.HasBacking || vdb.Path != "/srv/images/db.qcow2" {
		t.Errorf("vdb: %+v", vdb)
	}
	if vda := dom.Disks[0]; vda.HasBacking {
		t.Errorf("vda: %+v", vda)
	}
}

const small = `<domain type="kvm"><name>a</name><uuid>7c5f0d0e-1d2c-4f6e-9a53-0b6a4a8e7a11</uuid><memory unit="MiB">1</memory><devices>%s</devices></domain>`

func TestHostileXML(t *testing.T) {
	good := fmt.Sprintf(small, "")
	if _, err := readDomain(good); err != nil {
		t.Fatal(err)
	}
	for name, doc := range map[string]string{
		"empty":             "",
		"no XML":            "virsh: command not found",
		"other root":        "<network/>",
		"root in namespace": `<x:domain xmlns:x="y"><name>a</name></x:domain>`,
		"two roots":         good + good,
		"unclosed":          strings.TrimSuffix(good, "</domain>"),
		"entity":            `<!DOCTYPE domain [<!ENTITY a "aaaa">]>` + good,
		"unknown entity":    strings.Replace(good, "<name>a", "<name>&a;", 1),
		"encoding":          `<?xml version="1.0" encoding="utf-7"?>` + good,
		"deep":              fmt.Sprintf(small, strings.Repeat("<a>", 100)+strings.Repeat("</a>", 100)),
		"many elements":     fmt.Sprintf(small, strings.Repeat("<a/>", maxElements)),
		"long":              fmt.Sprintf(small, strings.Repeat(" ", maxXML)),
		"no name":           strings.Replace(good, "<name>a</name>", "<x:name>a</x:name>", 1),
		"no UUID":           strings.Replace(good, "7c5f0d0e", "", 1),
		"no memory":         strings.Replace(good, "memory", "memories", 2),
		"negative memory":   strings.Replace(good, ">1<", ">-1<", 1),
		"endless memory":    strings.Replace(good, ">1<", ">99999999999999999<", 1),
		"memory unit":       strings.Replace(good, "MiB", "MiBs", 1),
		"same target":       fmt.Sprintf(small, `<disk><target dev="vda"/></disk><disk><target dev="vda"/></disk>`),
		"no target":         fmt.Sprintf(small, `<disk/>`),
		"relative path":     fmt.Sprintf(small, `<disk><source file="json:{}"/><target dev="vda"/></disk>`),
	} {
		t.Run(name, func(t *testing.T) {
			if dom, err := readDomain(doc); !errors.Is(err, ErrBadXML) {
				t.Errorf("got %+v, %v; want ErrBadXML", dom, err)
			}
		})
	}
}

func TestEveryPrefixFails(t *testing.T) {
	doc := strings.TrimSpace(testdata(t, "chain-live.xml"))
	for i := range len(doc) {
		if _, err := readDomain(doc[:i]); !errors.Is(err, ErrBadXML) {
			t.Fatalf("the first %d bytes: %v", i, err)
		}
	}
}

func TestNamespacesAreNotLibvirts(t *testing.T) {
	dom, err := readDomain(fmt.Sprintf(small, `<x:disk xmlns:x="y"><target dev="vdx"/></x:disk><disk x:type="block" xmlns:x="y"><source file="/a"/><target x:dev="vdz" dev="vda"/></disk>`))
	if err != nil {
		t.Fatal(err)
	}
	if len(dom.Disks) != 1 || dom.Disks[0].Target != "vda" || dom.Disks[0].Type != "file" {
		t.Errorf("disks %+v", dom.Disks)
	}
}

func TestImages(t *testing.T) {
	out := testdata(t, "qemu-img-chain.json")
	d := Disk{Type: "file", Format: "qcow2", Path: "/srv/images/db.qcow2", VirtualSize: 32 << 20}
	if err := d.readImages([]byte(out)); err != nil {
		t.Fatal(err)
	}
	if d.ClusterSize != 128<<10 || !d.HasBacking || d.Allocated != 1581056+1314816 || d.Encrypted || d.Snapshots != 0 {
		t.Errorf("%+v", d)
	}
	block := Disk{Type: "block", Format: "raw", VirtualSize: 1 << 30}
	if err := block.readImages([]byte(`[{"virtual-size": 1073741824, "actual-size": 0}]`)); err != nil || block.Allocated != 1<<30 {
		t.Errorf("%+v, %v", block, err)
	}
	out = strings.TrimSpace(out)
	for i := range len(out) {
		d := d
		if err := d.readImages([]byte(out[:i])); err == nil {
			t.Fatalf("the first %d bytes are no error", i)
		}
	}
	for _, bad := range []string{`[]`, `{}`, `[{"actual-size": -1}]`, `[{"actual-size": 1e30}]`} {
		if err := d.readImages([]byte(bad)); err == nil {
			t.Errorf("%s is no error", bad)
		}
	}
}

func TestQEMUUser(t *testing.T) {
	caps := testdata(t, "capabilities.xml")
	if uid, gid, err := qemuUser(caps); err != nil || uid != 0 || gid != 0 {
		t.Errorf("got %d, %d, %v", uid, gid, err)
	}
	if uid, gid, err := qemuUser(strings.ReplaceAll(caps, "+0:+0", "+64055:+994")); err != nil || uid != 64055 || gid != 994 {
		t.Errorf("got %d, %d, %v", uid, gid, err)
	}
	for _, bad := range []string{"", "+0", "root:root", "+-1:+0", "+99999999999:+0"} {
		if _, _, err := qemuUser(strings.ReplaceAll(caps, "+0:+0", bad)); !errors.Is(err, ErrBadXML) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzReadDomain(f *testing.F) {
	for _, name := range []string{"uefi.xml", "chain-live.xml", "chain-migratable.xml"} {
		f.Add(testdata(f, name))
	}
	f.Add(fmt.Sprintf(small, ""))
	f.Fuzz(func(t *testing.T, doc string) {
		dom, err := readDomain(doc)
		if err != nil {
			return
		}
		if _, ok := parseUUID(dom.UUID); !ok || dom.Name == "" {
			t.Errorf("accepted without name or UUID: %+v", dom)
		}
	})
}
