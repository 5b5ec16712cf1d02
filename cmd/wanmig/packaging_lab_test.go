//go:build lab

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPackagedUnit has systemd read the agent's unit: it knows every setting, and
// has nothing to say.
func TestPackagedUnit(t *testing.T) {
	unit, err := os.ReadFile("../../packaging/wanmig-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	verify := func(text []byte) string {
		t.Helper()
		// systemd looks whether the program is there.
		text = bytes.Replace(text, []byte("=/usr/bin/wanmig "), []byte("="+self+" "), 1)
		path := filepath.Join(t.TempDir(), "wanmig-agent.service")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		said, err := exec.Command("systemd-analyze", "verify", "--man=no", path).CombinedOutput()
		if err != nil && len(said) == 0 {
			t.Fatal(err)
		}
		return string(said)
	}
	if said := verify(unit); said != "" {
		t.Errorf("systemd says of the unit: %s", said)
	}
	if said := verify(append(unit, "[Service]\nRestrictAddresses=AF_PACKET\n"...)); !strings.Contains(said, "RestrictAddresses") {
		t.Errorf("systemd says of a wrong setting: %q", said)
	}
}
