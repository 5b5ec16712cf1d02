package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestVirtioPort(t *testing.T) {
	dir := t.TempDir()
	for port, name := range map[string]string{"vport0p1": "com.redhat.spice.0\n", "vport1p1": guestAgentPort + "\n", "vport2p1": guestAgentPort + "1\n"} {
		if err := os.Mkdir(filepath.Join(dir, port), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, port, "name"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if device, ok := virtioPort(dir, guestAgentPort); !ok || device != "vport1p1" {
		t.Errorf("found %q, %v", device, ok)
	}
	if device, ok := virtioPort(dir, "org.example"); ok {
		t.Errorf("found %q for a port that is not there", device)
	}
	if _, ok := virtioPort(filepath.Join(dir, "none"), guestAgentPort); ok {
		t.Error("found a port without a driver")
	}
}
