//go:build lab

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/blocksync/seed"
	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/migrate"
)

// seedDir is where the tests' seeds are at the destination.
const seedDir = "/var/lib/libvirt/golden"

// TestSeeds moves guests whose disk content stands in an image at the
// destination, which stays, or (in a soak) is overwritten or deleted while it is of
// use.
func TestSeeds(t *testing.T) {
	t.Parallel() // beside the redirects, which mostly wait
	w := newWorldWith(t, lab.Options{AgentConfig: map[string]string{lab.RemoteDC: "seeds: [" + seedDir + "]"}}, "40mbit", "20ms")
	cases := []struct {
		name    string
		convert []string // how qemu-img makes the seed of the guest's disk
		spoil   func(path string) error
	}{
		{"whole", []string{"-c", "-O", "qcow2"}, nil},
		{"overwritten in the middle", []string{"-O", "raw"}, overwrite},
		{"deleted in the middle", []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}, os.Remove},
	}
	if !soaking {
		cases = cases[:1]
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := &world{w.Lab, t}
			v := w.vm(lab.VMOptions{Name: "guest", Memory: 192 << 20, Disks: []lab.DiskOptions{disk(t, "256MiB")}, Write: 256 << 10, WorkingSet: 16 << 20})
			defer func() {
				if err := v.Remove(t.Context()); err != nil {
					t.Error(err)
				}
			}()
			image := w.seed(strings.ReplaceAll(c.name, " ", "-"), w.path(lab.LocalDC, v.Disks[0]), c.convert)
			defer os.RemoveAll(filepath.Dir(image))
			move := w.begin("guest", "--paused", "--keep-source")
			if c.spoil != nil {
				s := w.await(lab.LocalDC, move, "content found in the seed", func(s migrate.Status) bool {
					return len(s.Disks) > 0 && s.Disks[0].Reduction.Seed.Bytes > 0
				})
				if err := c.spoil(image); err != nil {
					t.Fatal(err)
				}
				if s.Disks[0].Done == s.Disks[0].Size {
					t.Fatal("the disk had crossed before")
				}
				t.Logf("spoiled after %d MiB", s.Disks[0].Reduction.Seed.Bytes>>20)
			}
			s := w.await(lab.LocalDC, move, "its end", final)
			if s.Phase != migrate.PhaseDone {
				t.Fatalf("ended as %+v", s.Result)
			}
			d := s.Disks[0]
			t.Logf("of %d MiB sent %d MiB were held, %d MiB in the seed; %d KiB crossed the line", d.Sent>>20, d.Held>>20, d.Reduction.Seed.Bytes>>20, d.Wire>>10)
			if c.spoil == nil && (d.Held*10 < d.Sent*8 || d.Reduction.Seed.Bytes*10 < d.Sent*8) {
				t.Errorf("less than 80 %% came from the seed: %+v", d)
			}
			w.same("raw", w.path(lab.LocalDC, v.Disks[0]), w.path(lab.RemoteDC, v.Disks[0]))
			if _, complaint, status := w.run(lab.RemoteDC, "virsh", "resume", "guest"); status != 0 {
				t.Fatal(complaint)
			}
			w.healthy(lab.RemoteDC, v)
		})
	}
}

// seed makes an image of a disk at the destination and waits until it is indexed.
func (w *world) seed(name, of string, convert []string) (image string) {
	w.t.Helper()
	image = filepath.Join(w.path(lab.RemoteDC, seedDir), name)
	if err := os.MkdirAll(filepath.Dir(image), 0o755); err != nil {
		w.t.Fatal(err)
	}
	args := append(append([]string{"convert", "-U", "-f", "raw"}, convert...), of, image)
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		w.t.Fatalf("make a seed: %v: %s", err, out)
	}
	var out string
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		out = strings.TrimSpace(w.wanmig(lab.RemoteDC, "seeds", "--scan", "--json"))
		var s seed.Status
		if json.Unmarshal([]byte(out), &s) == nil && s.State == seed.Ready && s.Pages > 0 && !s.Changed {
			return image
		}
	}
	w.t.Fatalf("the seed is not indexed: %s", out)
	return ""
}

// overwrite replaces all of a file's content by other bytes, in its place.
func overwrite(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	for at := int64(0); err == nil && at < info.Size(); at += 1 << 20 {
		_, err = f.WriteAt([]byte(strings.Repeat("spoiled\n", 1<<17)), at)
	}
	if err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
