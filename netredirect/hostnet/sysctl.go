package hostnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

const sysctlRoot = "/proc/sys/"

// Sysctl returns the value of a key like net/ipv4/conf/br0/forwarding. The error
// of one that is not there wraps fs.ErrNotExist.
func (h *Host) Sysctl(key string) (string, error) {
	if err := checkSysctlKey(key); err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	value, err := os.ReadFile(sysctlRoot + key)
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(value)), nil
}

func (c *Sysctl) apply(_ context.Context, h *Host) error {
	value, err := h.Sysctl(c.Key)
	if err != nil || value == c.Value {
		return err
	}
	return writeSysctl(c.Key, c.Value)
}

func (c *Sysctl) revert(_ context.Context, h *Host) error {
	value, err := h.Sysctl(c.Key)
	if errors.Is(err, fs.ErrNotExist) || err == nil && value != c.Value {
		return nil
	}
	if err != nil {
		return err
	}
	if err := writeSysctl(c.Key, c.Was); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func writeSysctl(key, value string) error {
	f, err := os.OpenFile(sysctlRoot+key, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	_, err = f.WriteString(value)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	return nil
}
