package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// accelerator is kvm if a guest starts with it here, else tcg. That /dev/kvm exists says little where KVM is itself
// emulated, so a guest is started; the answer holds until the machine is booted again.
func (im *Images) accelerator(ctx context.Context) (string, error) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "tcg", nil
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("try KVM: %w", err)
	}
	boot, err := im.boot(ctx, cloudKernel)
	if err != nil {
		return "", err
	}
	unlock, err := im.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	path, err := im.make("accel-"+strings.TrimSpace(string(id)), func(path string) error {
		old, _ := filepath.Glob(filepath.Join(im.dir, "accel-*"))
		for _, o := range old {
			os.Remove(o)
		}
		accel := "tcg"
		if startsWithKVM(ctx, boot) {
			accel = "kvm"
		}
		if ctx.Err() != nil {
			return fmt.Errorf("try KVM: %w", context.Cause(ctx))
		}
		return os.WriteFile(path, []byte(accel), 0o644)
	})
	if err != nil {
		return "", err
	}
	accel, err := os.ReadFile(path)
	return string(accel), err
}

const kvmTimeout = 8 * time.Second

// startsWithKVM starts a guest without devices and looks for the first words of its init on the serial line.
func startsWithKVM(ctx context.Context, boot image) bool {
	ctx, cancel := context.WithTimeout(ctx, kvmTimeout)
	defer cancel()
	said := &awaited{words: []byte("wanlab-guest starts"), heard: cancel}
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "kvm", "-m", "128", "-nodefaults", "-no-reboot", "-display", "none",
		"-serial", "stdio", "-kernel", boot.kernel, "-initrd", boot.initrd, "-append", "console=ttyS0 quiet panic=-1")
	qemu.Stdout = said
	qemu.WaitDelay = time.Second
	// It is always killed, or ends by itself without having said anything.
	_ = qemu.Run()
	return bytes.Contains(said.text, said.words)
}

// awaited calls heard when the words were written to it.
type awaited struct {
	words []byte
	heard func()
	text  []byte
}

var errTooMuch = errors.New("too much output")

func (a *awaited) Write(p []byte) (int, error) {
	if len(a.text) > 1<<20 {
		return 0, errTooMuch
	}
	a.text = append(a.text, p...)
	if bytes.Contains(a.text, a.words) {
		a.heard()
	}
	return len(p), nil
}
