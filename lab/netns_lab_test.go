//go:build lab

package lab

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNamesOfNamespacesCanBeRemovedAfterIPNetns has ip netns come to a machine,
// here to a mount namespace, where a lab has named namespaces already.
func TestNamesOfNamespacesCanBeRemovedAfterIPNetns(t *testing.T) {
	enter := func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		return unix.Mount("tmpfs", "/run", "tmpfs", 0, "")
	}
	ctx, cancel := context.WithTimeout(t.Context(), busyTimeout)
	defer cancel()
	names := []string{"wanlab-test-one", "wanlab-test-two"}
	err := onThread(enter, func() error {
		for _, name := range names {
			if err := nameNamespace(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), name); err != nil {
				return err
			}
		}
		if out, err := exec.Command("ip", "netns", "add", "wanlab-test-ip").CombinedOutput(); err != nil {
			return fmt.Errorf("ip netns: %w: %s", err, out)
		}
		for _, name := range append(names, "wanlab-test-ip") {
			if err := removeNamespace(ctx, name); err != nil {
				return err
			}
		}
		out, err := exec.Command("cat", "/proc/self/mountinfo").Output()
		if err != nil {
			return err
		}
		if strings.Contains(string(out), "wanlab-test") {
			return fmt.Errorf("mounts are left:\n%s", out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
