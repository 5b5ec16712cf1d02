package lab

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// software is a program from Debian's packages that the initrd of a guest can have, with what it needs.
type software struct {
	packages []string     // with the program and its libraries
	program  string       // its path in the guest and in its package
	modules  []string     // of the kernel
	files    []initrdFile // besides
}

// initrdFile is a file for an initrd, or a symbolic link if it says where to.
type initrdFile struct {
	name    string // path without a leading slash
	mode    fs.FileMode
	content []byte
	link    string
}

// guestAgent answers libvirt, which asks it for the guest's addresses.
var guestAgent = software{
	packages: []string{"qemu-guest-agent", "libc6", "libglib2.0-0", "libnuma1", "libpcre2-8-0", "libudev1", "liburing2"},
	program:  "/usr/sbin/qemu-ga",
	modules:  []string{"virtio_console"},
}

// programs is what the options of a VM ask for. What clients need of it is installed in the lab.
func (v *VM) programs(ctx context.Context, im *Images, o VMOptions) ([]software, error) {
	var programs []software
	if o.GuestAgent {
		programs = append(programs, guestAgent)
	}
	if o.SSH {
		keys, err := im.sshKeys(ctx)
		if err != nil {
			return nil, err
		}
		if err := keys.install(v.sshDir()); err != nil {
			return nil, err
		}
		programs = append(programs, keys.server())
	}
	return programs, nil
}

// programFiles reads a program, and all that it is linked to, from packages. The cache must be locked.
func (im *Images) programFiles(ctx context.Context, s software) ([]initrdFile, error) {
	var trees []string
	for _, name := range s.packages {
		tree, err := im.unpacked(ctx, name)
		if err != nil {
			return nil, err
		}
		trees = append(trees, tree)
	}
	files, err := linkedFiles(trees, s.program)
	if err != nil {
		return nil, fmt.Errorf("%s from the packages %s: %w", s.program, strings.Join(s.packages, ", "), err)
	}
	return append(files, s.files...), nil
}

// libraryDirs are where Debian's packages have libraries and the dynamic loader. In the guest libraries are all in /lib,
// where they are looked for, too.
var libraryDirs = []string{"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"}

// linkedFiles returns a program, its dynamic loader and all libraries that these need, found in directories with unpacked
// packages.
func linkedFiles(trees []string, program string) ([]initrdFile, error) {
	content, err := findFile(trees, []string{filepath.Dir(program)}, filepath.Base(program))
	if err != nil {
		return nil, err
	}
	files := []initrdFile{{name: program[1:], mode: 0o755, content: content}}
	loader, err := interpreter(content)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	seen := map[string]bool{}
	for i := 0; i < len(files); i++ {
		needs, err := libraries(files[i].content)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", files[i].name, err)
		}
		for _, name := range append(needs, filepath.Base(loader)) {
			if seen[name] {
				continue
			}
			seen[name] = true
			content, err := findFile(trees, libraryDirs, name)
			if err != nil {
				return nil, err
			}
			at := "lib/" + name
			if name == filepath.Base(loader) {
				at = loader[1:]
			}
			files = append(files, initrdFile{name: at, mode: 0o755, content: content})
		}
	}
	return files, nil
}

// findFile reads the file of a name in the first of the directories that has it, in any tree.
func findFile(trees, dirs []string, name string) ([]byte, error) {
	for _, tree := range trees {
		for _, dir := range dirs {
			content, err := os.ReadFile(filepath.Join(tree, dir, name))
			if !errors.Is(err, fs.ErrNotExist) {
				return content, err
			}
		}
	}
	return nil, fmt.Errorf("no %s", name)
}

// interpreter is the path of the dynamic loader that a program names (ELF, PT_INTERP).
func interpreter(program []byte) (string, error) {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return "", err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		name, err := io.ReadAll(p.Open())
		if err != nil {
			return "", err
		}
		if loader := strings.TrimRight(string(name), "\x00"); filepath.IsAbs(loader) {
			return loader, nil
		}
	}
	return "", errors.New("it names no dynamic loader")
}

// libraries are the names of what a program or library is linked to (ELF, DT_NEEDED).
func libraries(object []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	return f.ImportedLibraries()
}

// addFiles writes files into an initrd, once each, with the directories above them.
func addFiles(c *cpioWriter, files []initrdFile) {
	seen := map[string]bool{}
	var directories func(name string)
	directories = func(name string) {
		dir := filepath.Dir(name)
		if dir == "." || seen[dir] {
			return
		}
		seen[dir] = true
		directories(dir)
		c.directory(dir)
	}
	for _, f := range files {
		if seen[f.name] {
			continue
		}
		seen[f.name] = true
		directories(f.name)
		if f.link != "" {
			c.link(f.name, f.link)
		} else {
			c.file(f.name, f.mode, f.content)
		}
	}
}
