package lab

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseDisk(t *testing.T) {
	for text, want := range map[string]DiskOptions{
		"1GiB":                         {Size: 1 << 30, Format: "qcow2", Bus: "virtio"},
		"16MiB,format=raw":             {Size: 16 << 20, Format: "raw", Bus: "virtio"},
		"1GiB,bus=scsi,backing=yes":    {Size: 1 << 30, Format: "qcow2", Bus: "scsi", Backing: true},
		"1GiB,format=qcow2,backing=no": {Size: 1 << 30, Format: "qcow2", Bus: "virtio"},
		"/dev/loop3":                   {Device: "/dev/loop3", Format: "raw", Bus: "virtio"},
		"/dev/loop3,bus=sata":          {Device: "/dev/loop3", Format: "raw", Bus: "sata"},
	} {
		if got, err := ParseDisk(text, "qcow2"); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", ",", "1GiB,format=vmdk", "1GiB,bus=ide", "1GiB,backing", "1GiB,backing=maybe", "1GiB,colour=red", "1MiB", "2000GiB",
		"100000001B", "/dev/loop3,format=qcow2", "1GiB,format=raw,backing=yes"} {
		if got, err := ParseDisk(text, "qcow2"); err == nil {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
}

func FuzzParseDisk(f *testing.F) {
	for _, seed := range []string{"1GiB,format=qcow2,bus=scsi,backing=yes", "/dev/loop3", ",,", "16MiB,=,"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDisk(s, "raw"); err == nil && d.validate() != nil {
			t.Errorf("%q was read as %+v", s, d)
		}
	})
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"web", "web server", "12", "a.b_c+d@e-f", "Käse", strings.Repeat("x", 64)} {
		if err := checkName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", " ", "a ", "-a", ".a", "a/b", "a\nb", "a,b", "a\x00", "a'b", "a\xff", strings.Repeat("x", 65)} {
		if checkName(name) == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}

func TestVMOptionsAreCompleted(t *testing.T) {
	o := VMOptions{Name: "web"}
	if err := o.complete(DataCentres); err != nil {
		t.Fatal(err)
	}
	want := VMOptions{Name: "web", Site: LocalDC, Memory: 512 << 20, VCPUs: 1, WorkingSet: 64 << 20, Accel: "auto",
		Disks: []DiskOptions{{Size: 1 << 30, Format: "raw", Bus: "virtio"}}}
	if !reflect.DeepEqual(o, want) {
		t.Errorf("%+v, want %+v", o, want)
	}
	for _, bad := range []VMOptions{
		{}, {Name: "a", Site: Users}, {Name: "a", Memory: 1}, {Name: "a", VCPUs: -1}, {Name: "a", VCPUs: 1000}, {Name: "a", Accel: "hvf"},
		{Name: "a", Dirty: -1}, {Name: "a", Disks: []DiskOptions{{}}}, {Name: "a", Disks: make([]DiskOptions, 9)},
	} {
		if err := bad.complete(DataCentres); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}

// testDomain has a name that is hostile to XML.
func testDomain() *domain {
	d := &domain{
		Name: `a<b>&'"c`, UUID: "u", Memory: 1 << 29, VCPUs: 2, Kernel: "/k", Initrd: "/i", Cmdline: "x='1'",
		NICs:   []domainNIC{{"52:54:00:00:00:01", "br0"}, {"52:54:01:00:00:01", "br1"}},
		Serial: "/log", CDROM: "/c.iso",
		Disks: []domainDisk{
			{Type: "file", Source: "/a'b", Format: "raw", Bus: "virtio"},
			{Type: "block", Source: "/dev/loop3", Format: "raw", Bus: "scsi"},
			{Type: "file", Source: "/q", Format: "qcow2", Bus: "sata"},
			{Type: "file", Source: "/w", Format: "qcow2", Bus: "virtio"},
		},
	}
	d.CDROMTarget = nameTargets(d.Disks)
	return d
}

func TestDomainXML(t *testing.T) {
	text, err := testDomain().xml()
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Type   string `xml:"type,attr"`
		Name   string `xml:"name"`
		Memory int64  `xml:"memory"`
		OS     struct {
			Cmdline string `xml:"cmdline"`
			Loader  string `xml:"loader"`
		} `xml:"os"`
		Devices struct {
			Disks []struct {
				Device string `xml:"device,attr"`
				Source struct {
					File string `xml:"file,attr"`
					Dev  string `xml:"dev,attr"`
				} `xml:"source"`
				Target struct {
					Dev string `xml:"dev,attr"`
					Bus string `xml:"bus,attr"`
				} `xml:"target"`
			} `xml:"disk"`
			Controllers []struct {
				Type string `xml:"type,attr"`
			} `xml:"controller"`
			NICs []struct {
				MAC struct {
					Address string `xml:"address,attr"`
				} `xml:"mac"`
				Source struct {
					Bridge string `xml:"bridge,attr"`
				} `xml:"source"`
			} `xml:"interface"`
		} `xml:"devices"`
	}
	if err := xml.Unmarshal(text, &got); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if got.Type != "qemu" || got.Name != `a<b>&'"c` || got.Memory != 1<<29 || got.OS.Cmdline != "x='1'" || got.OS.Loader != "" {
		t.Errorf("read %+v", got)
	}
	var disks []string
	for _, d := range got.Devices.Disks {
		disks = append(disks, strings.Join([]string{d.Device, d.Source.File + d.Source.Dev, d.Target.Dev, d.Target.Bus}, " "))
	}
	want := []string{"disk /a'b vda virtio", "disk /dev/loop3 sda scsi", "disk /q sdb sata", "disk /w vdb virtio", "cdrom /c.iso sdc sata"}
	if !slices.Equal(disks, want) {
		t.Errorf("disks %q, want %q", disks, want)
	}
	var nics []string
	for _, n := range got.Devices.NICs {
		nics = append(nics, n.MAC.Address+" "+n.Source.Bridge)
	}
	if want := []string{"52:54:00:00:00:01 br0", "52:54:01:00:00:01 br1"}; !slices.Equal(nics, want) {
		t.Errorf("interfaces %q, want %q", nics, want)
	}
	if len(got.Devices.Controllers) != 2 || got.Devices.Controllers[0].Type != "scsi" {
		t.Errorf("controllers %+v, want one for SCSI and the absence of USB", got.Devices.Controllers)
	}
}

func TestDomainXMLIsWellFormedInEveryVariant(t *testing.T) {
	for n := range 16 {
		d := testDomain()
		d.KVM, d.UEFI = n&1 != 0, n&2 != 0
		if n&4 != 0 {
			d.CDROM = ""
		}
		if n&8 != 0 {
			d.Disks = nil
		}
		text, err := d.xml()
		if err != nil {
			t.Fatal(err)
		}
		for decoder := xml.NewDecoder(strings.NewReader(string(text))); ; {
			if _, err := decoder.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
		}
		if d.UEFI != strings.Contains(string(text), "OVMF_CODE") {
			t.Errorf("UEFI is %v in\n%s", d.UEFI, text)
		}
	}
}

func TestRegisterGivesEachVMItsOwn(t *testing.T) {
	l := newLab(t.TempDir())
	if _, err := l.VM("web"); !errors.Is(err, ErrNoVM) {
		t.Errorf("before any: %v, want ErrNoVM", err)
	}
	var vms []*VM
	for _, r := range []struct{ name, site string }{{"web", LocalDC}, {"web server", LocalDC}, {"db", RemoteDC}} {
		v, err := l.register(r.name, r.site)
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, v)
	}
	for i, want := range []string{"10.10.0.10 fd00:10::10", "10.10.0.11 fd00:10::11", "10.20.0.10 fd00:20::10"} {
		if got := fmt.Sprint(vms[i].Address, " ", vms[i].Address6); got != want {
			t.Errorf("%s has %s, want %s", vms[i].Name, got, want)
		}
	}
	if vms[0].MAC == vms[1].MAC || vms[0].UUID == vms[1].UUID {
		t.Errorf("%+v and %+v share an identity", vms[0], vms[1])
	}
	again, err := l.VM("web server")
	if err != nil || !reflect.DeepEqual(again, vms[1]) {
		t.Errorf("read %+v, %v; want %+v", again, err, vms[1])
	}
	second, err := vms[1].secondNIC(l.Sites[LocalDC])
	if err != nil || fmt.Sprint(second.Address, " ", second.Address6) != "10.11.0.11 fd00:11::11" || second.MAC[:9] != "52:54:01:" || second.MAC[9:] != vms[1].MAC[9:] {
		t.Errorf("the second NIC of %+v is %+v, %v", vms[1], second, err)
	}
	if _, err := l.register("web", LocalDC); err == nil {
		t.Error("a name was given twice")
	}
	if _, err := l.VM("mail"); !errors.Is(err, ErrNoVM) || !strings.Contains(err.Error(), "there are db, web server, web") {
		t.Errorf("unknown name: %v", err)
	}
}

func TestLinkLocalFollowsFromTheMAC(t *testing.T) {
	if got, want := linkLocal([6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}), netip.MustParseAddr("fe80::5054:ff:fe12:3456"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestGapMeter(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	var m gapMeter
	for _, a := range []struct {
		site string
		ms   int
	}{{LocalDC, 0}, {LocalDC, 5}, {LocalDC, 45}, {RemoteDC, 345}, {RemoteDC, 350}} {
		m.answer(a.site, at(a.ms))
	}
	move := Gap{Length: 300 * time.Millisecond, Start: at(45), From: LocalDC, To: RemoteDC}
	if want := (ProbeResult{Answers: 5, Longest: move, Switches: []Switch{move}}); !reflect.DeepEqual(m.result, want) {
		t.Errorf("%+v, want %+v", m.result, want)
	}
	// A guest at both sites shows as more switches.
	m.answer(LocalDC, at(352))
	m.answer(RemoteDC, at(355))
	if len(m.result.Switches) != 3 {
		t.Errorf("%d switches, want 3", len(m.result.Switches))
	}
}
