package migrate

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wanmig/wanmig/hypervisor"
)

func testDomain() *hypervisor.Domain {
	return &hypervisor.Domain{Name: "web server", NVRAM: "/var/lib/libvirt/qemu/nvram/web_VARS.fd",
		Disks: []hypervisor.Disk{
			{Target: "vda", Export: "drive-virtio-disk0", Device: "disk", Type: "file", Format: "qcow2", Path: "/images/fast/web.qcow2", VirtualSize: 1 << 30},
			{Target: "vdb", Export: "drive-virtio-disk1", Device: "disk", Type: "block", Format: "raw", Path: "/dev/vg/data", VirtualSize: 1 << 20},
			{Target: "sda", Export: "drive-sata0-0-0", Device: "cdrom", Type: "file", Format: "raw", Path: "/iso/debian.iso", ReadOnly: true, VirtualSize: 2048},
			{Target: "sdb", Device: "cdrom", Type: "file"},
		},
		Networks: []hypervisor.NIC{{Source: "br0"}}}
}

func TestPlanMapsDisks(t *testing.T) {
	p, err := makePlan(testDomain(), Request{Storage: map[string]string{"/images": "/srv", "/images/fast": "/ssd", "vdb": "/dev/vg0/data"}})
	if err == nil {
		t.Fatal("/images is shadowed by /images/fast and fits no disk, and that is no error")
	}
	p, err = makePlan(testDomain(), Request{Storage: map[string]string{"/images/": "/srv", "vdb": "/dev/vg0/data"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.disks) != 2 || p.disks[0].Path != "/srv/fast/web.qcow2" || p.disks[1].Path != "/dev/vg0/data" || !p.disks[1].Block {
		t.Errorf("disks are %+v", p.disks)
	}
	if len(p.mirrored()) != 2 || !p.changes.Disks["sda"].Drop {
		t.Errorf("the CD-ROM is not dropped: %+v", p.changes.Disks)
	}
	if len(p.findings) != 1 || p.findings[0].Fatal || !strings.Contains(p.findings[0].Remedy, "--copy-cdrom") {
		t.Errorf("findings are %+v", p.findings)
	}
	if strings.Join(p.remove, " ") != "/images/fast/web.qcow2 /var/lib/libvirt/qemu/nvram/web_VARS.fd" {
		t.Errorf("would remove %v", p.remove)
	}
}

func TestPlanCarriesCDROM(t *testing.T) {
	dom := testDomain()
	dom.Disks[2].Path = filepath.Join(t.TempDir(), "debian.iso")
	if _, err := makePlan(dom, Request{CopyCDROM: true}); err == nil {
		t.Error("a CD-ROM that is not there can be carried")
	}
	if err := os.WriteFile(dom.Disks[2].Path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := makePlan(dom, Request{CopyCDROM: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.disks) != 3 || !p.disks[2].Static || len(p.mirrored()) != 2 || p.source["sda"] != dom.Disks[2].Path || p.disks[2].Size != 4096 {
		t.Errorf("plan is %+v", p)
	}
	if err := validateDisks(p.disks); err != nil {
		t.Error(err)
	}
}

func TestPlanRefusesMappingsThatFitNothing(t *testing.T) {
	for want, req := range map[string]Request{
		"--storage vdz=/x fits no disk":        {Storage: map[string]string{"vdz": "/x"}},
		"must begin with /":                    {Storage: map[string]string{"vda": "x"}},
		"--network br9=br0 fits no interface":  {Networks: map[string]string{"br9": "br0"}},
		"it is on br0":                         {Networks: map[string]string{"lan": "br0"}},
		"it has vda (/images/fast/web.qcow2),": {Storage: map[string]string{"/other": "/x"}},
	} {
		if _, err := makePlan(testDomain(), req); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want ...%s...", err, want)
		}
	}
}
