package lab

import (
	"fmt"
	"io"
	"io/fs"
	"math"
)

// cpioWriter writes an archive in the format "newc", which the kernel unpacks as its initial file system
// (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpioWriter struct {
	w     io.Writer
	inode int
	err   error
}

const (
	cpioFile      = 0o100000
	cpioDirectory = 0o040000
	cpioDevice    = 0o020000
	cpioLink      = 0o120000
)

// directory adds a directory. Parents come first, names have no leading slash.
func (c *cpioWriter) directory(name string) { c.entry(name, cpioDirectory|0o755, 0, 0, nil) }

func (c *cpioWriter) file(name string, mode fs.FileMode, content []byte) {
	c.entry(name, cpioFile|int(mode.Perm()), 0, 0, content)
}

// device adds a character device.
func (c *cpioWriter) device(name string, major, minor int) {
	c.entry(name, cpioDevice|0o600, major, minor, nil)
}

// link adds a symbolic link.
func (c *cpioWriter) link(name, to string) { c.entry(name, cpioLink|0o777, 0, 0, []byte(to)) }

// close writes the end of the archive and returns the first error of all.
func (c *cpioWriter) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.err
}

func (c *cpioWriter) entry(name string, mode, major, minor int, content []byte) {
	if c.err != nil {
		return
	}
	if int64(len(content)) > math.MaxUint32 {
		c.err = fmt.Errorf("%s is larger than an archive can hold", name)
		return
	}
	c.inode++
	links := 1
	if mode&cpioDirectory != 0 {
		links = 2
	}
	// Magic; inode, mode, uid, gid, links, mtime, size; device's numbers; special file's numbers; length of the name; checksum.
	header := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.inode, mode, 0, 0, links, 0, len(content), 0, 0, major, minor, len(name)+1, 0)
	c.padded([]byte(header + name + "\x00"))
	c.padded(content)
}

// padded writes b and zeros up to a multiple of four.
func (c *cpioWriter) padded(b []byte) {
	for _, p := range [][]byte{b, make([]byte, -len(b)&3)} {
		if c.err == nil {
			_, c.err = c.w.Write(p)
		}
	}
}
