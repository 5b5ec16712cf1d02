package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/netredirect"
)

// Where an agent keeps things when its configuration does not say.
const (
	DefaultConfig = "/etc/wanmig/agent.yaml"
	DefaultAPI    = "/run/wanmig/agent.sock"
	DefaultState  = "/var/lib/wanmig"
	DefaultListen = ":7946"
)

// Config is the agent's configuration file.
type Config struct {
	Site    string       `yaml:"site"`    // this site's name, as peers may show it
	Listen  string       `yaml:"listen"`  // host:port for peers, UDP and TCP
	Qlog    string       `yaml:"qlog"`    // folder for what QUIC connections do; empty: none
	API     string       `yaml:"api"`     // unix socket for the command
	State   string       `yaml:"state"`   // folder: identity, sites, journal
	Libvirt string       `yaml:"libvirt"` // libvirtd's unix socket
	Outbox  OutboxConfig `yaml:"outbox"`

	Rates     RatesConfig     `yaml:"rates"` // of what this host sends to other sites
	Reduction ReductionConfig `yaml:"reduction"`
	Seeds     []string        `yaml:"seeds"` // folders, files and block devices whose content need not be sent here

	Redirect  RedirectConfig `yaml:"redirect"`
	Addresses AddressConfig  `yaml:"addresses"`
	DNS       *DNSConfig     `yaml:"dns"`
	BGP       *BGPConfig     `yaml:"bgp"`
	Hooks     HooksConfig    `yaml:"hooks"`
}

// OutboxConfig bounds what a move may keep of disk blocks that were written
// faster than the link carries them. Beyond both the guest's mirror waits.
type OutboxConfig struct {
	Memory Size   `yaml:"memory"` // per move
	Spool  Size   `yaml:"spool"`  // per move, on disk
	Dir    string `yaml:"dir"`    // where the spool files are; the state folder's "spool"
}

// ReductionConfig bounds what is kept so that it need not be sent again. The
// smaller bound of the two sides holds.
type ReductionConfig struct {
	Memory    Size          `yaml:"memory"`     // of a guest's memory, per move; 0 is off
	Keep      time.Duration `yaml:"keep"`       // what has arrived of a move that did not end; 0 removes it at once
	KeepSpace Size          `yaml:"keep_space"` // of storage, for all of that
}

// Size is a number of bytes, written as in 256MiB.
type Size int64

// UnmarshalYAML reads a size with its unit.
func (s *Size) UnmarshalYAML(n *yaml.Node) error {
	v, err := units.RAMInBytes(n.Value)
	if err != nil || v < 0 {
		return fmt.Errorf("line %d: %q is not a size: write it as 256MiB or 16GiB", n.Line, n.Value)
	}
	*s = Size(v)
	return nil
}

var siteName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// LoadConfig reads a configuration file. A file that is not there is an error,
// unless it is the default one.
func LoadConfig(path string) (Config, error) {
	c := Config{Listen: DefaultListen, API: DefaultAPI, State: DefaultState, Libvirt: hypervisor.DefaultSocket,
		Outbox:    OutboxConfig{Memory: 256 << 20, Spool: 16 << 30},
		Reduction: ReductionConfig{Memory: 256 << 20, Keep: 24 * time.Hour, KeepSpace: 64 << 30},
		Redirect:  RedirectConfig{Kind: netredirect.Auto, Egress: netredirect.EgressTunnel, Max: 24 * time.Hour, Quiet: time.Minute},
		Addresses: AddressConfig{Mode: netredirect.Keep},
		Hooks:     HooksConfig{Timeout: 10 * time.Second}}
	b, err := os.ReadFile(path)
	if err != nil && !(errors.Is(err, os.ErrNotExist) && path == DefaultConfig) {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return c, fmt.Errorf("configuration %s: %s", path, explainYAML(err))
	}
	if c.Site == "" {
		c.Site, _ = os.Hostname()
	}
	if c.Outbox.Dir == "" {
		c.Outbox.Dir = filepath.Join(c.State, "spool")
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// explainYAML makes one line of the decoder's complaint, and tells which keys exist.
func explainYAML(err error) string {
	s := strings.Join(strings.Fields(strings.TrimPrefix(err.Error(), "yaml: ")), " ")
	s = strings.TrimPrefix(s, "unmarshal errors: ")
	for kind, keys := range map[string]string{
		"OutboxConfig":    "in outbox: there are memory, spool, dir",
		"ReductionConfig": "in reduction: there are memory, keep, keep_space",
		"RateConfig":      "in rates: there are site, rate, windows",
		"WindowConfig":    "in windows of rates: there are days, from, to, rate",
		"RedirectConfig":  "in redirect: there are kind, egress, max, quiet",
		"AddressConfig":   "in addresses: there are mode, pool",
		"DNSConfig":       "in dns: there are servers, key_file, zones, ttl",
		"BGPConfig":       "in bgp: there are asn, router_id, next_hops, communities, local_pref, peers",
		"BGPPeerConfig":   "in bgp.peers: there are address, asn, local, port, multihop, password_file, watch",
		"HooksConfig":     "in hooks: there are before_stop, after_resume, after_settle, timeout",
		"Config":          ": there are site, listen, api, state, libvirt, outbox, rates, reduction, seeds, redirect, addresses, dns, bgp, hooks",
	} {
		s = strings.ReplaceAll(s, "not found in type agent."+kind, strings.Replace("is unknown "+keys, " :", ":", 1))
	}
	return s
}

func (c Config) check() error {
	if !siteName.MatchString(c.Site) {
		return fmt.Errorf("site: %q is not a name: use letters, digits, dots and dashes", c.Site)
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen: %q is not host:port", c.Listen)
	}
	for key, path := range map[string]string{"api": c.API, "state": c.State, "libvirt": c.Libvirt, "outbox.dir": c.Outbox.Dir} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%s: %q must begin with /", key, path)
		}
	}
	for _, path := range c.Seeds {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("seeds: %q must begin with /", path)
		}
	}
	if c.Outbox.Memory < 1<<20 {
		return errors.New("outbox.memory: at least 1MiB is needed")
	}
	if c.Reduction.Keep < 0 {
		return fmt.Errorf("reduction.keep: %v is no time to keep something", c.Reduction.Keep)
	}
	if err := c.Rates.check(); err != nil {
		return err
	}
	return c.checkRedirect()
}
