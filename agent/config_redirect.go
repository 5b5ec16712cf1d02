package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/wanmig/wanmig/netredirect"
)

// RedirectConfig says how connections of moved VMs go on.
type RedirectConfig struct {
	Kind   netredirect.Kind   `yaml:"kind"`   // auto, ipip, ipip-user, quic or none
	Egress netredirect.Egress `yaml:"egress"` // tunnel or direct
	Max    time.Duration      `yaml:"max"`    // the longest that a tunnel stays
	Quiet  time.Duration      `yaml:"quiet"`  // unused for this long, it may go
}

// AddressConfig says what becomes of the addresses of VMs that arrive here.
type AddressConfig struct {
	Mode netredirect.Mode `yaml:"mode"` // keep or new
	Pool []netip.Prefix   `yaml:"pool"` // of new addresses
}

// DNSConfig is where the records of VMs that arrive here are kept.
type DNSConfig struct {
	Servers []string      `yaml:"servers"`  // authoritative servers: host or host:port
	KeyFile string        `yaml:"key_file"` // TSIG key, as tsig-keygen prints it
	Zones   []string      `yaml:"zones"`
	TTL     time.Duration `yaml:"ttl"` // while a VM moves
}

// BGPConfig is how routes to VMs that arrive here are announced.
type BGPConfig struct {
	ASN         uint32          `yaml:"asn"`
	RouterID    netip.Addr      `yaml:"router_id"`
	NextHops    []netip.Addr    `yaml:"next_hops"` // at most one of each family
	Communities []string        `yaml:"communities"`
	LocalPref   uint32          `yaml:"local_pref"`
	Peers       []BGPPeerConfig `yaml:"peers"`
}

// BGPPeerConfig is one BGP neighbour.
type BGPPeerConfig struct {
	Address      netip.Addr `yaml:"address"`
	ASN          uint32     `yaml:"asn"`
	Local        netip.Addr `yaml:"local"`
	Port         uint16     `yaml:"port"`
	Multihop     uint8      `yaml:"multihop"`
	PasswordFile string     `yaml:"password_file"`
	Watch        bool       `yaml:"watch"` // nothing is announced to it
}

// HooksConfig names programs that are run at moments of a move.
type HooksConfig struct {
	BeforeStop  string        `yaml:"before_stop"`  // at the source, before the guest is stopped
	AfterResume string        `yaml:"after_resume"` // at both, when it runs at the destination
	AfterSettle string        `yaml:"after_settle"` // at both, when the tunnel is gone
	Timeout     time.Duration `yaml:"timeout"`      // of each
}

func (c Config) checkRedirect() error {
	r := c.Redirect
	o := netredirect.Options{Kind: r.Kind, Mode: c.Addresses.Mode, Egress: r.Egress, Max: r.Max, Quiet: r.Quiet}
	if err := o.Validate(); err != nil {
		return fmt.Errorf("redirect: %w", err)
	}
	if r.Max == 0 {
		return errors.New("redirect.max: 0s: a tunnel has to stay for some time, or not be there: kind: none")
	}
	if c.Addresses.Mode == netredirect.New && len(c.Addresses.Pool) == 0 {
		return errors.New("addresses.pool: mode new needs addresses to give")
	}
	for _, p := range c.Addresses.Pool {
		if p != p.Masked() {
			return fmt.Errorf("addresses.pool: %s has bits beyond its length: write %s", p, p.Masked())
		}
	}
	if err := c.checkServices(); err != nil {
		return err
	}
	for key, path := range c.Hooks.programs() {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("hooks.%s: %q must begin with /", key, path)
		}
	}
	if c.Hooks.Timeout < time.Second || c.Hooks.Timeout > 10*time.Minute {
		return fmt.Errorf("hooks.timeout: %v: want 1s to 10m", c.Hooks.Timeout)
	}
	return nil
}

// checkServices checks what is said of DNS and BGP, as far as it can be without
// asking them.
func (c Config) checkServices() error {
	if c.DNS != nil {
		if err := c.DNS.names().Validate(); err != nil {
			return err
		}
		if !filepath.IsAbs(c.DNS.KeyFile) {
			return fmt.Errorf("dns.key_file: %q must begin with /", c.DNS.KeyFile)
		}
	}
	if c.BGP == nil {
		return nil
	}
	seen := map[bool]bool{}
	for _, a := range c.BGP.NextHops {
		if seen[a.Is4()] {
			return errors.New("bgp.next_hops: at most one of each family")
		}
		seen[a.Is4()] = true
	}
	if err := c.BGP.routes().Validate(); err != nil {
		return fmt.Errorf("bgp: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}

func (h HooksConfig) programs() map[string]string {
	return map[string]string{"before_stop": h.BeforeStop, "after_resume": h.AfterResume, "after_settle": h.AfterSettle}
}
