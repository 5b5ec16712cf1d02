package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"testing"

	"github.com/wanmig/wanmig/agent"
	"github.com/wanmig/wanmig/netredirect/names"
)

// TestPackagedConfig holds packaging/agent.yaml to what it says of itself: its
// values are the defaults, and the keys that are commented out are valid.
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
	// Comments have a blank after their sign, keys have none, or are indented.
	keys := regexp.MustCompile(`(?m)^#([a-z]|  )`)
	c := load(keys.ReplaceAll(packaged, []byte("$1")))
	if c.Site != "north" || len(c.Addresses.Pool) != 2 || c.DNS == nil || c.BGP == nil {
		t.Fatalf("with every key the configuration is %+v", c)
	}
	if len(c.Rates) != 2 || c.Rates[1].Site != "south" || len(c.Rates[1].Windows) != 2 || len(c.Rates[1].Windows[0].Days) != 5 || c.Rates[1].Windows[1].Rate != 0 {
		t.Errorf("rates are %+v", c.Rates)
	}
	if len(c.DNS.Servers) != 2 || len(c.DNS.Zones) != 2 || c.DNS.TTL != names.DefaultTTL {
		t.Errorf("DNS is %+v", *c.DNS)
	}
	if len(c.BGP.NextHops) != 2 || len(c.BGP.Communities) != 1 || len(c.BGP.Peers) != 1 || c.BGP.Peers[0].Multihop != 2 || c.BGP.Peers[0].PasswordFile == "" {
		t.Errorf("BGP is %+v", *c.BGP)
	}
}
