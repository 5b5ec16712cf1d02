package hypervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// maxTool bounds what is kept of a tool's output.
const maxTool = 1 << 20

// image is what qemu-img tells of one file of a backing chain.
type image struct {
	Filename    string `json:"filename"`
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
	ActualSize  int64  `json:"actual-size"`
	ClusterSize int64  `json:"cluster-size"`
	Backing     string `json:"backing-filename"`
	Encrypted   bool   `json:"encrypted"`
	Snapshots   []struct {
		Name string `json:"name"`
	} `json:"snapshots"`
	Specific struct {
		Data struct {
			DataFile string `json:"data-file"`
		} `json:"data"`
	} `json:"format-specific"`
}

// inspect adds what libvirt does not tell. The format is always given, never
// probed: a guest can write any header into a raw disk.
func (d *Disk) inspect(ctx context.Context) error {
	out, err := runTool(ctx, "qemu-img", "info", "--force-share", "--backing-chain", "--output=json", "-f", d.Format, d.Path)
	if err != nil {
		return err
	}
	return d.readImages(out)
}

func (d *Disk) readImages(out []byte) error {
	var chain []image
	if err := json.Unmarshal(out, &chain); err != nil {
		return fmt.Errorf("read qemu-img's report on %s: %w", d.Path, err)
	}
	if len(chain) == 0 {
		return fmt.Errorf("read qemu-img's report on %s: it is empty", d.Path)
	}
	top := chain[0]
	if d.VirtualSize == 0 {
		d.VirtualSize = top.VirtualSize
	}
	d.ClusterSize = top.ClusterSize
	d.HasBacking = top.Backing != ""
	d.Encrypted = d.Encrypted || top.Encrypted
	d.ExternalData = top.Specific.Data.DataFile != ""
	d.Snapshots = len(top.Snapshots)
	for _, i := range chain {
		if i.ActualSize < 0 {
			return fmt.Errorf("read qemu-img's report on %s: allocation of %d bytes", i.Filename, i.ActualSize)
		}
		d.Allocated += i.ActualSize
	}
	if d.Type == "block" && d.Format == "raw" {
		d.Allocated = d.VirtualSize
	}
	// A chain may hold blocks that it has replaced since.
	if d.Format == "raw" || d.HasBacking {
		d.Allocated = min(d.Allocated, d.VirtualSize)
	}
	return nil
}

// runTool runs a program to its end and returns its output; its complaint
// becomes part of the error.
func runTool(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, complaint limitedBuffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("%w (install qemu-utils, or qemu-img on RHEL)", err)
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("%s %s: %w", name, args[0], context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("%s %s: %w: %s", name, args[0], err, strings.TrimSpace(complaint.String()))
	case out.cut:
		return nil, fmt.Errorf("%s %s: more than %d bytes of output", name, args[0], maxTool)
	}
	return out.Bytes(), nil
}

// limitedBuffer keeps the first maxTool bytes.
type limitedBuffer struct {
	bytes.Buffer
	cut bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxTool {
		b.cut = true
		b.Buffer.Write(p[:maxTool-b.Len()])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}
