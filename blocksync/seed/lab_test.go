//go:build lab

package seed

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/wanmig/wanmig/compress"
)

// TestImagesOfQEMU indexes and reads what qemu-img writes.
func TestImagesOfQEMU(t *testing.T) {
	dir := t.TempDir()
	var numbers []int
	for i := range 3000 {
		numbers = append(numbers, []int{0, i, i, 7, -i}[i%5])
	}
	content := pages(numbers...)
	for i := 1; i < len(content); i += 2 {
		content[i] &= 1 // what compresses
	}
	content = append(content, bytes.Repeat([]byte{9}, 512)...)
	original := write(t, filepath.Join(dir, "original"), content)
	image := filepath.Join(dir, "image")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v: %s", args, err, out)
		}
	}
	for name, args := range map[string][]string{
		"raw":                         {"-O", "raw"},
		"qcow2":                       {"-O", "qcow2"},
		"version 2":                   {"-O", "qcow2", "-o", "compat=0.10"},
		"small clusters":              {"-O", "qcow2", "-o", "cluster_size=512"},
		"large clusters":              {"-O", "qcow2", "-o", "cluster_size=2M"},
		"zlib":                        {"-c", "-O", "qcow2"},
		"zlib, version 2":             {"-c", "-O", "qcow2", "-o", "compat=0.10"},
		"zlib, small clusters":        {"-c", "-O", "qcow2", "-o", "cluster_size=4k"},
		"zlib, large clusters":        {"-c", "-O", "qcow2", "-o", "cluster_size=2M"},
		"zstd":                        {"-c", "-O", "qcow2", "-o", "compression_type=zstd"},
		"zstd, large clusters":        {"-c", "-O", "qcow2", "-o", "compression_type=zstd,cluster_size=2M"},
		"preallocated":                {"-O", "qcow2", "-o", "preallocation=metadata"},
		"lazy reference counts":       {"-O", "qcow2", "-o", "lazy_refcounts=on"},
		"other reference counts":      {"-O", "qcow2", "-o", "refcount_bits=64"},
		"zeros written, not left out": {"-S", "0", "-O", "qcow2"},
	} {
		t.Run(name, func(t *testing.T) {
			run(append(append([]string{"convert", "-f", "raw"}, args...), original, image)...)
			x, err := indexed(t, dir, image, 1000)
			if err != nil {
				t.Fatal(err)
			}
			defer x.release()
			f, id, err := openFile(image, false)
			if err != nil {
				t.Fatal(err)
			}
			img, err := openFormat(f, id.size)
			if err != nil {
				t.Fatal(err)
			}
			defer img.close()
			if img.size() != int64(len(content)) {
				t.Fatalf("%d bytes of content, not %d", img.size(), len(content))
			}
			got := make([]byte, len(content))
			if err := img.readAt(got, 0); err != nil || !bytes.Equal(got, content) {
				t.Fatalf("read as another content, %v", err)
			}
			for i, n := range numbers {
				p := content[i*page:][:page]
				if at, ok := x.find(compress.Sum(p)); n != 0 && (!ok || !bytes.Equal(content[at*page:][:page], p)) {
					t.Fatalf("page %d: %d, %v", i, at, ok)
				}
			}
		})
	}
	t.Run("with a backing file", func(t *testing.T) {
		os.Remove(image)
		run("create", "-q", "-f", "qcow2", "-b", original, "-F", "raw", image)
		x, err := indexed(t, dir, image, 1000)
		if err != nil {
			t.Fatal(err)
		}
		defer x.release()
		if x.count != 0 {
			t.Errorf("%d pages of an image that has none of its own", x.count)
		}
	})
	for name, options := range map[string]string{
		"extended_l2": "extended_l2=on", "data_file": "data_file=" + filepath.Join(dir, "data"),
	} {
		t.Run(name, func(t *testing.T) {
			os.Remove(image)
			run("create", "-q", "-f", "qcow2", "-o", options, image, "1M")
			if _, err := indexed(t, dir, image, 1000); err == nil {
				t.Error("indexed")
			}
		})
	}
}

func BenchmarkIndexCompressed(b *testing.B) {
	dir := b.TempDir()
	content := make([]byte, 128<<20)
	fill(content, 1)
	for i := range content {
		content[i] &= 15
	}
	original := write(b, filepath.Join(dir, "original"), content)
	for _, kind := range []string{"zlib", "zstd"} {
		b.Run(kind, func(b *testing.B) {
			image := filepath.Join(dir, kind)
			if out, err := exec.Command("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type="+kind, "-f", "raw", original, image).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
			b.SetBytes(int64(len(content)))
			for b.Loop() {
				x, err := indexed(b, dir, image, runEntries)
				if err != nil {
					b.Fatal(err)
				}
				x.release()
			}
		})
	}
}
