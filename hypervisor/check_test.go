package hypervisor

import (
	"fmt"
	"strings"
	"testing"
)

// wantFindings compares "level check" of what was found, in any order.
func wantFindings(t *testing.T, got []Finding, want ...string) {
	t.Helper()
	left := map[string]int{}
	for _, w := range want {
		left[w]++
	}
	for _, f := range got {
		key := string(f.Level) + " " + f.Check
		if left[key] == 0 {
			t.Errorf("unexpected: %s", f)
		}
		left[key]--
	}
	for w, n := range left {
		if n > 0 {
			t.Errorf("missing: %s", w)
		}
	}
}

func TestCheckDevices(t *testing.T) {
	for name, test := range map[string]struct {
		devices string
		want    []string
	}{
		"nothing":     {`<interface type="bridge"/><tpm><backend type="emulator"/></tpm><serial type="pty"/>`, nil},
		"pci":         {`<hostdev mode="subsystem" type="pci"/>`, []string{"fatal device hostdev"}},
		"mediated":    {`<hostdev type="mdev" model="vfio-pci"/><hostdev/>`, []string{"fatal device hostdev", "fatal device hostdev"}},
		"sr-iov":      {`<interface type="hostdev"/><interface type="vdpa"/><interface type="vhostuser"/>`, []string{"fatal device interface", "fatal device interface", "fatal device interface"}},
		"9p":          {`<filesystem type="mount"/>`, []string{"fatal device filesystem"}},
		"shmem":       {`<shmem name="a"/>`, []string{"fatal device shmem"}},
		"tpm":         {`<tpm><backend type="passthrough"/></tpm>`, []string{"fatal device tpm"}},
		"serial":      {`<serial type="dev"><source path="/dev/ttyS0"/></serial>`, []string{"notice device serial"}},
		"two devices": {`</devices><devices><hostdev/>`, []string{"fatal device hostdev"}},
		"outside":     {`</devices><cpu><feature name="invtsc"/></cpu><launchSecurity type="sev"/><devices>`, []string{"fatal cpu", "fatal launch security"}},
		"command":     {`</devices><qemu:commandline xmlns:qemu="q"/><devices>`, []string{"notice command line"}},
	} {
		t.Run(name, func(t *testing.T) {
			doc, err := parseXML(fmt.Sprintf(small, test.devices), "domain")
			if err != nil {
				t.Fatal(err)
			}
			var f findings
			f.checkDevices(doc)
			wantFindings(t, f, test.want...)
		})
	}
}

func TestCheckOutgoingDisk(t *testing.T) {
	good := Disk{Target: "vda", Device: "disk", Type: "file", Format: "qcow2", Path: "/a", VirtualSize: 1 << 20}
	for name, test := range map[string]struct {
		change func(*Disk)
		want   []string
	}{
		"good":        {func(d *Disk) {}, nil},
		"raw device":  {func(d *Disk) { d.Type, d.Format = "block", "raw" }, nil},
		"volume":      {func(d *Disk) { d.Type = "volume" }, nil},
		"empty drive": {func(d *Disk) { d.Device, d.Path, d.Format, d.VirtualSize = "cdrom", "", "raw", 0 }, nil},
		"medium":      {func(d *Disk) { d.Device, d.ReadOnly = "cdrom", true }, nil},
		"read-only":   {func(d *Disk) { d.ReadOnly = true }, []string{"notice disk vda"}},
		"snapshots":   {func(d *Disk) { d.Snapshots = 2 }, []string{"notice disk vda"}},
		"chain":       {func(d *Disk) { d.HasBacking = true }, []string{"notice disk vda"}},
		"ceph":        {func(d *Disk) { d.Type, d.Path = "network", "" }, []string{"fatal disk vda"}},
		"nvme":        {func(d *Disk) { d.Type, d.Path = "nvme", "" }, []string{"fatal disk vda"}},
		"lun":         {func(d *Disk) { d.Device = "lun" }, []string{"fatal disk vda"}},
		"vmdk":        {func(d *Disk) { d.Format = "vmdk" }, []string{"fatal disk vda"}},
		"shared":      {func(d *Disk) { d.Shareable = true }, []string{"fatal disk vda"}},
		"transient":   {func(d *Disk) { d.Transient = true }, []string{"fatal disk vda"}},
		"luks":        {func(d *Disk) { d.Encrypted = true }, []string{"fatal disk vda"}},
		"data file":   {func(d *Disk) { d.ExternalData = true }, []string{"fatal disk vda"}},
		"odd size":    {func(d *Disk) { d.VirtualSize++ }, []string{"fatal disk vda"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := good
			test.change(&d)
			var f findings
			f.checkOutgoingDisk(d)
			wantFindings(t, f, test.want...)
			for _, x := range f {
				if x.Level == Fatal && x.Remedy == "" {
					t.Errorf("no remedy: %s", x)
				}
			}
		})
	}
}

func TestCheckDefinition(t *testing.T) {
	var f findings
	f.checkDefinition(&Domain{
		InactiveXML: fmt.Sprintf(small, `<disk><source file="/a"/><target dev="vda"/></disk><disk><source file="/b"/><target dev="vdb"/></disk>`),
		Disks:       []Disk{{Target: "vda", Path: "/a"}},
	})
	wantFindings(t, f, "notice disk vdb")
}

func TestMemAvailable(t *testing.T) {
	if n, err := memAvailable("MemTotal:       24684084 kB\nMemAvailable:   23989148 kB\n"); err != nil || n != 23989148<<10 {
		t.Error(n, err)
	}
	for _, bad := range []string{"", "MemAvailable:", "MemAvailable: -1 kB", "MemAvailable: " + strings.Repeat("9", 20) + " kB"} {
		if n, err := memAvailable(bad); err == nil {
			t.Errorf("%q is %d", bad, n)
		}
	}
}
