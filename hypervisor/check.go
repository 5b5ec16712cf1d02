package hypervisor

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/beevik/etree"
)

// Level says what a finding means for the move.
type Level string

// Fatal findings stop a move before it starts; a Notice is for the operator to
// know.
const (
	Fatal  Level = "fatal"
	Notice Level = "notice"
)

// Finding is a reason why a move cannot work, or will not do what one might
// expect.
type Finding struct {
	Level   Level
	Check   string // what was looked at, such as "cpu" or "disk vda"
	Problem string
	Remedy  string // what to do; may be "" of a notice
}

func (f Finding) String() string {
	s := fmt.Sprintf("%s: %s: %s", f.Level, f.Check, f.Problem)
	if f.Remedy != "" {
		s += ": " + f.Remedy
	}
	return s
}

// findings gathers, so that an operator sees everything at once.
type findings []Finding

func (f *findings) fatal(check, problem, remedy string) {
	*f = append(*f, Finding{Fatal, check, problem, remedy})
}

func (f *findings) notice(check, problem, remedy string) {
	*f = append(*f, Finding{Notice, check, problem, remedy})
}

// deviceRule is a device that libvirt or QEMU cannot migrate.
type deviceRule struct {
	tag             string
	path            []string // below it
	attr, value     string   // attr "" for any
	problem, remedy string
}

const detach = "detach it for the time of the move (virsh detach-device), or replace it by an emulated one"

var deviceRules = []deviceRule{
	{"hostdev", nil, "", "", "a device of this host is passed through", detach},
	{"interface", nil, "type", "hostdev", "a network device of this host is passed through", detach},
	{"interface", nil, "type", "vdpa", "vDPA devices cannot migrate", detach},
	{"interface", nil, "type", "vhostuser", "its vhost-user switch runs on this host only", "set up the same switch and socket at the destination, or change the interface's type"},
	{"filesystem", nil, "", "", "a folder of this host is shared with the guest", "unmount it in the guest and detach it"},
	{"shmem", nil, "", "", "shared memory with other guests cannot migrate", detach},
	{"tpm", []string{"backend"}, "type", "passthrough", "the TPM of this host is passed through", "give the guest an emulated TPM"},
}

// checkDevices finds what cannot leave its host.
func (f *findings) checkDevices(doc *etree.Document) {
	root := doc.Root()
	for _, r := range deviceRules {
		for _, e := range devices(doc, r.tag) {
			if r.attr == "" || attr(e, r.attr, r.path...) == r.value {
				f.fatal("device "+r.tag, r.problem, r.remedy)
			}
		}
	}
	// A serial port or channel may stand on a device of the host.
	for _, tag := range []string{"serial", "parallel", "console", "channel"} {
		for _, e := range devices(doc, tag) {
			if attr(e, "type") == "dev" {
				f.notice("device "+tag, "it uses "+attr(e, "path", "source")+" of its host", "the destination must have the same device")
			}
		}
	}
	if child(root, "launchSecurity") != nil {
		f.fatal("launch security", "encrypted guest memory cannot migrate", "start the guest without <launchSecurity>")
	}
	for _, e := range elements(child(root, "cpu"), "feature") {
		if attr(e, "name") == "invtsc" && cmp.Or(attr(e, "policy"), "require") == "require" {
			f.fatal("cpu", "a guest with an invariant TSC cannot migrate", "remove the feature invtsc from its <cpu>")
		}
	}
	if root.SelectElement("qemu:commandline") != nil {
		f.notice("command line", "extra QEMU arguments are carried over unchanged", "")
	}
}

// checkDisk finds what neither side supports about a disk that is copied.
func (f *findings) checkDisk(d Disk) {
	check := "disk " + d.Target
	if !d.local() {
		f.fatal(check, fmt.Sprintf("it is of type %s; only files, block devices and volumes of storage pools move", d.Type),
			"copy it to local storage first (virsh blockcopy), or detach it")
		return
	}
	if d.Device == "lun" {
		f.fatal(check, "a SCSI device of this host is passed through", "attach it with device='disk'")
	}
	if d.Format != "raw" && d.Format != "qcow2" {
		f.fatal(check, fmt.Sprintf("its format is %s; only raw and qcow2 move", d.Format), "convert it to qcow2 (virsh blockcopy --format qcow2 --pivot)")
	}
	if d.Shareable {
		f.fatal(check, "it is shared with other guests", "detach it, or remove <shareable/> if no other guest uses it")
	}
	if d.Transient {
		f.fatal(check, "its changes are dropped when the guest ends (<transient/>)", "start the guest without <transient/>")
	}
	if d.Encrypted {
		f.fatal(check, "it is encrypted by QEMU, and its key is in this host's libvirt", "copy it to an unencrypted image first (virsh blockcopy), or encrypt inside the guest")
	}
	if d.ExternalData {
		f.fatal(check, "its qcow2 image keeps its data in another file", "copy it to a plain image first (virsh blockcopy)")
	}
	if d.VirtualSize <= 0 || d.VirtualSize%512 != 0 {
		f.fatal(check, fmt.Sprintf("its size, %d bytes, is no multiple of 512", d.VirtualSize), "resize it (virsh blockresize)")
	}
}

// badDocument turns what parsing refused into a finding.
func (f *findings) badDocument(err error) {
	if errors.Is(err, ErrBadXML) {
		f.fatal("document", err.Error(), "look at it with virsh dumpxml")
		return
	}
	f.fatal("document", err.Error(), "")
}
