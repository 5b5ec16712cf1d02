package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// DiskOptions describe a disk of a VM.
type DiskOptions struct {
	Size    int64  // bytes, a multiple of 4096; of a block device, 0 or its size
	Device  string // path of an empty block device to use instead of a file
	Format  string // raw or qcow2
	Bus     string // virtio, scsi or sata
	Backing bool   // the content is in a qcow2 file that a second one, the disk, is based on
}

const (
	defaultDisk = 1 << 30

	minDisk  = 16 << 20
	maxDisk  = 1 << 40
	maxDisks = 8
)

// ParseDisk reads a size or the path of a block device, and after commas format=raw|qcow2, bus=virtio|scsi|sata and
// backing=yes|no, such as 1GiB,format=qcow2,backing=yes. The format is otherwise the one given.
func ParseDisk(s, format string) (DiskOptions, error) {
	what, options, _ := strings.Cut(s, ",")
	d := DiskOptions{Format: format, Bus: "virtio"}
	if strings.HasPrefix(what, "/") {
		d.Device, d.Format = what, "raw"
	} else {
		size, err := ParseSize(what)
		if err != nil {
			return d, fmt.Errorf("disk %q: %w, or the path of a block device", s, err)
		}
		d.Size = size
	}
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		switch {
		case option == "":
		case key == "format":
			d.Format = value
		case key == "bus":
			d.Bus = value
		case key == "backing" && (value == "yes" || value == "no"):
			d.Backing = value == "yes"
		default:
			return d, fmt.Errorf("disk %q: unknown %q: want format=raw|qcow2, bus=virtio|scsi|sata or backing=yes|no", s, option)
		}
	}
	if err := d.validate(); err != nil {
		return d, fmt.Errorf("disk %q: %w", s, err)
	}
	return d, nil
}

func (d DiskOptions) validate() error {
	switch {
	case d.Format != "raw" && d.Format != "qcow2":
		return fmt.Errorf("unknown format %q: want raw or qcow2", d.Format)
	case d.Bus != "virtio" && d.Bus != "scsi" && d.Bus != "sata":
		return fmt.Errorf("unknown bus %q: want virtio, scsi or sata", d.Bus)
	case d.Backing && d.Format != "qcow2":
		return errors.New("only a disk of format qcow2 can have a backing file")
	case d.Device != "" && d.Format != "raw":
		return errors.New("a block device has the format raw")
	case d.Device == "" && (d.Size < minDisk || d.Size > maxDisk || d.Size%4096 != 0):
		return errors.New("want a size from 16MiB to 1024GiB, a multiple of 4KiB")
	}
	return nil
}

// imageDir is where images lie inside a site.
const imageDir = "/var/lib/libvirt/images"

// makeDisk makes disk n of a VM and returns its path inside the site, and the paths of all files made.
func (s *Site) makeDisk(ctx context.Context, im *Images, boot image, vm string, n int, d DiskOptions) (path string, made []string, err error) {
	if d.Device != "" {
		if d.Size, err = emptyDevice(d.Device); err != nil {
			return "", nil, err
		}
	}
	content := boot.system
	if n > 0 || content == "" {
		content, err = im.filesystem(ctx, d.Size, n == 0, boot.tree)
	} else if d.Size < debianDisk {
		err = fmt.Errorf("%s has %d bytes, fewer than the %d of the system", d.Device, d.Size, int64(debianDisk))
	}
	if err != nil {
		return "", nil, err
	}
	if d.Device != "" {
		_, err := output(exec.CommandContext(ctx, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", content, d.Device))
		return d.Device, nil, err
	}
	path = fmt.Sprintf("%s/%s.disk%d.%s", imageDir, vm, n, d.Format)
	switch {
	case d.Backing:
		base := fmt.Sprintf("%s/%s.disk%d.base.qcow2", imageDir, vm, n)
		made = []string{path, base}
		if err = convert(ctx, content, s.Dir+base); err == nil {
			// The name is relative to the overlay, so that it holds inside and outside of the site.
			_, err = output(exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(base), "-F", "qcow2", s.Dir+path))
		}
	case d.Format == "qcow2":
		made = []string{path}
		err = convert(ctx, content, s.Dir+path)
	default:
		made = []string{path}
		err = copySparse(ctx, content, s.Dir+path)
	}
	return path, made, err
}

func convert(ctx context.Context, from, to string) error {
	_, err := output(exec.CommandContext(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", from, to))
	return err
}

func copySparse(ctx context.Context, from, to string) error {
	_, err := output(exec.CommandContext(ctx, "cp", "--sparse=always", "--reflink=auto", "--", from, to))
	return err
}

// emptyDevice returns the size of a block device, in whole blocks of 4096, provided that its first MiB is all zeros:
// the disk's content is about to be overwritten.
func emptyDevice(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0 {
		return 0, fmt.Errorf("%s is not a block device", path)
	}
	start := make([]byte, 1<<20)
	if n, err := io.ReadFull(f, start); err != nil && n == 0 {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	if strings.Trim(string(start), "\x00") != "" {
		return 0, fmt.Errorf("%s is not empty: clear its first MiB if what is there can go", path)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", path, err)
	}
	if size < minDisk {
		return 0, fmt.Errorf("%s has %d bytes, fewer than 16MiB", path, size)
	}
	return size - size%4096, nil
}
