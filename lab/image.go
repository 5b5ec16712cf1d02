package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Images keeps what guests are made of in a directory: Debian packages, unpacked, the initrds made from them, and file
// systems with files on them. Everything in it can be removed at any time but while guests are being made.
type Images struct {
	dir   string
	guest string
}

// DefaultCache is where Images are kept unless WANLAB_CACHE says otherwise.
const DefaultCache = "/var/cache/wanlab"

// OpenImages uses the directory cache, or the default if it is empty. guest is the path of the program wanlab-guest; if it
// is empty, WANLAB_GUEST says, or it is the one beside this program.
func OpenImages(cache, guest string) (*Images, error) {
	if cache == "" {
		cache = os.Getenv("WANLAB_CACHE")
	}
	if cache == "" {
		cache = DefaultCache
	}
	if guest == "" {
		guest = os.Getenv("WANLAB_GUEST")
	}
	if guest == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		guest = filepath.Join(filepath.Dir(self), "wanlab-guest")
	}
	if _, err := os.Stat(guest); err != nil {
		return nil, fmt.Errorf("guest program: %w; build it with make build, which puts it beside wanlab", err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("image cache: %w", err)
	}
	return &Images{dir: cache, guest: guest}, nil
}

// flavour is one of Debian's kernels. The cloud kernel is small and starts faster, but has no driver for SATA.
type flavour struct {
	metapackage string
	suffix      string // of the package that the metapackage depends on
	modules     []string
}

var (
	cloudKernel = flavour{"linux-image-cloud-amd64", "-cloud-amd64", guestModules}
	fullKernel  = flavour{"linux-image-amd64", "-amd64", append([]string{"ahci", "crc32c_generic", "ext4"}, guestModules...)}

	guestModules = []string{"virtio_pci", "virtio_rng", "virtio_net", "virtio_blk", "virtio_scsi", "sd_mod", "button", "evdev"}
)

// image is what a VM boots.
type image struct {
	kernel, initrd string
	tree           string // of the kernel's package
	system         string // content of the first disk, or empty for files to verify
}

// lock keeps others from changing the cache until the function it returns is called, and removes what a process that died
// left half-written.
func (im *Images) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(im.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("image cache: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s, which another process holds: %w", f.Name(), context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
	leftovers, _ := filepath.Glob(filepath.Join(im.dir, "new-*"))
	for _, path := range leftovers {
		os.RemoveAll(path)
	}
	return func() { f.Close() }, nil
}

// make returns the path of name in the cache, calling create to make it at a temporary path first if it is not there. The
// cache must be locked.
func (im *Images) make(name string, create func(path string) error) (string, error) {
	path := filepath.Join(im.dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	temporary := filepath.Join(im.dir, "new-"+name)
	defer os.RemoveAll(temporary)
	if err := create(temporary); err != nil {
		return "", err
	}
	if err := os.Rename(temporary, path); err != nil {
		return "", err
	}
	return path, nil
}

// boot returns the kernel and the initrd of a flavour, with programs added to it.
func (im *Images) boot(ctx context.Context, f flavour, programs ...software) (image, error) {
	unlock, err := im.lock(ctx)
	if err != nil {
		return image{}, err
	}
	defer unlock()
	tree, err := im.kernelPackage(ctx, f)
	if err != nil {
		return image{}, err
	}
	return im.bootTree(ctx, tree, f.modules, programs)
}

// bootTree returns the kernel of a tree and an initrd with modules from there. The cache must be locked.
func (im *Images) bootTree(ctx context.Context, tree string, modules []string, programs []software) (image, error) {
	busybox, err := im.unpacked(ctx, "busybox-static")
	if err != nil {
		return image{}, err
	}
	modules = slices.Clone(modules)
	var files []initrdFile
	for _, p := range programs {
		modules = append(modules, p.modules...)
		its, err := im.programFiles(ctx, p)
		if err != nil {
			return image{}, err
		}
		files = append(files, its...)
	}
	kernels, _ := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if len(kernels) != 1 {
		return image{}, fmt.Errorf("image cache: %s has %d kernels; remove it", tree, len(kernels))
	}
	release := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	initrd, err := im.initrd(filepath.Join(tree, "lib", "modules", release), busybox, modules, files)
	if err != nil {
		return image{}, err
	}
	return image{kernel: kernels[0], initrd: initrd, tree: tree}, nil
}

// Prepare makes what a guest needs that says nothing special, so that the first one does not wait for it.
func (im *Images) Prepare(ctx context.Context) error {
	boot, err := im.boot(ctx, cloudKernel)
	if err != nil {
		return err
	}
	if _, err := im.filesystem(ctx, defaultDisk, true, boot.tree); err != nil {
		return err
	}
	_, err = im.accelerator(ctx)
	return err
}

// kernelPackage unpacks the kernel that a metapackage stands for; one in the cache is as good as a newer one.
func (im *Images) kernelPackage(ctx context.Context, f flavour) (string, error) {
	names, _ := filepath.Glob(filepath.Join(im.dir, "package-linux-image-[0-9]*"+f.suffix))
	sort.Strings(names)
	for _, name := range names {
		// The cloud kernel's name ends like the full one's.
		if strings.HasSuffix(name, cloudKernel.suffix) == (f.suffix == cloudKernel.suffix) {
			return name, nil
		}
	}
	out, err := output(exec.CommandContext(ctx, "apt-cache", "depends", "--important", f.metapackage))
	if err != nil {
		return "", fmt.Errorf("%w; try apt-get update", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		name, ok := strings.CutPrefix(strings.TrimSpace(s.Text()), "Depends: ")
		if ok && strings.HasPrefix(name, "linux-image-") {
			return im.unpacked(ctx, name)
		}
	}
	return "", fmt.Errorf("apt-cache knows no kernel for %s; try apt-get update", f.metapackage)
}

// unpacked downloads a package and unpacks it into the cache, without installing it.
func (im *Images) unpacked(ctx context.Context, name string) (string, error) {
	return im.make("package-"+name, func(path string) error {
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		download := exec.CommandContext(ctx, "apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", name)
		download.Dir = path
		if _, err := output(download); err != nil {
			return fmt.Errorf("%w; try apt-get update", err)
		}
		files, _ := filepath.Glob(filepath.Join(path, "*.deb"))
		if len(files) != 1 {
			return fmt.Errorf("download of %s gave %d files", name, len(files))
		}
		_, err := output(exec.CommandContext(ctx, "dpkg-deb", "-x", files[0], path))
		return err
	})
}

// initrd makes the guest's initial and only root file system: the guest program as init, busybox for a shell, and modules
// numbered in the order to load them; and files that were asked for.
func (im *Images) initrd(modules, busyboxTree string, names []string, more []initrdFile) (string, error) {
	files, err := ResolveModules(modules, names)
	if err != nil {
		return "", err
	}
	guest, err := os.ReadFile(im.guest)
	if err != nil {
		return "", fmt.Errorf("guest program: %w", err)
	}
	busybox, err := os.ReadFile(filepath.Join(busyboxTree, "bin", "busybox"))
	if err != nil {
		return "", err
	}
	var archive bytes.Buffer
	c := &cpioWriter{w: &archive}
	for _, dir := range []string{"bin", "dev", "disk", "modules", "proc", "sys", "tmp"} {
		c.directory(dir)
	}
	c.device("dev/console", 5, 1)
	c.file("init", 0o755, guest)
	c.file("bin/busybox", 0o755, busybox)
	for i, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		c.file(fmt.Sprintf("modules/%02d-%s.ko", i, moduleName(file)), 0o644, content)
	}
	addFiles(c, more)
	if err := c.close(); err != nil {
		return "", fmt.Errorf("write initrd: %w", err)
	}
	digest := sha256.Sum256(archive.Bytes())
	return im.make(fmt.Sprintf("initrd-%x", digest[:8]), func(path string) error {
		return os.WriteFile(path, archive.Bytes(), 0o644)
	})
}

// output runs a command for its standard output; the error tells what it said.
func output(c *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		said := strings.TrimSpace(stderr.String())
		if said == "" {
			return nil, fmt.Errorf("%s: %w", filepath.Base(c.Path), err)
		}
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(c.Path), err, lastLines(said, 3))
	}
	return out, nil
}

// lastLines is the end of a text.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
