//go:build lab

package hypervisor

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const guestXML = `<domain type='qemu'>
  <name>NAME</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='DIR/NAME.raw'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='DIR/NAME.qcow2'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='DIR/NAME.iso'/>
      <target dev='hdc' bus='ide'/>
      <readonly/>
    </disk>
    <memballoon model='none'/>
  </devices>
</domain>`

const raw = 16 << 20

// newGuest starts a guest that only runs its BIOS: enough for its disks, memory
// and devices to move.
func newGuest(t *testing.T, s *site, name string, persistent bool) *Domain {
	t.Helper()
	dir := filepath.Join(s.dir, "disks")
	content := make([]byte, raw)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(content[:raw/2])
	write(t, filepath.Join(dir, name+".raw"), string(content))
	write(t, filepath.Join(dir, name+".iso"), strings.Repeat("cd", 1<<16))
	base, top := filepath.Join(dir, name+".base"), filepath.Join(dir, name+".qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "32M")
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", base)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "-o", "cluster_size=128k", top)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 9 512k 1M", top)
	file := filepath.Join(dir, name+".xml")
	xml := strings.NewReplacer("NAME", name, "DIR", dir).Replace(guestXML)
	if name == "uefi" {
		xml = strings.Replace(xml, "</os>", "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/></os><features><acpi/></features>", 1)
		xml = strings.Replace(xml, "pc-i440fx-7.2", "pc-q35-7.2", 1)
		xml = strings.Replace(xml, "dev='hdc' bus='ide'", "dev='sda' bus='sata'", 1)
	}
	write(t, file, xml)
	if persistent {
		s.virsh(t, "define", file)
		s.virsh(t, "start", name)
	} else {
		s.virsh(t, "create", file)
	}
	dom, err := s.host.Domain(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return dom
}

// flight is a move between two sites, as far as it came.
type flight struct {
	src, dst  *site
	dom       *Domain
	out       *Outgoing
	in        *Incoming
	ram, nbd  *relay
	sram, snb string
	disks     []string
	device    string
}

// manner is how a test moves its guest.
type manner struct {
	persist, paused bool
	device          string // where vda goes, instead of a file
}

// prepare does everything up to Perform.
func prepare(t *testing.T, src, dst *site, dom *Domain, m manner) *flight {
	t.Helper()
	ctx := t.Context()
	f := &flight{src: src, dst: dst, dom: dom, disks: []string{"vda", "vdb"}, device: m.device}
	changes := Changes{Disks: map[string]DiskChange{"hdc": {Drop: true}, "sda": {Drop: true}}}
	for _, d := range dom.Disks {
		if d.Device != "disk" {
			continue
		}
		path := filepath.Join(dst.dir, "disks", filepath.Base(d.Path))
		kind := "file"
		if d.Target == "vda" && m.device != "" {
			path, kind = m.device, "block"
		}
		changes.Disks[d.Target] = DiskChange{Path: path, Type: kind}
		err := dst.host.CreateDisk(ctx, DiskSpec{Path: path, Type: kind, Format: d.Format, VirtualSize: d.VirtualSize, ClusterSize: d.ClusterSize})
		if err != nil {
			t.Fatal(err)
		}
	}
	destXML, err := Rewrite(dom.XML, changes)
	if err != nil {
		t.Fatal(err)
	}
	var persistXML string
	if m.persist {
		if persistXML, err = Rewrite(dom.InactiveXML, changes); err != nil {
			t.Fatal(err)
		}
	}
	if m.persist {
		if err := src.host.Undefine(ctx, dom.UUID, false); err != nil {
			t.Fatal(err)
		}
	}
	f.out, err = src.host.BeginOut(ctx, dom, OutOptions{DestXML: destXML, PersistXML: persistXML, Disks: f.disks, Persist: m.persist, Paused: m.paused})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.out.Close() })
	dram, dnbd, err := dst.host.DestinationSockets(ctx, "m1", dom.Name)
	if err != nil {
		t.Fatal(err)
	}
	f.in, err = dst.host.PrepareIn(ctx, InOptions{Name: dom.Name, XML: f.out.XML, PersistXML: persistXML, Cookie: f.out.Cookie,
		RAMSocket: dram, NBDSocket: dnbd, Disks: f.disks, Persist: m.persist, Paused: m.paused})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.in.Close() })
	f.sram, f.snb, err = src.host.SourceSockets(ctx, "m1", dom.Name)
	if err != nil {
		t.Fatal(err)
	}
	f.ram = newRelay(t, listen(t, src, f.sram), dram)
	f.nbd = newRelay(t, listen(t, src, f.snb), dnbd)
	return f
}

func listen(t *testing.T, s *site, path string) net.Listener {
	t.Helper()
	l, err := s.host.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (f *flight) perform(t *testing.T) []byte {
	t.Helper()
	cookie, err := f.out.Perform(within(t, time.Minute), f.in.Cookie, f.sram, f.snb)
	if err != nil {
		t.Fatal(err)
	}
	return cookie
}

func wantState(t *testing.T, s *site, name string, want State) {
	t.Helper()
	got, err := s.host.State(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("%s is %s, want %s", name, got, want)
	}
}

func wantGone(t *testing.T, s *site, name string) {
	t.Helper()
	if got, err := s.host.State(t.Context(), name); !errors.Is(err, ErrNoDomain) {
		t.Errorf("%s is %s, %v; want it gone", name, got, err)
	}
}

// wantDisks compares what the guest's disks hold on both sites.
func (f *flight) wantDisks(t *testing.T) {
	t.Helper()
	for _, d := range f.dom.Disks {
		if d.Device != "disk" {
			continue
		}
		to := filepath.Join(f.dst.dir, "disks", filepath.Base(d.Path))
		if d.Target == "vda" && f.device != "" {
			to = f.device
		}
		tool(t, "qemu-img", "compare", "-U", "-f", d.Format, "-F", d.Format, d.Path, to)
		out, err := exec.Command("qemu-img", "info", "-U", "-f", d.Format, to).Output()
		if err != nil || bytes.Contains(out, []byte("backing")) {
			t.Errorf("disk %s at the destination is not flat: %v\n%s", d.Target, err, out)
		}
	}
}
