package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/blocksync/nbd"
	"github.com/wanmig/wanmig/compress"
	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/memsync"
	"github.com/wanmig/wanmig/tunnel"
)

// createDisks makes the disks, or takes older copies of them. What will be made
// stands in the journal before it is made, and never what stood there before:
// that is not ours to remove.
func (in *incoming) createDisks(ctx context.Context) error {
	var paths []string
	var size int64
	var replaced []handoff.Copy
	in.older = map[string]handoff.Copy{}
	in.entry.Arriving = nil
	for _, d := range in.ask.Disks {
		size += min(d.Allocated, d.Size)
		if d.Block {
			continue
		}
		c, known := in.olderCopy(in.ask.UUID, d)
		_, err := os.Lstat(d.Path)
		switch {
		case known && fits(c, d) && !in.ask.Fresh:
			in.older[d.Target] = c
		case known && (in.ask.Fresh || !c.Kept()):
			replaced = append(replaced, c)
			known = false
		case !errors.Is(err, os.ErrNotExist):
			return fmt.Errorf("disk %s: %s exists at the destination: remove it, or choose another place with --storage", d.Target, d.Path)
		}
		arriving := in.arriving(in.ask, d)
		if known && c.Kept() {
			arriving.Until = c.Until
		} else {
			paths = append(paths, d.Path)
		}
		if !d.Static {
			in.entry.Arriving = append(in.entry.Arriving, arriving)
		}
	}
	const most = 4 << 40 // beyond it the index of content forgets
	have, err := blocksync.NewContent(min(size, most))
	if err != nil {
		return err
	}
	in.have, in.entry.Created = have, paths
	if !in.ask.Fresh {
		if in.memory, err = in.openMemory(in.ask.UUID); err != nil {
			in.log.Warn("the memory that the guest had here is not used", "error", err)
		} else if in.memory != nil {
			in.have.Seed(in.memory, compress.OnOld)
		}
	}
	in.seeds = in.Seeds.Images()
	for _, img := range in.seeds {
		have.Seed(img, compress.OnSeed)
	}
	if err := in.Journal.Put(in.entry); err != nil {
		in.entry.Created, in.entry.Arriving = nil, nil
		return err
	}
	for _, c := range replaced {
		if err := in.takeCopy(c); err != nil {
			return err
		}
		if err := in.Host.RemoveDisk(ctx, c.Path); err != nil {
			return err
		}
	}
	for _, d := range in.ask.Disks {
		if c, ok := in.older[d.Target]; ok {
			if err := in.takeCopy(c); err != nil {
				return err
			}
			continue
		}
		err := in.Host.CreateDisk(ctx, d.spec())
		if errors.Is(err, hypervisor.ErrExists) {
			in.entry.Created = slices.DeleteFunc(in.entry.Created, func(p string) bool { return p == d.Path })
			in.entry.Arriving = slices.DeleteFunc(in.entry.Arriving, func(c handoff.Copy) bool { return c.Path == d.Path })
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// receiveDisk writes one disk through the destination's QEMU, or a static image
// into its file, until it is complete and durable.
func (in *incoming) receiveDisk(ctx context.Context, d wireDisk, ch *tunnel.Channel) error {
	dev, closeDev, err := in.openDisk(ctx, d)
	if err != nil {
		return err
	}
	defer closeDev()
	_, older := in.older[d.Target]
	// A device has something older in any case, which may be the same disk.
	older = older || d.Block && d.Format == "raw" && !in.ask.Fresh
	if err := blocksync.NewTarget(dev, in.have, older).Run(ctx, ch, ch); err != nil {
		return err
	}
	if in.disks.Add(-1) == 0 {
		close(in.durable)
	}
	return nil
}

func (in *incoming) openDisk(ctx context.Context, d wireDisk) (nbd.Device, func() error, error) {
	if d.Static {
		f, err := openStatic(d.Path)
		if err != nil {
			return nil, nil, err
		}
		return f, f.Close, nil
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", in.nbdPath)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to QEMU's NBD server: %w", err)
	}
	client, err := nbd.NewClient(ctx, conn, d.Export)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	if client.Size() != d.Size {
		client.Close()
		return nil, nil, fmt.Errorf("%s has %d bytes here, %d at the source", d.Path, client.Size(), d.Size)
	}
	return client, client.Close, nil
}

// receiveMemory feeds the RAM stream to QEMU. Its tail waits for the disks.
func (in *incoming) receiveMemory(ctx context.Context, ch *tunnel.Channel) error {
	dial := func(ctx context.Context) (io.ReadWriteCloser, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", in.ramPath)
	}
	return memsync.NewDest(memsync.DestConfig{Frames: ch, Return: ch, Dial: dial, Gate: in.awaitDurable,
		OnEnd: func() { in.tailAt.Store(time.Now().UnixNano()) }, Store: in.PageStore, Have: in.have}).Run(ctx)
}
