package lab

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
	"text/template"
)

// domain is what a VM's XML is made from; paths are those inside the site.
type domain struct {
	Name        string
	UUID        string
	Memory      int64 // bytes
	VCPUs       int
	KVM         bool
	UEFI        bool
	Kernel      string
	Initrd      string
	Cmdline     string
	NICs        []domainNIC
	Serial      string // log file
	CDROM       string // image, or empty
	CDROMTarget string
	Disks       []domainDisk
	GuestAgent  bool
}

type domainNIC struct {
	MAC    string
	Bridge string
}

type domainDisk struct {
	Type   string // file or block
	Source string
	Format string
	Bus    string
	Target string
}

// nameTargets names the disks as the guest's kernel will, by their order on each bus, and returns the next name for SATA.
func nameTargets(disks []domainDisk) (next string) {
	count := make(map[string]int)
	for i := range disks {
		prefix := "sd"
		if disks[i].Bus == "virtio" {
			prefix = "vd"
		}
		disks[i].Target = prefix + string(rune('a'+count[prefix]))
		count[prefix]++
	}
	return "sd" + string(rune('a'+count["sd"]))
}

// domainXML has nothing that only one host has, so that the domain can go anywhere. TCG gets a named CPU model, since
// libvirt cannot compare what TCG emulates between hosts. Without HPET the guest's kernel takes the interrupts of the
// real-time clock as they come, by which the guest measures its stops; with it, they are rounded to 1/64 s. A guest that
// panics reboots, and with that ends.
var domainXML = template.Must(template.New("domain").Funcs(template.FuncMap{"x": escape}).Parse(
	`<domain type='{{if .KVM}}kvm{{else}}qemu{{end}}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{{x .Name}}</name>
  <uuid>{{.UUID}}</uuid>
  <memory unit='b'>{{.Memory}}</memory>
  <vcpu>{{.VCPUs}}</vcpu>
  <os>
    <type arch='x86_64' machine='{{if .UEFI}}q35{{else}}pc{{end}}'>hvm</type>
{{- if .UEFI}}
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>
{{- end}}
    <kernel>{{x .Kernel}}</kernel>
    <initrd>{{x .Initrd}}</initrd>
    <cmdline>{{x .Cmdline}}</cmdline>
  </os>
  <features><acpi/><apic/></features>
{{- if .KVM}}
  <cpu mode='host-model'/>
{{- else}}
  <cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>
{{- end}}
  <clock offset='utc'><timer name='hpet' present='no'/></clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{{- range .Disks}}
    <disk type='{{.Type}}' device='disk'>
      <driver name='qemu' type='{{.Format}}' discard='unmap'/>
      <source {{if eq .Type "block"}}dev{{else}}file{{end}}='{{x .Source}}'/>
      <target dev='{{.Target}}' bus='{{.Bus}}'/>
    </disk>
{{- end}}
{{- if .CDROM}}
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='{{x .CDROM}}'/>
      <target dev='{{.CDROMTarget}}' bus='sata'/>
      <readonly/>
    </disk>
{{- end}}
{{- if .SCSI}}
    <controller type='scsi' model='virtio-scsi'/>
{{- end}}
    <controller type='usb' model='none'/>
{{- range .NICs}}
    <interface type='bridge'>
      <mac address='{{.MAC}}'/>
      <source bridge='{{x .Bridge}}'/>
      <model type='virtio'/>
    </interface>
{{- end}}
    <serial type='pty'><log file='{{x .Serial}}' append='on'/></serial>
{{- if .GuestAgent}}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
{{- end}}
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
{{- if not .KVM}}
  <qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='memory-backend-ram,id=lab.ram,size={{.OddMemory}}'/>
    <qemu:arg value='-machine'/><qemu:arg value='memory-backend=lab.ram'/>
    <qemu:arg value='-m'/><qemu:arg value='{{.OddMemory}}b'/>
  </qemu:commandline>
{{- end}}
</domain>
`))

// OddMemory is a size of RAM that is no multiple of 256 KiB. Before version 9.0 QEMU's TCG loses stores of the guest during
// a pre-copy, whoever is the client of the migration: it looks at the dirty pages of RAM of a round size without making the
// next store to them known (fixed by its commit 03bfc2188f). RAM of another size is looked at in another way, which does.
func (d *domain) OddMemory() int64 { return d.Memory + 8<<10 }

// SCSI says whether a disk needs a SCSI controller.
func (d *domain) SCSI() bool {
	return slices.ContainsFunc(d.Disks, func(disk domainDisk) bool { return disk.Bus == "scsi" })
}

func (d *domain) xml() ([]byte, error) {
	var b bytes.Buffer
	if err := domainXML.Execute(&b, d); err != nil {
		return nil, fmt.Errorf("domain XML of %s: %w", d.Name, err)
	}
	return b.Bytes(), nil
}

func escape(s string) (string, error) {
	var b strings.Builder
	err := xml.EscapeText(&b, []byte(s))
	return b.String(), err
}
