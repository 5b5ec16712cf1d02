package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestServiceIsInstalledWhereSystemdLooks(t *testing.T) {
	root := t.TempDir()
	program := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(program, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := installService(root, program); err != nil {
		t.Fatal(err)
	}
	installed, err := os.ReadFile(root + serviceProgram)
	if err != nil || string(installed) != "program" {
		t.Errorf("program: %q, %v", installed, err)
	}
	if info, err := os.Stat(root + serviceProgram); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("program: %v, %v", info.Mode(), err)
	}
	// systemd.unit(5): a link to a unit in the directory TARGET.wants pulls it in.
	target, err := os.Readlink(root + serviceWanted)
	if err != nil || target != serviceUnit || filepath.Base(serviceWanted) != filepath.Base(serviceUnit) {
		t.Errorf("wanted by a link to %q, %v", target, err)
	}
	unit, err := os.ReadFile(root + serviceUnit)
	if err != nil || !strings.Contains(string(unit), "\nExecStart="+serviceProgram+" "+serviceArgument+"\n") {
		t.Errorf("unit: %q, %v", unit, err)
	}
}
