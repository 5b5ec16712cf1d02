//go:build lab

package hypervisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func incoming(t *testing.T, src, dst *site, dom *Domain) IncomingSpec {
	t.Helper()
	info, err := src.host.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.Name != "amsterdam" || info.LibvirtVersion == "0.0.0" || info.QEMUVersion == "0.0.0" || info.Arch != "x86_64" {
		t.Errorf("host: %+v", info)
	}
	s := IncomingSpec{SourceHost: info.UUID, CPU: dom.CPU}
	changes := Changes{Disks: map[string]DiskChange{"hdc": {Drop: true}}}
	for _, d := range dom.Disks[:2] {
		path := filepath.Join(dst.dir, "disks", filepath.Base(d.Path))
		changes.Disks[d.Target] = DiskChange{Path: path, Type: "file"}
		s.Disks = append(s.Disks, IncomingDisk{Target: d.Target, Allocated: d.Allocated,
			DiskSpec: DiskSpec{Path: path, Type: "file", Format: d.Format, VirtualSize: d.VirtualSize, ClusterSize: d.ClusterSize}})
	}
	if s.XML, err = Rewrite(dom.XML, changes); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCheckIncoming(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", true)
	good := incoming(t, src, dst, dom)
	info, err := dst.host.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dst.dir, "taken"), "")
	other := filepath.Join(dst.dir, "other.xml")
	write(t, other, `<domain type="qemu"><name>other</name><memory>65536</memory><os><type>hvm</type></os></domain>`)
	dst.virsh(t, "define", other)
	write(t, other, `<network><name>asleep</name></network>`)
	dst.virsh(t, "net-define", other)
	swap := func(old, now string) func(*IncomingSpec) {
		return func(s *IncomingSpec) {
			if !strings.Contains(s.XML, old) {
				t.Errorf("the document has no %s", old)
			}
			s.XML = strings.Replace(s.XML, old, now, 1)
		}
	}
	device := func(xml string) func(*IncomingSpec) { return swap("<devices>", "<devices>"+xml) }
	for name, test := range map[string]struct {
		change func(*IncomingSpec)
		want   []string
	}{
		"good":      {func(s *IncomingSpec) {}, nil},
		"same host": {func(s *IncomingSpec) { s.SourceHost = info.UUID }, []string{"fatal host"}},
		"no XML":    {func(s *IncomingSpec) { s.XML = s.XML[:100] }, []string{"fatal document"}},
		"name":      {swap("<name>guest", "<name>other"), []string{"fatal name"}},
		"uuid":      {swap(dom.UUID, dst.virsh(t, "domuuid", "other")), []string{"fatal uuid"}},
		"emulator":  {swap("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-pdp11"), []string{"fatal emulator"}},
		"machine":   {swap("pc-i440fx-7.2", "pc-i440fx-99.1"), []string{"fatal machine"}},
		"virt type": {swap(`type="qemu"`, `type="xen"`), []string{"fatal machine"}},
		"cpu":       {func(s *IncomingSpec) { s.CPU = `<cpu><model>Skylake-Server</model></cpu>` }, []string{"fatal cpu"}},
		"feature": {func(s *IncomingSpec) {
			s.CPU = strings.Replace(s.CPU, "</cpu>", `<feature policy="require" name="avx512f"/></cpu>`, 1)
		}, []string{"fatal cpu"}},
		"cpu name":  {func(s *IncomingSpec) { s.CPU = `<cpu><model>Z80</model></cpu>` }, []string{"fatal cpu"}},
		"bad cpu":   {func(s *IncomingSpec) { s.CPU = `<cpu>` }, []string{"fatal document"}},
		"host cpu":  {func(s *IncomingSpec) { s.CPU = `<cpu mode="host-passthrough"/>` }, nil},
		"memory":    {swap(`<memory unit="KiB">65536`, `<memory unit="TiB">64`), []string{"fatal memory"}},
		"hugepages": {swap("<vcpu", "<memoryBacking><hugepages/></memoryBacking><vcpu"), []string{"notice memory"}},
		"kernel":    {swap(`<boot dev="hd"/>`, "<kernel>/no/vmlinuz</kernel><initrd>/no/initrd</initrd><dtb>/no/dtb</dtb>"), []string{"fatal kernel", "fatal initrd", "fatal dtb"}},
		"uefi":      {swap(`<boot dev="hd"/>`, "<loader>/no/code</loader><nvram template='/no/vars'>/no/guest</nvram>"), []string{"fatal loader", "fatal nvram template"}},
		"nvram":     {swap(`<boot dev="hd"/>`, "<nvram>"+dst.dir+"/taken</nvram>"), []string{"notice nvram"}},
		"tpm":       {device(`<tpm><backend type="emulator"/></tpm>`), []string{"fatal tpm"}},
		"networks": {device(`<interface type="network"><source network="none"/></interface><interface type="network"><source network="asleep"/></interface><interface type="bridge"><source bridge="br-none"/></interface><interface type="bridge"><source bridge="lo"/></interface><interface type="user"/>`),
			[]string{"fatal network none", "fatal network asleep", "fatal network br-none"}},
		"left out":   {func(s *IncomingSpec) { s.Disks = s.Disks[:1] }, []string{"fatal disk vdb"}},
		"too much":   {func(s *IncomingSpec) { s.Disks[0].Target = "vdx" }, []string{"fatal disk vda", "fatal disk vdx"}},
		"other path": {func(s *IncomingSpec) { s.Disks[0].Path += "x" }, []string{"fatal disk vda"}},
		"same path":  {func(s *IncomingSpec) { s.Disks[0].Path = s.Disks[1].Path }, []string{"fatal disk vda", "fatal disk vdb"}},
		"format":     {func(s *IncomingSpec) { s.Disks[0].Format = "vmdk" }, []string{"fatal disk vda", "fatal disk vda"}},
		"no folder": {func(s *IncomingSpec) {
			p := s.Disks[0].Path
			s.Disks[0].Path = "/no/folder/disk"
			s.XML = strings.Replace(s.XML, p, s.Disks[0].Path, 1)
		}, []string{"fatal disk vda"}},
		"taken": {func(s *IncomingSpec) {
			p := s.Disks[0].Path
			s.Disks[0].Path = filepath.Join(dst.dir, "taken")
			s.XML = strings.Replace(s.XML, p, s.Disks[0].Path, 1)
		}, []string{"fatal disk vda"}},
		"space":    {func(s *IncomingSpec) { s.Disks[1].Allocated = 1 << 59 }, []string{"fatal space"}},
		"negative": {func(s *IncomingSpec) { s.Disks[1].Allocated = -1 }, []string{"fatal disk vdb"}},
		"medium":   {device(`<disk device="cdrom"><source file="/no/cd.iso"/><target dev="hdd"/></disk>`), []string{"fatal disk hdd"}},
		"ceph":     {device(`<disk type="network"><source protocol="rbd" name="a"/><target dev="vdz"/></disk>`), []string{"fatal disk vdz"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := good
			s.Disks = append([]IncomingDisk(nil), good.Disks...)
			test.change(&s)
			found, err := dst.host.CheckIncoming(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range found {
				t.Log(f)
			}
			wantFindings(t, found, test.want...)
		})
	}
}

// A volume of a storage pool is known by its path, running or not.
func TestVolume(t *testing.T) {
	src := newSite(t, "amsterdam")
	disks := filepath.Join(src.dir, "disks")
	src.virsh(t, "pool-create-as", "local", "dir", "--target", disks)
	src.virsh(t, "vol-create-as", "local", "vol.qcow2", "24M", "--format", "qcow2")
	xml := filepath.Join(src.dir, "vol.xml")
	write(t, xml, `<domain type="qemu"><name>vol</name><memory>65536</memory><os><type machine="pc">hvm</type></os><devices>
		<disk type="volume"><driver type="qcow2"/><source pool="local" volume="vol.qcow2"/><target dev="vda"/></disk></devices></domain>`)
	src.virsh(t, "define", xml)
	for _, state := range []State{ShutOff, Running} {
		if state == Running {
			src.virsh(t, "start", "vol")
		}
		dom, err := src.host.Domain(t.Context(), "vol")
		if err != nil {
			t.Fatal(err)
		}
		d := dom.Disks[0]
		if dom.State != state || d.Type != "volume" || d.Path != filepath.Join(disks, "vol.qcow2") || d.VirtualSize != 24<<20 || d.ClusterSize != 64<<10 || d.Allocated == 0 {
			t.Errorf("%s: %+v", dom.State, d)
		}
		if (d.Export != "") != (state == Running) {
			t.Errorf("%s: exported as %q", dom.State, d.Export)
		}
	}
}

func TestCheckOutgoing(t *testing.T) {
	src := newSite(t, "amsterdam")
	dom := newGuest(t, src, "guest", true)
	check := func(want ...string) {
		t.Helper()
		dom, err := src.host.Domain(t.Context(), "guest")
		if err != nil {
			t.Fatal(err)
		}
		found, err := src.host.CheckOutgoing(t.Context(), dom)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			t.Log(f)
		}
		wantFindings(t, found, append(want, "notice disk vdb")...)
	}
	check()
	out, err := src.host.BeginOut(t.Context(), dom, OutOptions{DestXML: dom.XML, Disks: []string{"vda", "vdb"}})
	if err != nil {
		t.Fatal(err)
	}
	check("fatal job")
	if err := out.Confirm(t.Context(), nil, true); err != nil {
		t.Fatal(err)
	}
	out.Close()
	check()
	src.virsh(t, "blockcopy", "guest", "vda", filepath.Join(src.dir, "disks/copy"), "--transient-job", "--format", "raw")
	check("fatal disk vda")
	src.virsh(t, "blockjob", "guest", "vda", "--abort")
	src.virsh(t, "snapshot-create-as", "guest", "s1", "--disk-only", "--diskspec", "vda,snapshot=no", "--no-metadata")
	check()
	src.virsh(t, "snapshot-create-as", "guest", "s2", "--disk-only", "--diskspec", "vda,snapshot=no")
	check("fatal snapshots")
	src.virsh(t, "snapshot-delete", "guest", "s2", "--metadata")
	check()
	if err := src.host.Destroy(t.Context(), dom.UUID); err != nil {
		t.Fatal(err)
	}
	check("fatal state")
}

// A loop device of the right size is taken, one in use is not.
func TestBlockDevice(t *testing.T) {
	dst := newSite(t, "boston")
	file := filepath.Join(dst.dir, "disks/loop")
	write(t, file, "")
	if err := os.Truncate(file, 8<<20); err != nil {
		t.Fatal(err)
	}
	dev := attachLoop(t, file)
	spec := DiskSpec{Path: dev, Type: "block", Format: "raw", VirtualSize: 8 << 20}
	if err := dst.host.CreateDisk(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{8<<20 - 512, 8<<20 + 512} {
		wrong := spec
		wrong.VirtualSize = size
		if err := dst.host.CreateDisk(t.Context(), wrong); err == nil {
			t.Errorf("%d bytes fit into a device of %d", size, 8<<20)
		}
	}
	xml := filepath.Join(dst.dir, "user.xml")
	write(t, xml, `<domain type="qemu"><name>user</name><memory>65536</memory><os><type>hvm</type></os><devices><disk type="block"><source dev="`+dev+`"/><target dev="vda"/></disk></devices></domain>`)
	dst.virsh(t, "define", xml)
	alias := filepath.Join(dst.dir, "alias")
	tool(t, "mknod", alias, "b", "7", strings.TrimPrefix(dev, "/dev/loop"))
	for _, spec.Path = range []string{dev, alias} {
		if err := dst.host.CreateDisk(t.Context(), spec); err == nil || !strings.Contains(err.Error(), `"user"`) {
			t.Errorf("%s, a device that a domain uses: %v", spec.Path, err)
		}
	}
	if err := dst.host.RemoveDisk(t.Context(), dev); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dev); err != nil {
		t.Error(err)
	}
}
