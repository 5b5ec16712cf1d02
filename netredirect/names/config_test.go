package names

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestServerAddress(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"10.0.0.1", "10.0.0.1:53"},
		{"10.0.0.1:5353", "10.0.0.1:5353"},
		{"fd00::1", "[fd00::1]:53"},
		{"[fd00::1]:5353", "[fd00::1]:5353"},
		{"ns1.example.test", "ns1.example.test:53"},
		{"ns1.example.test:5353", "ns1.example.test:5353"},
		{"", ""}, {".", ""}, {":53", ""}, {"10.0.0.1:0", ""}, {"10.0.0.1:65536", ""}, {"10.0.0.1:domain", ""},
		{"10.0.0.1:", ""}, {"ns1 example", ""}, {"ns1..example", ""}, {"[fd00::1", ""}, {"ns1/24", ""}, {"ns\x00", ""},
	} {
		got, err := serverAddress(tt.in)
		if got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("%q: %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
}

func TestValidate(t *testing.T) {
	valid := func() Config { return Config{Servers: []string{"10.0.0.1"}, KeyFile: "key"} }
	if err := valid().Validate(); err != nil {
		t.Error(err)
	}
	for _, tt := range []struct {
		want string
		with func(*Config)
	}{
		{"servers", func(c *Config) { c.Servers = nil }},
		{"servers", func(c *Config) { c.Servers = make([]string, maxServers+1) }},
		{`"a b"`, func(c *Config) { c.Servers = append(c.Servers, "a b") }},
		{"key file", func(c *Config) { c.KeyFile = "" }},
		{"zones", func(c *Config) { c.Zones = []string{"example.test", ""} }},
		{"zones", func(c *Config) { c.Zones = []string{"."} }},
		{"zones", func(c *Config) { c.Zones = []string{"a..b"} }},
		{"ttl", func(c *Config) { c.TTL = 500 * time.Millisecond }},
		{"ttl", func(c *Config) { c.TTL = 1500 * time.Millisecond }},
		{"ttl", func(c *Config) { c.TTL = -time.Second }},
		{"ttl", func(c *Config) { c.TTL = 25 * time.Hour }},
		{"timeout", func(c *Config) { c.Timeout = -1 }},
		{"timeout", func(c *Config) { c.Timeout = time.Hour }},
	} {
		c := valid()
		tt.with(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: error %v, want %q", c, err, tt.want)
		}
		if _, err := New(c); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}

func TestSilentServersComeLast(t *testing.T) {
	c := testClient(t, "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.1:53")
	c.heard("10.0.0.1:53", false)
	c.heard("10.9.9.9:53", false) // not configured
	if got := c.inOrder(); !slices.Equal(got, []string{"10.0.0.2:53", "10.0.0.3:53", "10.0.0.1:53"}) {
		t.Errorf("order %v", got)
	}
	c.heard("10.0.0.1:53", true)
	if got := c.inOrder(); !slices.Equal(got, []string{"10.0.0.1:53", "10.0.0.2:53", "10.0.0.3:53"}) || len(c.silent) > 0 {
		t.Errorf("order %v, silent %v", got, c.silent)
	}
}

func testClient(t *testing.T, servers ...string) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wanmig.key")
	if err := os.WriteFile(path, []byte(testKey), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{Servers: servers, KeyFile: path, Timeout: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
