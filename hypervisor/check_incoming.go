package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/beevik/etree"
	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
)

// IncomingSpec is what a source announces.
type IncomingSpec struct {
	SourceHost string         // HostInfo.UUID of the source
	XML        string         // the destination's document, see Rewrite
	CPU        string         // Domain.CPU of the source
	Disks      []IncomingDisk // those that will be made here
}

// IncomingDisk is one of its disks.
type IncomingDisk struct {
	Target    string
	Allocated int64 // bytes that the source's disk occupies
	Older     bool  // what stands there is an older copy, which the move may change
	DiskSpec
}

// spaceMargin is kept free beside what the disks occupy now: they grow while
// they are copied.
const spaceMargin = 256 << 20

// CheckIncoming finds everything at this host that would make the move fail.
// The error is for what could not be looked at.
func (h *Host) CheckIncoming(ctx context.Context, s IncomingSpec) ([]Finding, error) {
	var f findings
	dom, err := readDomain(s.XML)
	if err != nil {
		f.badDocument(err)
		return f, nil
	}
	doc, err := parseXML(s.XML, "domain")
	if err != nil {
		return nil, err
	}
	info, err := h.Info(ctx)
	if err != nil {
		return nil, err
	}
	if info.UUID == s.SourceHost {
		f.fatal("host", "both hosts have the libvirt host UUID "+info.UUID, "give this one another: set host_uuid in /etc/libvirt/libvirtd.conf and restart libvirtd")
	}
	f.checkDevices(doc)
	f.checkFiles(dom, doc)
	if err := f.checkMemory(dom, doc); err != nil {
		return nil, err
	}
	if err := h.checkDisks(ctx, &f, dom, s.Disks); err != nil {
		return nil, err
	}
	if err := f.checkSpace(s.Disks); err != nil {
		return nil, err
	}
	err = h.call(ctx, "check host", func(l *libvirt.Libvirt) error {
		if err := f.checkClash(l, dom); err != nil {
			return err
		}
		if err := f.checkMachine(l, dom, s); err != nil {
			return err
		}
		return f.checkNetworks(l, dom)
	})
	return f, err
}

// CheckArrival returns an error when a guest of that name or UUID is here, or when one of
// the documents, of which the second may be "", is another guest's.
func (h *Host) CheckArrival(ctx context.Context, name, uuid, xml, persistXML string) error {
	dom, err := readDomain(xml)
	if err != nil {
		return err
	}
	same := dom.Name == name && dom.UUID == uuid
	if persistXML != "" {
		later, err := readDomain(persistXML)
		if err != nil {
			return err
		}
		same = same && later.Name == name && later.UUID == uuid
	}
	if !same {
		return fmt.Errorf("%w: it does not describe the guest %q with the UUID %s", ErrBadXML, name, uuid)
	}
	var f findings
	if err := h.call(ctx, "check name and UUID", func(l *libvirt.Libvirt) error { return f.checkClash(l, dom) }); err != nil {
		return err
	}
	if len(f) > 0 {
		return fmt.Errorf("%w: %s: %s", ErrExists, f[0].Problem, f[0].Remedy)
	}
	return nil
}

// refused tells an answer of libvirtd from a broken connection.
func refused(err error) bool {
	var e libvirt.Error
	return errors.As(err, &e)
}

// checkClash looks for a domain of the same name or UUID.
func (f *findings) checkClash(l *libvirt.Libvirt, dom *Domain) error {
	uuid, _ := parseUUID(dom.UUID)
	d, err := l.DomainLookupByUUID(uuid)
	if err != nil && !hasCode(err, libvirt.ErrNoDomain) {
		return err
	}
	if err == nil {
		f.fatal("uuid", fmt.Sprintf("domain %q of this host has the UUID %s", d.Name, dom.UUID),
			"if it is left from an earlier stay of this guest and shut off, remove it (virsh undefine --keep-nvram)")
		return nil
	}
	d, err = l.DomainLookupByName(dom.Name)
	if err != nil && !hasCode(err, libvirt.ErrNoDomain) {
		return err
	}
	if err == nil {
		f.fatal("name", fmt.Sprintf("this host has another domain %q, with the UUID %s", d.Name, uuidString(d.UUID)), "rename one of them (virsh domrename)")
	}
	return nil
}

// checkMachine looks for the emulator, the machine type and the CPU.
func (f *findings) checkMachine(l *libvirt.Libvirt, dom *Domain, s IncomingSpec) error {
	if _, err := os.Stat(dom.Emulator); err != nil {
		f.fatal("emulator", err.Error(), "install QEMU for "+dom.Arch+" here, or change <emulator> in the domain")
		return nil
	}
	emulator, arch, machine, virt := libvirt.OptString{dom.Emulator}, libvirt.OptString{dom.Arch}, libvirt.OptString{dom.Machine}, libvirt.OptString{dom.VirtType}
	if _, err := l.ConnectGetDomainCapabilities(emulator, arch, machine, virt, 0); err != nil {
		if !refused(err) {
			return err
		}
		f.fatal("machine", err.Error(), "install a QEMU that knows "+dom.Machine+" with "+dom.VirtType+
			" (virsh domcapabilities), or change the domain's machine type and start it anew")
		return nil
	}
	if s.CPU == "" {
		return nil // QEMU's default, which belongs to the machine type
	}
	cpu, err := parseXML(s.CPU, "cpu")
	if err != nil {
		f.badDocument(err)
		return nil
	}
	model := text(cpu.Root(), "model")
	if model == "" {
		return nil // the host's own CPU: CheckOutgoing tells what that means
	}
	result, err := l.ConnectCompareHypervisorCPU(emulator, arch, machine, virt, s.CPU, 0)
	switch {
	case err != nil && !refused(err):
		return err
	case err != nil:
		f.fatal("cpu", err.Error(), "give the guest a CPU model that this host knows (virsh cpu-models "+dom.Arch+")")
	case libvirt.CPUCompareResult(result) == libvirt.CPUCompareIncompatible:
		f.fatal("cpu", "this host cannot give the guest the CPU "+model+" with its features",
			"start the guest with a model that both hosts have (virsh hypervisor-cpu-baseline)")
	}
	return nil
}

// checkNetworks looks for what the interfaces are plugged into.
func (f *findings) checkNetworks(l *libvirt.Libvirt, dom *Domain) error {
	for _, n := range dom.Networks {
		check := "network " + n.Source
		switch n.Kind {
		case "network":
			network, err := l.NetworkLookupByName(n.Source)
			if hasCode(err, libvirt.ErrNoNetwork) {
				f.fatal(check, "libvirt has no such network here", "define it (virsh net-define), or map it to another in the move")
				continue
			}
			if err != nil {
				return err
			}
			active, err := l.NetworkIsActive(network)
			if err != nil {
				return err
			}
			if active == 0 {
				f.fatal(check, "the network is not active", "start it (virsh net-start "+n.Source+")")
			}
		case "bridge", "direct":
			if _, err := net.InterfaceByName(n.Source); err != nil {
				f.fatal(check, "this host has no device "+n.Source, "make it, or map it to another in the move")
			}
		}
	}
	return nil
}

// checkFiles looks for the files of the host that the domain starts from.
func (f *findings) checkFiles(dom *Domain, doc *etree.Document) {
	need := func(check, path string) {
		if path == "" {
			return
		}
		if _, err := os.Stat(path); err != nil {
			f.fatal(check, err.Error(), "copy it there from the source's host")
		}
	}
	need("kernel", dom.Kernel)
	need("initrd", dom.Initrd)
	need("dtb", text(doc.Root(), "os", "dtb"))
	need("loader", dom.Loader)
	if _, err := os.Stat(dom.NVRAM); err != nil {
		need("nvram template", attr(doc.Root(), "template", "os", "nvram"))
	} else {
		f.notice("nvram", dom.NVRAM+" exists and will be overwritten", "")
	}
	for _, tpm := range devices(doc, "tpm") {
		if _, err := exec.LookPath("swtpm"); err != nil && attr(tpm, "type", "backend") == "emulator" {
			f.fatal("tpm", "this host has no swtpm", "install it (apt install swtpm, dnf install swtpm)")
		}
	}
}

// checkDisks compares the document's disks with those that will be made.
func (h *Host) checkDisks(ctx context.Context, f *findings, dom *Domain, specs []IncomingDisk) error {
	byTarget, paths := map[string]IncomingDisk{}, map[string]string{}
	for _, s := range specs {
		check := "disk " + s.Target
		if other, ok := paths[s.Path]; ok {
			f.fatal(check, "disk "+other+" has the same path, "+s.Path, "give each disk a path of its own")
		}
		byTarget[s.Target], paths[s.Path] = s, s.Target
		if err := s.check(); err != nil {
			f.fatal(check, err.Error(), "")
			continue
		}
		if err := h.checkPath(ctx, f, s); err != nil {
			return err
		}
	}
	for _, d := range dom.Disks {
		check := "disk " + d.Target
		s, made := byTarget[d.Target]
		delete(byTarget, d.Target)
		switch {
		case made && (d.Path != s.Path || d.Type != s.Type || d.Format != s.Format):
			f.fatal(check, fmt.Sprintf("the document has %s %s (%s) and the move makes %s %s (%s)", d.Type, d.Path, d.Format, s.Type, s.Path, s.Format), "")
		case made || !d.Media():
		case d.Path == "":
			f.fatal(check, "it is of type "+d.Type+" and not part of the move", "detach it")
		default:
			if _, err := os.Stat(d.Path); err != nil {
				f.fatal(check, "it is not copied, and "+err.Error(), "copy it there from the source's host, or detach it")
			}
		}
	}
	for target := range byTarget {
		f.fatal("disk "+target, "the document has no such disk", "")
	}
	return nil
}

// checkPath looks whether a disk can be made.
func (h *Host) checkPath(ctx context.Context, f *findings, s IncomingDisk) error {
	check := "disk " + s.Target
	if s.Type == "block" {
		err := h.checkDevice(ctx, s.DiskSpec)
		if errors.Is(err, ErrNoAnswer) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			f.fatal(check, s.Path+": "+err.Error(), "")
		}
		return nil
	}
	folder := filepath.Dir(s.Path)
	if info, err := os.Stat(folder); err != nil {
		f.fatal(check, err.Error(), "make the folder, on the storage that is meant for it, or choose another")
	} else if !info.IsDir() {
		f.fatal(check, folder+" is no folder", "choose another")
	} else if _, err := os.Lstat(s.Path); err == nil {
		return h.checkOlder(ctx, f, s)
	}
	return nil
}

// checkOlder looks whether a move may write to a file that is there.
func (h *Host) checkOlder(ctx context.Context, f *findings, s IncomingDisk) error {
	check := "disk " + s.Target
	if !s.Older {
		f.fatal(check, s.Path+" exists already", "remove it if it is left from an earlier attempt, or choose another folder")
		return nil
	}
	user, err := h.userOf(ctx, s.Path)
	if err == nil && user != "" {
		f.fatal(check, fmt.Sprintf("%s is an older copy, and domain %q uses it", s.Path, user), "remove that domain, or choose another folder")
	}
	return err
}

// checkSpace adds up what goes to each file system.
func (f *findings) checkSpace(specs []IncomingDisk) error {
	type demand struct {
		folder string
		bytes  int64
	}
	var order []uint64
	byDevice := map[uint64]*demand{}
	for _, s := range specs {
		var st unix.Stat_t
		folder := filepath.Dir(s.Path)
		if s.Type == "block" || unix.Stat(folder, &st) != nil {
			continue // reported by checkPath
		}
		if s.Allocated < 0 || s.Allocated > 1<<60 {
			f.fatal("disk "+s.Target, fmt.Sprintf("it occupies %d bytes", s.Allocated), "")
			continue
		}
		d := byDevice[st.Dev]
		if d == nil {
			d = &demand{folder: folder, bytes: spaceMargin}
			byDevice[st.Dev] = d
			order = append(order, st.Dev)
		}
		d.bytes = min(d.bytes+max(0, s.Allocated-s.standing()), 1<<61)
	}
	for _, dev := range order {
		d := byDevice[dev]
		free, err := FreeSpace(d.folder)
		if err != nil {
			return err
		}
		if free < d.bytes {
			f.fatal("space", fmt.Sprintf("the file system of %s has %d MiB free, and the disks need %d MiB with a margin", d.folder, free>>20, d.bytes>>20),
				"free some space, or choose a folder on another file system")
		}
	}
	return nil
}

// standing is what an older copy of the disk occupies already.
func (s IncomingDisk) standing() int64 {
	var st unix.Stat_t
	if !s.Older || unix.Stat(s.Path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// checkMemory compares the guest's memory with what the kernel can give away.
func (f *findings) checkMemory(dom *Domain, doc *etree.Document) error {
	if child(doc.Root(), "memoryBacking", "hugepages") != nil {
		f.notice("memory", "the guest's memory is in huge pages", "reserve enough of them here (virsh allocpages)")
		return nil
	}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	available, err := memAvailable(string(b))
	if err != nil {
		return err
	}
	if available < dom.MemoryBytes {
		f.fatal("memory", fmt.Sprintf("the guest may use %d MiB, and this host has %d MiB available", dom.MemoryBytes>>20, available>>20),
			"stop or move other guests first, or give this one less memory")
	}
	return nil
}

// memAvailable reads the kernel's estimate, in bytes.
func memAvailable(meminfo string) (uint64, error) {
	for line := range strings.Lines(meminfo) {
		if v, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 53)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}
