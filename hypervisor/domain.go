package hypervisor

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"

	"github.com/beevik/etree"
	"github.com/digitalocean/go-libvirt"
)

// Domain is what a move needs to know of a domain.
type Domain struct {
	Name, UUID string
	State      State
	Persistent bool // it has a definition that outlives its run
	Autostart  bool

	// XML is the running domain in the form that libvirt compares at a migration,
	// passwords included; of a domain that is shut off, its definition.
	XML string
	// InactiveXML is the persistent definition, "" when there is none.
	InactiveXML string

	CPU         string // the <cpu> element with every feature that the guest sees, "" for QEMU's default
	MemoryBytes uint64 // the most that the guest may use
	VirtType    string // "kvm" or "qemu" (TCG)
	Arch        string // such as "x86_64"
	Machine     string // with its version, such as "pc-q35-7.2"
	Emulator    string // QEMU's path
	Loader      string // UEFI code, "" for BIOS
	NVRAM       string // UEFI variables, "" without
	Kernel      string // direct kernel boot, "" without
	Initrd      string

	Disks    []Disk
	Networks []NIC
}

// Disk is one drive of a domain, in the order of its XML.
type Disk struct {
	Target string // "vda"
	Alias  string // "virtio-disk0"; "" while the domain is shut off
	Export string // "drive-virtio-disk0": the name by which libvirt exports it over NBD
	Bus    string // "virtio"
	Device string // "disk", "cdrom", "floppy" or "lun"
	Type   string // "file", "block", "volume", "network", …
	Format string // "raw", "qcow2", …
	Path   string // of the file or block device; "" for an empty drive

	// Of a CD-ROM or floppy these are zero.
	VirtualSize int64 // bytes, as the guest sees it
	Allocated   int64 // bytes of storage, the whole backing chain together
	ClusterSize int64 // bytes, 0 for raw
	Snapshots   int   // internal to the image

	ReadOnly, Shareable, Transient bool
	HasBacking                     bool // it stands on another image
	Encrypted                      bool
	ExternalData                   bool // qcow2 metadata whose data is in another file
}

// Media tells whether the drive holds something.
func (d Disk) Media() bool { return d.Path != "" || !d.local() }

// local tells whether the disk stands on a file or block device of its host.
func (d Disk) local() bool { return d.Type == "file" || d.Type == "block" || d.Type == "volume" }

// measured tells whether its sizes matter: a removable medium may be anything.
func (d Disk) measured() bool { return d.Path != "" && d.Device != "cdrom" && d.Device != "floppy" }

// Domain reads a domain. The error is an ErrNoDomain when there is none.
func (h *Host) Domain(ctx context.Context, nameOrUUID string) (*Domain, error) {
	var dom *Domain
	err := h.onDomain(ctx, "read domain", nameOrUUID, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		var err error
		dom, err = readRunning(l, d)
		return err
	})
	if err != nil {
		return nil, err
	}
	for i := range dom.Disks {
		disk := &dom.Disks[i]
		if !disk.measured() {
			continue
		}
		if err := disk.inspect(ctx); err != nil {
			return nil, fmt.Errorf("disk %s of %s: %w", disk.Target, dom.Name, err)
		}
	}
	return dom, nil
}

func readRunning(l *libvirt.Libvirt, d libvirt.Domain) (*Domain, error) {
	s, _, err := l.DomainGetState(d, 0)
	if err != nil {
		return nil, err
	}
	persistent, err := l.DomainIsPersistent(d)
	if err != nil {
		return nil, err
	}
	live, err := l.DomainGetXMLDesc(d, libvirt.DomainXMLSecure)
	if err != nil {
		return nil, err
	}
	dom, err := readDomain(live)
	if err != nil {
		return nil, err
	}
	dom.State, dom.Persistent = stateOf(s), persistent != 0
	dom.XML, err = l.DomainGetXMLDesc(d, libvirt.DomainXMLSecure|libvirt.DomainXMLMigratable)
	if err != nil {
		return nil, err
	}
	if dom.Persistent {
		dom.InactiveXML, err = l.DomainGetXMLDesc(d, libvirt.DomainXMLSecure|libvirt.DomainXMLInactive|libvirt.DomainXMLMigratable)
		if err != nil {
			return nil, err
		}
		on, err := l.DomainGetAutostart(d)
		if err != nil {
			return nil, err
		}
		dom.Autostart = on != 0
	}
	volumes, err := volumePaths(l, live)
	if err != nil {
		return nil, err
	}
	for i := range dom.Disks {
		disk := &dom.Disks[i]
		if path, ok := volumes[disk.Target]; ok {
			disk.Path = path
		}
		if !dom.State.Active() || !disk.measured() {
			continue
		}
		// QEMU's own view: what it holds may not be in the image's header yet.
		_, capacity, _, err := l.DomainGetBlockInfo(d, disk.Target, 0)
		if err != nil {
			return nil, fmt.Errorf("size of disk %s: %w", disk.Target, err)
		}
		disk.VirtualSize = int64(capacity)
	}
	return dom, nil
}

// volumePaths finds the files behind disks that name a storage pool's volume.
func volumePaths(l *libvirt.Libvirt, xml string) (map[string]string, error) {
	doc, err := parseXML(xml, "domain")
	if err != nil {
		return nil, err
	}
	paths := map[string]string{}
	for _, e := range diskElements(doc) {
		if attr(e, "type") != "volume" || child(e, "source") == nil {
			continue
		}
		pool, err := l.StoragePoolLookupByName(attr(e, "pool", "source"))
		if err != nil {
			return nil, err
		}
		vol, err := l.StorageVolLookupByName(pool, attr(e, "volume", "source"))
		if err != nil {
			return nil, err
		}
		path, err := l.StorageVolGetPath(vol)
		if err != nil {
			return nil, err
		}
		paths[attr(e, "dev", "target")] = path
	}
	return paths, nil
}

// readDomain reads a domain's XML alone.
func readDomain(xml string) (*Domain, error) {
	doc, err := parseXML(xml, "domain")
	if err != nil {
		return nil, err
	}
	root := doc.Root()
	dom := &Domain{
		Name:     text(root, "name"),
		UUID:     text(root, "uuid"),
		XML:      xml,
		VirtType: attr(root, "type"),
		Arch:     attr(root, "arch", "os", "type"),
		Machine:  attr(root, "machine", "os", "type"),
		Emulator: text(root, "devices", "emulator"),
		Loader:   text(root, "os", "loader"),
		NVRAM:    nvramPath(root),
		Kernel:   text(root, "os", "kernel"),
		Initrd:   text(root, "os", "initrd"),
	}
	if dom.Name == "" {
		return nil, fmt.Errorf("%w: the domain has no name", ErrBadXML)
	}
	if _, ok := parseUUID(dom.UUID); !ok {
		return nil, fmt.Errorf("%w: domain %q has no valid UUID", ErrBadXML, dom.Name)
	}
	if cpu := child(root, "cpu"); cpu != nil {
		if dom.CPU, err = elementXML(cpu); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrBadXML, err)
		}
	}
	memory := child(root, "maxMemory")
	if memory == nil {
		memory = child(root, "memory")
	}
	if memory == nil {
		return nil, fmt.Errorf("%w: domain %q has no <memory>", ErrBadXML, dom.Name)
	}
	if dom.MemoryBytes, err = memorySize(memory); err != nil {
		return nil, fmt.Errorf("%w: domain %q: %w", ErrBadXML, dom.Name, err)
	}
	seen := map[string]bool{}
	for _, e := range diskElements(doc) {
		d := readDisk(e)
		if d.Target == "" || seen[d.Target] {
			return nil, fmt.Errorf("%w: domain %q: disk target %q is missing or used twice", ErrBadXML, dom.Name, d.Target)
		}
		if d.Path != "" && !filepath.IsAbs(d.Path) {
			return nil, fmt.Errorf("%w: domain %q: disk %s has the relative path %q", ErrBadXML, dom.Name, d.Target, d.Path)
		}
		seen[d.Target] = true
		dom.Disks = append(dom.Disks, d)
	}
	for _, e := range devices(doc, "interface") {
		dom.Networks = append(dom.Networks, readNIC(e))
	}
	return dom, nil
}

func nvramPath(root *etree.Element) string {
	if p := attr(root, "file", "os", "nvram", "source"); p != "" {
		return p
	}
	return text(root, "os", "nvram")
}

func diskElements(doc *etree.Document) []*etree.Element { return devices(doc, "disk") }

func readDisk(e *etree.Element) Disk {
	d := Disk{
		Target:    attr(e, "dev", "target"),
		Alias:     attr(e, "name", "alias"),
		Bus:       attr(e, "bus", "target"),
		Device:    attr(e, "device"),
		Type:      attr(e, "type"),
		Format:    attr(e, "type", "driver"),
		ReadOnly:  child(e, "readonly") != nil,
		Shareable: child(e, "shareable") != nil,
		Transient: child(e, "transient") != nil,
		Encrypted: child(e, "encryption") != nil || child(e, "source", "encryption") != nil,
	}
	// libvirt writes these always, and assumes them where they are missing.
	d.Device, d.Type, d.Format = cmp.Or(d.Device, "disk"), cmp.Or(d.Type, "file"), cmp.Or(d.Format, "raw")
	if d.Alias != "" {
		d.Export = "drive-" + d.Alias
	}
	switch d.Type {
	case "file":
		d.Path = attr(e, "file", "source")
	case "block":
		d.Path = attr(e, "dev", "source")
	}
	d.HasBacking = attr(e, "type", "backingStore") != ""
	return d
}
