package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
)

// DiskSpec is a disk to be made at the destination.
type DiskSpec struct {
	Path        string
	Type        string // "file", which is made, or "block", a device that exists
	Format      string // "raw" or "qcow2"
	VirtualSize int64  // bytes, as the source's guest sees it
	ClusterSize int64  // bytes, for qcow2; 0 for QEMU's default
}

// check bounds what comes from the source's host.
func (s DiskSpec) check() error {
	switch {
	case s.Type != "file" && s.Type != "block":
		return fmt.Errorf("type %q: only file and block are supported", s.Type)
	case !filepath.IsAbs(s.Path) || filepath.Clean(s.Path) != s.Path:
		return fmt.Errorf("path %q: it must be absolute and clean", s.Path)
	case s.VirtualSize <= 0 || s.VirtualSize%512 != 0:
		return fmt.Errorf("virtual size %d: it must be a positive multiple of 512", s.VirtualSize)
	case s.Format != "raw" && s.Format != "qcow2":
		return fmt.Errorf("format %q: only raw and qcow2 are supported", s.Format)
	case s.ClusterSize != 0 && (s.ClusterSize < 512 || s.ClusterSize > 2<<20 || s.ClusterSize&(s.ClusterSize-1) != 0):
		return fmt.Errorf("cluster size %d: it must be a power of two from 512 to 2097152", s.ClusterSize)
	}
	return nil
}

// ErrExists is returned when a disk is to be made where something is already.
var ErrExists = errors.New("it exists already")

// CreateDisk makes a thin image of exactly the given virtual size. It never
// overwrites: an existing path is an ErrExists. Its folder must exist. Of a
// block device it checks that it has that size and that no domain uses it.
func (h *Host) CreateDisk(ctx context.Context, s DiskSpec) error {
	if err := s.check(); err != nil {
		return fmt.Errorf("create disk: %w", err)
	}
	if s.Type == "block" {
		if err := h.checkDevice(ctx, s); err != nil {
			return fmt.Errorf("create disk %s: %w", s.Path, err)
		}
		if s.Format == "raw" {
			return nil
		}
		return s.format(ctx)
	}
	f, err := os.OpenFile(s.Path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case errors.Is(err, os.ErrExist):
		return fmt.Errorf("create disk %s: %w: remove it if it is left from an earlier attempt, or choose another folder", s.Path, ErrExists)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("create disk: %w: make the folder first, on the storage that is meant for it", err)
	case err != nil:
		return fmt.Errorf("create disk: %w", err)
	}
	if s.Format == "raw" {
		err = f.Truncate(s.VirtualSize)
	} else {
		err = s.format(ctx)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = syncFolder(filepath.Dir(s.Path))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("create disk %s: %w", s.Path, err), os.Remove(s.Path))
	}
	return nil
}

// format writes an empty qcow2 image into an existing file or device.
func (s DiskSpec) format(ctx context.Context) error {
	args := []string{"create", "-q", "-f", "qcow2"}
	if s.ClusterSize != 0 {
		args = append(args, "-o", "cluster_size="+strconv.FormatInt(s.ClusterSize, 10))
	}
	_, err := runTool(ctx, "qemu-img", append(args, s.Path, strconv.FormatInt(s.VirtualSize, 10))...)
	return err
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// checkDevice checks a block device. libvirt copies a raw disk only between
// equal sizes; a qcow2 image on a device needs room for its own tables too.
func (h *Host) checkDevice(ctx context.Context, s DiskSpec) error {
	size, err := deviceSize(s.Path)
	if err != nil {
		return err
	}
	if s.Format == "raw" && size != s.VirtualSize {
		return fmt.Errorf("the device has %d bytes and the disk %d: resize the device to exactly that", size, s.VirtualSize)
	}
	if size < s.VirtualSize {
		return fmt.Errorf("the device has %d bytes and the disk %d: enlarge the device", size, s.VirtualSize)
	}
	user, err := h.userOf(ctx, s.Path)
	if err != nil {
		return err
	}
	if user != "" {
		return fmt.Errorf("%w: domain %q uses this device: choose another", ErrExists, user)
	}
	return nil
}

func deviceSize(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("%w: make the device first, for example with lvcreate", err)
	}
	if info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0 {
		return 0, errors.New("it is no block device")
	}
	// O_EXCL is refused while the device is mounted or part of another.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return 0, errors.New("the device is in use (see lsblk): choose another")
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// userOf names a domain with a disk at path, by whatever name, or "".
func (h *Host) userOf(ctx context.Context, path string) (string, error) {
	want, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	var user string
	err = h.call(ctx, "search the domains' disks", func(l *libvirt.Libvirt) error {
		doms, _, err := l.ConnectListAllDomains(1, libvirt.ConnectListDomainsActive|libvirt.ConnectListDomainsInactive)
		if err != nil {
			return err
		}
		for _, d := range doms {
			xml, err := l.DomainGetXMLDesc(d, 0)
			if hasCode(err, libvirt.ErrNoDomain) {
				continue
			}
			if err != nil {
				return err
			}
			dom, err := readDomain(xml)
			if err != nil {
				return err
			}
			for _, disk := range dom.Disks {
				if disk.Path == "" {
					continue
				}
				if have, err := os.Stat(disk.Path); err == nil && sameFile(have, want) {
					user = dom.Name
					return nil
				}
			}
		}
		return nil
	})
	return user, err
}

// sameFile compares files by inode, devices by number.
func sameFile(a, b os.FileInfo) bool {
	sa, aok := a.Sys().(*syscall.Stat_t)
	sb, bok := b.Sys().(*syscall.Stat_t)
	const kind = os.ModeDevice | os.ModeCharDevice
	if aok && bok && a.Mode()&kind == os.ModeDevice && b.Mode()&kind == os.ModeDevice {
		return sa.Rdev == sb.Rdev
	}
	return os.SameFile(a, b)
}

// RemoveDisk removes an image file that no domain uses, for the end of a failed
// move. A missing file is no error; a block device is left alone.
func (h *Host) RemoveDisk(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	if info.Mode()&os.ModeDevice != 0 {
		return nil
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("remove disk %s: it is no regular file", path)
	}
	user, err := h.userOf(ctx, path)
	if err != nil {
		return fmt.Errorf("remove disk %s: %w", path, err)
	}
	if user != "" {
		return fmt.Errorf("remove disk %s: domain %q uses it", path, user)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	if err := syncFolder(filepath.Dir(path)); err != nil {
		return fmt.Errorf("remove disk %s: %w", path, err)
	}
	return nil
}

// FreeSpace tells how many bytes a file system can still take, for the file at
// path or, when there is none yet, in its folder.
func FreeSpace(path string) (int64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	if errors.Is(err, os.ErrNotExist) {
		path = filepath.Dir(path)
		err = unix.Statfs(path, &st)
	}
	if err != nil {
		return 0, fmt.Errorf("free space of %s: %w", path, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
