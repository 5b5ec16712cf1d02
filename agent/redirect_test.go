package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/handoff"
	"github.com/wanmig/wanmig/netredirect"
)

// withRedirects prepares the state of an agent at which redirects of ended moves
// stand. Their plans are empty: nothing of the host's network changes.
func withRedirects(t *testing.T, records ...string) func(Config) {
	return func(c Config) {
		t.Helper()
		dir := filepath.Join(c.State, "redirects")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		journal, err := handoff.OpenJournal(filepath.Join(c.State, "journal.db"))
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range records {
			move := fmt.Sprintf("mv-redirect%d", i)
			text := fmt.Sprintf(`{"move":%q,"vm":"vm%d","uuid":"u%d","site":"south","priority":7000,"kind":"ipip","device":"wmk%d","options":{"kind":"ipip","quiet_ns":1000000000},
				"began":"2026-01-02T03:04:0%dZ","deadline":%q,%s}`, move, i, i, i, i, time.Now().Add(time.Hour).Format(time.RFC3339), r)
			if err := os.WriteFile(filepath.Join(dir, move+".json"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := journal.Put(handoff.Entry{Move: move, VM: "vm", State: handoff.Released}); err != nil {
				t.Fatal(err)
			}
		}
		if err := journal.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRedirectsAreServed(t *testing.T) {
	client, _ := start(t, "north", withRedirects(t,
		`"role":"source","state":"standing","nics":[{"mac":"52:54:00:00:00:01","bridge":"br0","bridge_mac":"02:00:00:00:00:01","addresses":["192.0.2.10","2001:db8::10"]}]`,
		`"role":"destination","state":"standing"`,
		`"role":"destination","state":"resident"`))
	ctx := t.Context()
	list, err := client.Redirects(ctx)
	if err != nil || len(list) != 3 || list[0].Move != "mv-redirect0" || list[2].State != netredirect.Resident {
		t.Fatalf("the redirects are %+v, %v", list, err)
	}
	for _, name := range []string{"mv-redirect0", "vm0"} {
		s, err := client.Redirect(ctx, name)
		want := []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")}
		if err != nil || s.Move != "mv-redirect0" || s.Peer != "south" || !slices.Equal(s.Addresses, want) || s.Deadline == nil {
			t.Errorf("redirect %s is %+v, %v", name, s, err)
		}
	}

	if err := client.DrainRedirect(ctx, "vm0"); err != nil {
		t.Error(err)
	}
	if s, err := client.Redirect(ctx, "vm0"); err != nil || s.State != netredirect.Draining {
		t.Errorf("a drained redirect is %+v, %v", s, err)
	}
	if err := client.CutRedirect(ctx, "vm0", false); err != nil {
		t.Error(err)
	}
	var refused *APIError
	if _, err := client.Redirect(ctx, "vm0"); !errors.As(err, &refused) || refused.Status != 404 || !strings.Contains(err.Error(), "wanmig redirect list") {
		t.Errorf("a redirect that was cut: %v", err)
	}

	// The source of this one can't be told: no site south is known here.
	if err := client.CutRedirect(ctx, "mv-redirect1", true); !errors.As(err, &refused) || refused.Status != 502 || !strings.Contains(err.Error(), "not at south") {
		t.Errorf("a redirect that is cut here only: %v", err)
	}
	for what, err := range map[string]error{"drain": client.DrainRedirect(ctx, "vm2"), "cut": client.CutRedirect(ctx, "vm2", true)} {
		if !errors.As(err, &refused) || refused.Status != 409 {
			t.Errorf("%s of a tunnel that is gone: %v", what, err)
		}
	}
}

func TestStatusOfCut(t *testing.T) {
	for _, c := range []struct {
		before netredirect.State
		err    error
		want   int
	}{
		{netredirect.Standing, netredirect.ErrInUse{Flows: 2}, 409},
		{netredirect.Draining, fmt.Errorf("it stays: %w", netredirect.ErrInUse{Flows: 2}), 409},
		{netredirect.Opening, errors.New("needed"), 409},
		{netredirect.Armed, errors.New("needed"), 409},
		{netredirect.Resident, errors.New("gone"), 409},
		{netredirect.Standing, errors.New("removed at one end"), 502},
	} {
		if got := statusOfCut(c.before, c.err); got != c.want {
			t.Errorf("a cut of a redirect that is %s, with %v: status %d, want %d", c.before, c.err, got, c.want)
		}
	}
}

// TestRedirectConfig reads each wrong value of the keys about redirection.
func TestRedirectConfig(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	dns := func(more string) string { return "dns: {servers: [192.0.2.53], key_file: " + key + more + "}\n" }
	bgp := func(more string) string {
		return "bgp: {asn: 65001, router_id: 192.0.2.1, peers: [{address: 192.0.2.2, asn: 65002}]" + more + "}\n"
	}
	for _, c := range []struct{ text, want string }{
		{"redirect: {kind: gre}\n", "auto, ipip, ipip-user, quic and none"},
		{"redirect: {kind: ''}\n", "auto, ipip, ipip-user, quic and none"},
		{"redirect: {egress: both}\n", "tunnel and direct"},
		{"redirect: {max: 0s}\n", "redirect.max"},
		{"redirect: {max: -1h}\n", "up to a year"},
		{"redirect: {max: 9000h}\n", "up to a year"},
		{"redirect: {max: 24}\n", "line 1"},
		{"redirect: {quiet: 25h}\n", "up to a day"},
		{"redirect: {quiet: soon}\n", "line 1"},
		{"redirect: {kinds: auto}\n", "kinds is unknown in redirect: there are kind, egress, max, quiet"},
		{"addresses: {mode: other}\n", "keep and new"},
		{"addresses: {mode: new}\n", "addresses.pool"},
		{"addresses: {pool: [192.0.2.1/24]}\n", "write 192.0.2.0/24"},
		{"addresses: {pool: [192.0.2.0]}\n", "192.0.2.0"},
		{"addresses: {pools: []}\n", "pools is unknown in addresses: there are mode, pool"},
		{"dns: {servers: [192.0.2.53]}\n", "key file"},
		{"dns: {key_file: /etc/key}\n", "servers"},
		{"dns: {servers: [192.0.2.53], key_file: key}\n", "must begin with /"},
		{"dns: {servers: ['192.0.2.53:x'], key_file: " + key + "}\n", "192.0.2.53:x"},
		{dns(", ttl: 10ms"), "ttl"},
		{dns(", zones: ['a..b']"), "a..b"},
		{dns(", zone: a"), "zone is unknown in dns: there are servers, key_file, zones, ttl"},
		{"bgp: {asn: 65001, router_id: 192.0.2.1}\n", "peer"},
		{"bgp: {router_id: 192.0.2.1, peers: [{address: 192.0.2.2, asn: 65002}]}\n", "asn 0"},
		{"bgp: {asn: 65001, peers: [{address: 192.0.2.2, asn: 65002}]}\n", "router id"},
		{"bgp: {asn: 0, router_id: x, peers: []}\n", "x"},
		{bgp(", next_hops: [192.0.2.1, 192.0.2.3]"), "at most one of each family"},
		{bgp(", communities: ['65020']"), "65020"},
		{bgp(", peer: x"), "peer is unknown in bgp: there are"},
		{"bgp: {asn: 65001, router_id: 192.0.2.1, peers: [{address: 192.0.2.2}]}\n", "asn 0"},
		{"bgp: {asn: 65001, router_id: 192.0.2.1, peers: [{address: 192.0.2.2, asn: 65002, multihop: 300}]}\n", "300"},
		{"bgp: {asn: 65001, router_id: 192.0.2.1, peers: [{address: 192.0.2.2, ttl: 3}]}\n", "ttl is unknown in bgp.peers: there are"},
		{"hooks: {before_stop: stop.sh}\n", "must begin with /"},
		{"hooks: {timeout: 1ms}\n", "1s to 10m"},
		{"hooks: {timeout: 1h}\n", "1s to 10m"},
		{"hooks: {after_stop: /bin/true}\n", "after_stop is unknown in hooks: there are"},
	} {
		_, err := loadText(t, c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want one line with %q", c.text, err, c.want)
		}
	}

	text := "redirect: {kind: quic, egress: direct, max: 1h, quiet: 5s}\n" +
		"addresses: {mode: new, pool: [198.51.100.64/28, '2001:db8:2::/120']}\n" + dns(", zones: [example.org], ttl: 10s") +
		bgp(", next_hops: [192.0.2.1, '2001:db8::1'], communities: ['65001:100'], local_pref: 200") + "hooks: {after_settle: /bin/true, timeout: 1m}\n"
	c, err := loadText(t, text)
	if err != nil {
		t.Fatal(err)
	}
	want := netredirect.Options{Kind: netredirect.QUIC, Max: time.Hour, Quiet: 5 * time.Second}
	if got := c.Redirect.options(); fmt.Sprint(got) != fmt.Sprint(want) || c.Redirect.Egress != netredirect.EgressDirect {
		t.Errorf("the options are %+v and %s, want %+v and direct", got, c.Redirect.Egress, want)
	}
	if c.Addresses.Mode != netredirect.New || len(c.Addresses.Pool) != 2 || c.DNS.names().TTL != 10*time.Second {
		t.Errorf("addresses are %+v, DNS is %+v", c.Addresses, c.DNS)
	}
	if r := c.BGP.routes(); r.NextHop4 != netip.MustParseAddr("192.0.2.1") || r.NextHop6 != netip.MustParseAddr("2001:db8::1") || r.Peers[0].ASN != 65002 || r.LocalPref != 200 {
		t.Errorf("BGP is %+v", r)
	}
}

// loadText reads a configuration.
func loadText(t *testing.T, text string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return LoadConfig(path)
}
