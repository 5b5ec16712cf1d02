package main

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
)

// connectionFlags are those of a move that tell how connections go on.
func connectionFlags(cmd *cobra.Command, req *migrate.Request) {
	f := cmd.Flags()
	f.Var(choice[netredirect.Kind]{&req.Redirect, slices.Concat([]netredirect.Kind{netredirect.Auto}, netredirect.Kinds, []netredirect.Kind{netredirect.None})},
		"redirect", "how packets for the VM's addresses follow it")
	f.Var((*longest)(&req.RedirectMax), "redirect-max", "remove the tunnel after this time at the latest, as in 12h")
	f.Var(choice[netredirect.Mode]{&req.Addresses, []netredirect.Mode{netredirect.Keep, netredirect.New}},
		"addresses", "keep the VM's addresses (routes move) or give it new ones (DNS moves)")
	f.Var(choice[netredirect.Egress]{&req.Egress, []netredirect.Egress{netredirect.EgressTunnel, netredirect.EgressDirect}},
		"egress", "the way of connections that the VM opens while the tunnel stands")
	f.Var(addresses(req.VMAddresses), "address", "an address of the VM's interface with this MAC, tap or bridge; repeatable")
	f.BoolVar(&req.LowerTTL, "lower-ttl", false, "lower the TTL of the VM's DNS names ahead of the change")
	f.Var((*dnsNames)(&req.DNSNames), "dns-name", "a DNS `NAME` of the VM beside those that PTR records tell; repeatable")
}

// checkConnectionFlags refuses flags that contradict each other.
func checkConnectionFlags(cmd *cobra.Command, req migrate.Request) error {
	given := func(names ...string) string {
		i := slices.IndexFunc(names, cmd.Flags().Changed)
		if i < 0 {
			return ""
		}
		return names[i]
	}
	if flag := given("redirect-max", "addresses", "egress", "address", "lower-ttl", "dns-name"); req.Redirect == netredirect.None && flag != "" {
		return fmt.Errorf("--%s asks for a redirect, and --redirect none for no redirect: leave one of them out", flag)
	}
	if flag := given("lower-ttl", "dns-name"); req.Addresses == netredirect.Keep && flag != "" {
		return fmt.Errorf("--%s is of --addresses new: with --addresses keep no DNS record changes", flag)
	}
	return nil
}

// choice is the value of a flag that is one of a few words.
type choice[T ~string] struct {
	to   *T
	from []T
}

func (c choice[T]) Set(s string) error {
	if !slices.Contains(c.from, T(s)) {
		return fmt.Errorf("there are %s", strings.ReplaceAll(c.Type(), "|", ", "))
	}
	*c.to = T(s)
	return nil
}

func (c choice[T]) Type() string {
	var words []string
	for _, w := range c.from {
		words = append(words, string(w))
	}
	return strings.Join(words, "|")
}

func (c choice[T]) String() string { return "" }

// longest is the value of --redirect-max.
type longest time.Duration

func (l *longest) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return errors.New("want a time as in 30m or 12h")
	}
	if err := (netredirect.Options{Kind: netredirect.Auto, Max: d}).Validate(); err != nil {
		return err
	}
	*l = longest(d)
	return nil
}

func (l *longest) Type() string   { return "DURATION" }
func (l *longest) String() string { return "" }

// addresses is the value of the repeatable flag NIC=IP.
type addresses map[string][]netip.Addr

func (a addresses) Set(s string) error {
	nic, text, ok := strings.Cut(s, "=")
	if !ok || nic == "" {
		return errors.New("want NIC=IP, NIC being a MAC, tap or bridge")
	}
	ip, err := netip.ParseAddr(text)
	if err != nil || ip.Zone() != "" {
		return fmt.Errorf("%q is no IPv4 or IPv6 address", text)
	}
	if ip = ip.Unmap(); !ip.IsGlobalUnicast() {
		return fmt.Errorf("%s can't be routed to the VM", ip)
	}
	if !slices.Contains(a[nic], ip) {
		a[nic] = append(a[nic], ip)
	}
	return nil
}

func (a addresses) Type() string   { return "NIC=IP" }
func (a addresses) String() string { return "" }

// dnsNames is the value of the repeatable flag --dns-name.
type dnsNames []string

// dnsName is a host's name in a zone (RFC 1123), also with a dot at its end.
var dnsName = regexp.MustCompile(`^([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.?$`)

func (n *dnsNames) Set(s string) error {
	if len(s) > 254 || !dnsName.MatchString(s) {
		return errors.New("want a whole name as in www.example.org")
	}
	*n = append(*n, s)
	return nil
}

func (n *dnsNames) Type() string   { return "NAME" }
func (n *dnsNames) String() string { return "" }

// mapping is the value of a repeatable flag SRC=DST.
type mapping map[string]string

func (m mapping) Set(s string) error {
	src, dst, ok := strings.Cut(s, "=")
	if !ok || src == "" || dst == "" {
		return errors.New("want SRC=DST")
	}
	if before, twice := m[src]; twice && before != dst {
		return fmt.Errorf("%s is mapped to %s already", src, before)
	}
	m[src] = dst
	return nil
}

func (m mapping) Type() string   { return "SRC=DST" }
func (m mapping) String() string { return "" }
