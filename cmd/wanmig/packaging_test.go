package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/wanmig/wanmig/agent"
)

// TestPackagedConfig holds packaging/agent.yaml to what it says of itself: its
// values are the defaults, and the line that is commented out is valid.
func TestPackagedConfig(t *testing.T) {
	load := func(text []byte) agent.Config {
		t.Helper()
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := agent.LoadConfig(path)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	packaged, err := os.ReadFile("../../packaging/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := load(packaged), load(nil); !reflect.DeepEqual(got, want) {
		t.Errorf("the packaged configuration is %+v, the defaults are %+v", got, want)
	}
	if c := load(bytes.Replace(packaged, []byte("\n#site:"), []byte("\nsite:"), 1)); c.Site != "north" {
		t.Errorf("the site is %q", c.Site)
	}
}
