package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// serveWait is how long qemu-nbd may take to open an image.
const serveWait = 20 * time.Second

// ServeImage has a qemu-nbd of its own serve an image to read, as it is now on
// the storage: a running guest's QEMU may know of newer tables. The process ends
// with ctx or the connection, and stop waits for it.
func (h *Host) ServeImage(ctx context.Context, path, format string) (conn net.Conn, stop func() error, err error) {
	dir, err := os.MkdirTemp("", "wanmig-read-")
	if err != nil {
		return nil, nil, fmt.Errorf("read image %s: %w", path, err)
	}
	socket := filepath.Join(dir, "nbd")
	ctx, cancel := context.WithCancel(ctx)
	// What stands between commas is an option; a comma of the path is doubled.
	options := fmt.Sprintf("driver=%s,read-only=on,force-share=on,file.driver=file,file.filename=%s", format, strings.ReplaceAll(path, ",", ",,"))
	cmd := exec.CommandContext(ctx, "qemu-nbd", "--image-opts", "--read-only", "--socket="+socket, options)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, nil, errors.Join(fmt.Errorf("read image %s: %w (install qemu-utils, or qemu-img on RHEL)", path, err), os.RemoveAll(dir))
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }() // what it complains of says more than its status
	stop = func() error {
		cancel()
		<-ended
		return os.RemoveAll(dir)
	}
	var d net.Dialer
	for until := time.Now().Add(serveWait); ; {
		if conn, err = d.DialContext(ctx, "unix", socket); err == nil {
			return conn, stop, nil
		}
		select {
		case <-ended:
			err = fmt.Errorf("read image %s: qemu-nbd: %s", path, strings.TrimSpace(complaint.String()))
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-time.After(2 * time.Millisecond):
			if time.Now().Before(until) {
				continue
			}
			err = fmt.Errorf("read image %s: qemu-nbd does not answer: %w", path, err)
		}
		return nil, nil, errors.Join(err, stop())
	}
}
