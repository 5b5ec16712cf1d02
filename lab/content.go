package lab

import (
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// filesystem returns a sparse file of exactly size bytes with an ext4 file system that has real files on it, and a manifest
// for the guest to verify them by. The first disk of a guest has up to a third of its size, at most 256 MiB, of kernel
// modules and of this machine's libraries; the others up to a quarter, at most 64 MiB, of documentation and the like.
// Files come in the order of their names until there are enough, so that one machine makes the same disk each time.
func (im *Images) filesystem(ctx context.Context, size int64, first bool, tree string) (string, error) {
	unlock, err := im.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	kind, budget, sources := "data", min(size/4, 64<<20), []string{"/usr/share"}
	if first {
		kind, budget = "first", min(size/3, 256<<20)
		sources = []string{filepath.Join(tree, "lib"), filepath.Join(tree, "boot"), "/usr/lib/x86_64-linux-gnu"}
	}
	name := fmt.Sprintf("ext4-%s-%d-%s", kind, size, strings.TrimPrefix(filepath.Base(tree), "package-linux-image-"))
	return im.make(name, func(path string) error {
		staged := filepath.Join(im.dir, "new-files")
		defer os.RemoveAll(staged)
		if err := stageFiles(ctx, staged, budget, sources); err != nil {
			return fmt.Errorf("collect files for a disk: %w", err)
		}
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			return err
		}
		_, err = output(exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "wanlab-"+kind,
			"-U", "6c616277-6e61-4d6c-8a62-646973630001", "-E", "hash_seed=6c616277-6e61-4d6c-8a62-686173680001,assume_storage_prezeroed=1",
			"-d", staged, path))
		return err
	})
}

const (
	maxFiles    = 4000
	maxFileSize = 32 << 20
)

// stageFiles copies regular files into dir until they are budget bytes, and writes the manifest.
func stageFiles(ctx context.Context, dir string, budget int64, sources []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	manifest, err := os.Create(filepath.Join(dir, api.Manifest))
	if err != nil {
		return err
	}
	defer manifest.Close()
	err = listFiles(ctx, manifest, budget, sources, func(path, relative string) (int64, uint32, error) {
		return stageFile(path, filepath.Join(dir, relative))
	})
	if err != nil {
		return err
	}
	return manifest.Close()
}

// listFiles writes a manifest of regular files until they are budget bytes. read reads each, by its path and by the one that
// the manifest has, which begins with the last element of its source.
func listFiles(ctx context.Context, manifest io.Writer, budget int64, sources []string, read func(path, relative string) (size int64, crc uint32, err error)) error {
	files := 0
	for _, source := range sources {
		err := filepath.WalkDir(source, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if files == maxFiles || budget == 0 {
				return fs.SkipAll
			}
			info, err := d.Info()
			if err != nil || !info.Mode().IsRegular() || info.Size() == 0 || info.Size() > min(budget, maxFileSize) || strings.Contains(path, "\n") {
				return err
			}
			relative, err := filepath.Rel(filepath.Dir(source), path)
			if err != nil {
				return err
			}
			size, crc, err := read(path, relative)
			if err != nil {
				return err
			}
			files++
			budget -= min(size, budget)
			_, err = fmt.Fprintf(manifest, "%08x %d %s\n", crc, size, relative)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func stageFile(from, to string) (size int64, crc uint32, err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return 0, 0, err
	}
	out, err := os.Create(to)
	if err != nil {
		return 0, 0, err
	}
	defer out.Close()
	if size, crc, err = checksumFile(from, out); err != nil {
		return 0, 0, err
	}
	return size, crc, out.Close()
}

// checksumFile reads a file, and writes what it reads to others.
func checksumFile(path string, to ...io.Writer) (size int64, crc uint32, err error) {
	in, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer in.Close()
	sum := crc32.New(castagnoli)
	size, err = io.Copy(io.MultiWriter(append(to, sum)...), in)
	return size, sum.Sum32(), err
}
