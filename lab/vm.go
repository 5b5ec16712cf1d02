package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// ErrNoVM is returned when the lab has made no VM of that name.
var ErrNoVM = errors.New("no such VM")

// VMOptions describe a VM to be made. The zero value of a field other than Name is a default.
type VMOptions struct {
	Name string
	Site string // LocalDC by default
	// Image is empty for a guest that is nothing but the lab's program, or Debian or DebianSecond for one with a system: it
	// has nginx at port 8080 and PostgreSQL at 5432 beside that program. Its first disk, of 3 GiB, holds the system.
	Image      string
	Memory     int64         // bytes, 512 MiB by default, 1 GiB with Debian
	VCPUs      int           // 1 by default
	Disks      []DiskOptions // one raw disk of 1 GiB by default, 3 GiB with Debian
	Dirty      int64         // bytes of memory dirtied per second
	Edit       int64         // bytes of memory per second in pages of which a few words change
	Write      int64         // bytes written per second, to each disk
	WorkingSet int64         // bytes of memory in use by the lab's program, 64 MiB by default, 8 MiB with Debian
	Transient  bool
	Accel      string // auto, kvm or tcg; auto is kvm where a guest boots with it
	UEFI       bool
	CDROM      bool // attach a small read-only CD-ROM
	SSH        bool // run dropbear, for StartSSH
	GuestAgent bool // run qemu-guest-agent
	SecondNIC  bool // in the second network of its site

	Cache string // directory of Images
	Guest string // the program wanlab-guest

	Progress func(line string) // told of what takes long; nil for nobody
}

// complete sets the defaults of a lab with these data centres.
func (o *VMOptions) complete(dataCentres []string) error {
	if o.Site == "" {
		o.Site = LocalDC
	}
	memory, workingSet, disk := int64(512<<20), int64(64<<20), int64(defaultDisk)
	if o.Image != "" {
		memory, workingSet, disk = debianMemory, debianWorkingSet, debianDisk
	}
	if o.Memory == 0 {
		o.Memory = memory
	}
	if o.VCPUs == 0 {
		o.VCPUs = 1
	}
	if o.WorkingSet == 0 {
		o.WorkingSet = workingSet
	}
	if o.Accel == "" {
		o.Accel = "auto"
	}
	if len(o.Disks) == 0 {
		o.Disks = []DiskOptions{{Size: disk, Format: "raw", Bus: "virtio"}}
	}
	if err := checkName(o.Name); err != nil {
		return err
	}
	switch {
	case !slices.Contains(dataCentres, o.Site):
		return unknownSite(o.Site, dataCentres)
	case o.Memory < 128<<20 || o.Memory > 1<<40 || o.Memory%(1<<20) != 0:
		return fmt.Errorf("memory of %s: %d bytes: want 128MiB or more, in whole MiB", o.Name, o.Memory)
	case o.VCPUs < 1 || o.VCPUs > 64:
		return fmt.Errorf("vcpus of %s: %d: want 1 to 64", o.Name, o.VCPUs)
	case len(o.Disks) > maxDisks:
		return fmt.Errorf("disks of %s: %d: want at most %d", o.Name, len(o.Disks), maxDisks)
	case o.Accel != "auto" && o.Accel != "kvm" && o.Accel != "tcg":
		return fmt.Errorf("accelerator %q: want auto, kvm or tcg", o.Accel)
	case o.Dirty < 0 || o.Edit < 0 || o.Write < 0 || o.WorkingSet < 0:
		return fmt.Errorf("load of %s: rates and sizes cannot be negative", o.Name)
	}
	for i, d := range o.Disks {
		if err := d.validate(); err != nil {
			return fmt.Errorf("disk %d of %s: %w", i, o.Name, err)
		}
	}
	if o.Image != "" {
		return o.checkDebian()
	}
	return nil
}

func (o *VMOptions) progress(line string) {
	if o.Progress != nil {
		o.Progress(line)
	}
}

// checkName refuses names that files, libvirt or a command line would take for something else.
func checkName(name string) error {
	for i, r := range name {
		letter := unicode.IsLetter(r) || unicode.IsDigit(r)
		if !letter && (i == 0 || !strings.ContainsRune(" ._+@-", r)) {
			return fmt.Errorf("VM name %q: want letters, digits, spaces and ._+@-, the first a letter or digit", name)
		}
	}
	if name == "" || len(name) > 64 || strings.TrimSpace(name) != name {
		return fmt.Errorf("VM name %q: want 1 to 64 bytes, without a space at the end", name)
	}
	return nil
}

// VM is a guest of the lab, wherever it runs.
type VM struct {
	Name    string     `json:"name"`
	UUID    string     `json:"uuid"`
	MAC     string     `json:"mac"`
	Address netip.Addr `json:"address"` // IPv4, in the guests' network of the site where it was made
	// Address6 is in the same site's IPv6 network, and ends like Address: 10.10.0.12 has fd00:10::12.
	Address6 netip.Addr `json:"address6"`
	// LinkLocal is the guest's IPv6 address on the bridge of whichever site it runs at.
	LinkLocal netip.Addr `json:"link_local"`
	Second    *NIC       `json:"second,omitempty"` // if asked for
	Home      string     `json:"home"`             // site where it was made
	Disks     []string   `json:"disks"`            // paths inside the site
	Accel     string     `json:"accel"`            // kvm or tcg
	// BootTime is from the start of the VM until it answered.
	BootTime time.Duration `json:"boot_time_ns"`

	Files []string `json:"files"` // made for it, as paths inside the site
	lab   *Lab
}

// NIC is a VM's second interface, on the second bridge. What comes to its addresses is answered by it.
type NIC struct {
	MAC      string     `json:"mac"`
	Address  netip.Addr `json:"address"` // ends like the VM's own ones
	Address6 netip.Addr `json:"address6"`
}

// SerialLog is the path, inside each site, of the log of the VM's serial console.
func (v *VM) SerialLog() string { return "/var/log/libvirt/" + v.Name + ".serial.log" }

// CreateVM makes a VM and waits until it answers. If that does not succeed, nothing is left of it, and the error has the end
// of its serial log.
func (l *Lab) CreateVM(ctx context.Context, o VMOptions) (*VM, error) {
	if err := o.complete(l.DataCentres()); err != nil {
		return nil, err
	}
	site, err := l.Site(o.Site)
	if err != nil {
		return nil, err
	}
	if err := site.alive(); err != nil {
		return nil, err
	}
	im, err := OpenImages(o.Cache, o.Guest)
	if err != nil {
		return nil, err
	}
	if err := l.forgetRemoved(ctx, o.Name); err != nil {
		return nil, err
	}
	v, err := l.register(o.Name, o.Site)
	if err != nil {
		return nil, err
	}
	if err := v.create(ctx, im, site, o); err != nil {
		// Cleaning up must not be stopped by what stopped the making.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("make VM %q: %w", o.Name, err), v.Remove(clean))
	}
	return v, nil
}

// forgetRemoved makes the name of a VM free again that no site has any more, as after a virsh undefine.
func (l *Lab) forgetRemoved(ctx context.Context, name string) error {
	for _, dc := range l.DataCentres() {
		out, err := l.Sites[dc].virsh(ctx, nil, "list", "--all", "--name")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(out)) {
			if strings.TrimSuffix(line, "\n") == name {
				return fmt.Errorf("%s has a VM %q already", dc, name)
			}
		}
	}
	v, err := l.VM(name)
	if errors.Is(err, ErrNoVM) {
		return nil
	}
	if err != nil {
		return err
	}
	return v.Remove(ctx)
}

func (v *VM) create(ctx context.Context, im *Images, site *Site, o VMOptions) error {
	boot, err := v.image(ctx, im, o)
	if err != nil {
		return err
	}
	v.Accel = o.Accel
	if v.Accel == "auto" {
		if v.Accel, err = im.accelerator(ctx); err != nil {
			return err
		}
	}
	d := &domain{
		Name: v.Name, UUID: v.UUID, Memory: o.Memory, VCPUs: o.VCPUs, KVM: v.Accel == "kvm", UEFI: o.UEFI,
		NICs: []domainNIC{{v.MAC, site.Bridge}}, Serial: v.SerialLog(), GuestAgent: o.GuestAgent,
	}
	if o.SecondNIC {
		if v.Second, err = v.secondNIC(site); err != nil {
			return err
		}
		d.NICs = append(d.NICs, domainNIC{v.Second.MAC, site.Second.Bridge})
	}
	if d.Kernel, d.Initrd, err = v.lab.installBoot(ctx, boot); err != nil {
		return err
	}
	d.Cmdline = v.cmdline(site, o)
	for n, disk := range o.Disks {
		path, made, err := site.makeDisk(ctx, im, boot, v.Name, n, disk)
		v.Files = append(v.Files, made...)
		if err != nil {
			return fmt.Errorf("disk %d: %w", n, err)
		}
		v.Disks = append(v.Disks, path)
		kind := "file"
		if disk.Device != "" {
			kind = "block"
		}
		d.Disks = append(d.Disks, domainDisk{Type: kind, Source: path, Format: disk.Format, Bus: disk.Bus})
	}
	d.CDROMTarget = nameTargets(d.Disks)
	if o.CDROM {
		d.CDROM = fmt.Sprintf("%s/%s.cdrom.iso", imageDir, v.Name)
		v.Files = append(v.Files, d.CDROM)
		if err := writeCDROM(site.Dir + d.CDROM); err != nil {
			return err
		}
	}
	if err := v.save(); err != nil {
		return err
	}
	xml, err := d.xml()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := v.start(ctx, site, xml, o.Transient); err != nil {
		return err
	}
	if err := v.await(ctx, site, o); err != nil {
		return fmt.Errorf("%w; its serial log ends:\n%s", err, v.serialEnd(site))
	}
	v.BootTime = time.Since(start)
	if err := v.addRecords(ctx); err != nil {
		return err
	}
	return v.save()
}

// seed is what the guest's patterns start from.
func (v *VM) seed() uint64 {
	h := sha256.Sum256([]byte("seed/" + v.Name))
	return binary.BigEndian.Uint64(h[:])
}

// image is what the VM boots.
func (v *VM) image(ctx context.Context, im *Images, o VMOptions) (image, error) {
	if o.Image != "" {
		return im.bootDebian(ctx, o.Image, o.progress)
	}
	kernel := cloudKernel
	for _, d := range o.Disks {
		if d.Bus == "sata" {
			kernel = fullKernel
		}
	}
	programs, err := v.programs(ctx, im, o)
	if err != nil {
		return image{}, err
	}
	return im.boot(ctx, kernel, programs...)
}

func (v *VM) cmdline(site *Site, o VMOptions) string {
	line := fmt.Sprintf("console=ttyS0 quiet loglevel=4 mitigations=off panic=1 wanlab.name=%s wanlab.address=%s wanlab.gateway=%s"+
		" wanlab.address6=%s wanlab.gateway6=%s wanlab.seed=%x wanlab.disks=%d wanlab.dirty=%d wanlab.edit=%d wanlab.write=%d wanlab.working-set=%d",
		url.PathEscape(v.Name), netip.PrefixFrom(v.Address, site.BridgeAddr.Bits()), site.BridgeAddr.Addr(),
		netip.PrefixFrom(v.Address6, site.BridgeAddr6.Bits()), site.BridgeAddr6.Addr(), v.seed(),
		len(o.Disks), o.Dirty, o.Edit, o.Write, o.WorkingSet)
	if second := v.Second; second != nil {
		line += fmt.Sprintf(" wanlab.second-address=%s wanlab.second-gateway=%s wanlab.second-address6=%s wanlab.second-gateway6=%s",
			netip.PrefixFrom(second.Address, site.Second.Addr.Bits()), site.Second.Addr.Addr(),
			netip.PrefixFrom(second.Address6, site.Second.Addr6.Bits()), site.Second.Addr6.Addr())
	}
	if o.Image != "" {
		line += debianCmdline
	}
	return line
}

// installBoot copies kernel and initrd to one path in every data centre, since a VM that has moved names them too.
func (l *Lab) installBoot(ctx context.Context, boot image) (kernel, initrd string, err error) {
	const dir = "/var/lib/libvirt/boot"
	kernel = filepath.Join(dir, filepath.Base(boot.kernel))
	initrd = filepath.Join(dir, filepath.Base(boot.initrd))
	for _, dc := range l.DataCentres() {
		root := l.Sites[dc].Dir
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			return "", "", fmt.Errorf("install kernel: %w", err)
		}
		for from, to := range map[string]string{boot.kernel: root + kernel, boot.initrd: root + initrd} {
			if _, err := os.Stat(to); err == nil {
				continue
			}
			temporary := fmt.Sprintf("%s.%d", to, os.Getpid())
			if err := copySparse(ctx, from, temporary); err != nil {
				return "", "", fmt.Errorf("install kernel: %w", err)
			}
			if err := os.Rename(temporary, to); err != nil {
				return "", "", fmt.Errorf("install kernel: %w", err)
			}
		}
	}
	return kernel, initrd, nil
}

// writeCDROM makes 4 MiB of content for a CD-ROM.
func writeCDROM(path string) error {
	b := make([]byte, 4<<20)
	for i := range uint64(len(b) / api.BlockSize) {
		api.Cell{Kind: api.FileCell, Index: i}.Fill(api.Words(b[i*api.BlockSize:][:api.BlockSize]))
	}
	return os.WriteFile(path, b, 0o444)
}

func (v *VM) start(ctx context.Context, site *Site, xml []byte, transient bool) error {
	if transient {
		_, err := site.virsh(ctx, xml, "create", "/dev/stdin")
		return err
	}
	if _, err := site.virsh(ctx, xml, "define", "/dev/stdin"); err != nil {
		return err
	}
	_, err := site.virsh(ctx, nil, "start", v.UUID)
	return err
}

const (
	bootTimeout   = 90 * time.Second
	uefiTimeout   = 5 * time.Minute // OVMF draws its logo for long under TCG
	bootProgress  = 15 * time.Second
	debianTimeout = 10 * time.Minute // one under TCG, if the machine has nothing else to do
)

// await returns when the guest answers.
func (v *VM) await(ctx context.Context, site *Site, o VMOptions) error {
	limit := bootTimeout
	switch {
	case o.Image != "":
		limit = debianTimeout
	case o.UEFI:
		limit = uefiTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer from the guest in %v", limit))
	defer cancel()
	started := time.Now()
	checked, told := started, started
	for {
		one, done := context.WithTimeout(ctx, 2*time.Second)
		_, err := v.Report(one, site.Name)
		done()
		if err == nil {
			return nil
		}
		if time.Since(checked) > time.Second {
			checked = time.Now()
			if state, err := v.state(ctx, site); err == nil && state != "running" {
				return fmt.Errorf("the guest did not stay up: it is %s", state)
			}
		}
		if time.Since(told) > bootProgress {
			told = time.Now()
			o.progress(fmt.Sprintf("%s has been booting for %d s", v.Name, int(time.Since(started).Seconds())))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// state is the domain's state at a site in virsh's words, or "absent".
func (v *VM) state(ctx context.Context, site *Site) (string, error) {
	state, err := site.virsh(ctx, nil, "domstate", v.UUID)
	if err == nil {
		return strings.TrimSpace(string(state)), nil
	}
	all, listErr := site.virsh(ctx, nil, "list", "--all", "--uuid")
	if listErr != nil {
		return "", listErr
	}
	if bytes.Contains(all, []byte(v.UUID)) {
		return "", err
	}
	return "absent", nil
}

// Site is the name of the data centre where the VM runs.
func (v *VM) Site(ctx context.Context) (string, error) {
	var found []string
	for _, dc := range v.lab.DataCentres() {
		state, err := v.state(ctx, v.lab.Sites[dc])
		if err != nil {
			return "", err
		}
		if state == "running" {
			return dc, nil
		}
		found = append(found, fmt.Sprintf("%s at %s", state, dc))
	}
	return "", fmt.Errorf("VM %q does not run: it is %s", v.Name, strings.Join(found, ", "))
}

func (v *VM) serialEnd(site *Site) string {
	b, err := os.ReadFile(site.Dir + v.SerialLog())
	if err != nil {
		return err.Error()
	}
	text := strings.ReplaceAll(string(b), "\r", "")
	if before, panic, ok := strings.Cut(text, "Kernel panic"); ok { // what led to it says more than the kernel's registers
		reason, _, _ := strings.Cut(panic, "\n")
		text = before + "Kernel panic" + reason
	}
	return lastLines(text, 40)
}

// Remove ends the VM wherever it is and removes it with all files that were made for it, and what a move made of its disks
// at the other site, and its name.
func (v *VM) Remove(ctx context.Context) error {
	var errs []error
	for _, dc := range v.lab.DataCentres() {
		site := v.lab.Sites[dc]
		state, err := v.state(ctx, site)
		if err == nil && state != "absent" && state != "shut off" {
			_, err = site.virsh(ctx, nil, "destroy", v.UUID)
		}
		if err == nil {
			// A transient domain is gone by now.
			if state, err = v.state(ctx, site); err == nil && state != "absent" {
				_, err = site.virsh(ctx, nil, "undefine", "--nvram", v.UUID)
			}
		}
		errs = append(errs, err)
		for _, path := range append(v.Files, v.SerialLog()) {
			if err := os.Remove(site.Dir + path); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	errs = append(errs, v.removeRecords(ctx))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove VM %q: %w", v.Name, err)
	}
	for _, remove := range []error{os.RemoveAll(v.sshDir()), os.Remove(v.lab.vmFile(v.Name))} {
		if remove != nil {
			return fmt.Errorf("remove VM %q: %w", v.Name, remove)
		}
	}
	return nil
}

// virsh runs virsh against the site's libvirtd.
func (s *Site) virsh(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	uri := "qemu+unix:///system?socket=" + url.QueryEscape(s.LibvirtSocket)
	c := exec.CommandContext(ctx, "virsh", append([]string{"--quiet", "--connect", uri}, args...)...)
	c.Stdin = bytes.NewReader(stdin)
	out, err := output(c)
	if err != nil {
		return nil, fmt.Errorf("libvirt at %s: %w", s.Name, err)
	}
	return out, nil
}
