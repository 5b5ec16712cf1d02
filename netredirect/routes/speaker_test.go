package routes

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// unconnected is a speaker that looks for peers in vain, in the documentation's
// network.
func unconnected(t *testing.T) *Speaker {
	t.Helper()
	s, err := New(context.Background(), Config{
		ASN: 65010, RouterID: addr("192.0.2.2"),
		Peers: []Peer{{Address: addr("192.0.2.1"), ASN: 65001}},
	}, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestNewRefuses(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	if _, err := New(context.Background(), Config{}, nil, log); err == nil {
		t.Error("an empty configuration is taken")
	}
	c := good()
	c.Peers[0].PasswordFile = t.TempDir()
	if _, err := New(context.Background(), c, nil, log); err == nil {
		t.Error("a folder is taken for a password")
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := New(ended, good(), []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}, log); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
}

// TestResumeLeavesOutWhatCannotBe starts with a journal that is older than the
// configuration.
func TestResumeLeavesOutWhatCannotBe(t *testing.T) {
	var out bytes.Buffer
	config := Config{ASN: 65010, RouterID: addr("192.0.2.2"), Peers: []Peer{{Address: addr("192.0.2.1"), ASN: 65001}}}
	ok := netip.MustParsePrefix("203.0.113.9/32")
	not := []netip.Prefix{netip.MustParsePrefix("2001:db8::9/128"), netip.MustParsePrefix("192.0.2.0/24"), {}}
	s, err := New(context.Background(), config, append(slices.Clone(not), ok), slog.New(slog.NewTextHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	s.Close() // and the log is whole
	if len(s.announced) != 1 || !s.announced[ok] {
		t.Errorf("announced: %v", s.announced)
	}
	if n := strings.Count(out.String(), "not announced again"); n != len(not) || !strings.Contains(out.String(), "2001:db8::9/128") {
		t.Errorf("%d of %d are logged:\n%s", n, len(not), out.String())
	}
}

func TestOnlyHostRoutes(t *testing.T) {
	s := unconnected(t)
	ok := netip.MustParsePrefix("203.0.113.9/32")
	for _, bad := range []netip.Prefix{
		{}, netip.PrefixFrom(ok.Addr(), 31), netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("203.0.113.0/24"),
		netip.MustParsePrefix("224.0.0.1/32"), netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("169.254.1.1/32"),
		netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("0.0.0.0/32"),
		netip.MustParsePrefix("::/0"), netip.MustParsePrefix("fe80::1/128"), netip.MustParsePrefix("ff02::1/128"),
		netip.PrefixFrom(addr("::ffff:203.0.113.9"), 128), netip.PrefixFrom(addr("::ffff:203.0.113.9"), 32),
	} {
		if err := s.Announce(context.Background(), []netip.Prefix{ok, bad}); !errors.Is(err, ErrNotHostRoute) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if len(s.announced) != 0 {
		t.Errorf("announced: %v", s.announced)
	}
	if err := s.Announce(context.Background(), []netip.Prefix{netip.MustParsePrefix("2001:db8::9/128")}); !errors.Is(err, ErrNoPeer) {
		t.Errorf("IPv6 without a next hop: %v", err)
	}
	if err := s.Withdraw(context.Background(), []netip.Prefix{ok, {}}); err != nil {
		t.Errorf("withdraw what is not there: %v", err)
	}
	if _, err := s.Seen(netip.Prefix{}); err == nil {
		t.Error("an invalid prefix is looked for")
	}
	if seen, err := s.Seen(ok); err != nil || seen != nil {
		t.Errorf("seen: %v, %v", seen, err)
	}
}

func TestCloseWakesAndEnds(t *testing.T) {
	s := unconnected(t)
	changed := s.Changed()
	s.Close()
	select {
	case <-changed:
	default:
		t.Error("nobody is told of Close")
	}
	if _, err := s.Seen(netip.MustParsePrefix("203.0.113.9/32")); !errors.Is(err, ErrClosed) {
		t.Errorf("seen: %v", err)
	}
	for _, f := range []func(context.Context, []netip.Prefix) error{s.Announce, s.Withdraw} {
		if err := f(context.Background(), []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
	if p := s.Peers()[0]; p.Up || p.State != "idle" || p.Problem != ErrClosed.Error() {
		t.Errorf("peer: %+v", p)
	}
	s.Close()
}

// TestLibraryLog feeds what the library logs: problems are read from it, and it
// stays out of the agent's log.
func TestLibraryLog(t *testing.T) {
	var out bytes.Buffer
	s := &Speaker{
		config: Config{ASN: 65010, Peers: []Peer{{Address: addr("192.0.2.1"), ASN: 65001}}},
		log:    slog.New(slog.NewTextHandler(&out, nil)),
	}
	s.status.init(s)
	library := slog.New(&libraryLog{status: &s.status, next: s.log.Handler()})
	peer := library.With("Topic", "Peer", "Key", "192.0.2.1")
	for _, test := range []struct {
		log  func()
		want string
	}{
		{func() {
			peer.Debug("failed to connect", "Error", "dial tcp 0.0.0.0:0->192.0.2.1:179: connect: connection refused")
		}, "192.0.2.1 port 179 refuses connections"},
		{func() {
			peer.Debug("failed to connect", "Error", "dial tcp 192.0.2.1:179: i/o timeout")
		}, "no answer from 192.0.2.1 port 179"},
		{func() { peer.Debug("failed to connect", "Error", "odd") }, "connect to 192.0.2.1 port 179: odd"},
		{func() { peer.Debug("outgoing connection IO error", "reason", "read-failed") }, "refuses the session"},
		{func() { peer.Debug("failed to connect") }, "connect to 192.0.2.1 port 179: "},
		{func() { peer.Info("sent notification", "Code", 2, "Subcode", 2) }, "is not of AS 65001"},
		{func() { peer.Info("sent notification", "Code", 2, "Subcode", 6) }, "unacceptable hold time"},
		{func() { peer.Info("sent notification", "Code", 5, "Subcode", 1) }, "refuses the session"},
	} {
		changed := s.Changed()
		test.log()
		if p := s.Peers()[0]; !strings.Contains(p.Problem, test.want) {
			t.Errorf("%q, want %q", p.Problem, test.want)
		}
		select {
		case <-changed:
		default:
			t.Errorf("nobody is told of %q", test.want)
		}
	}
	last := s.Peers()[0].Problem
	library.Warn("sent notification", "Code", 2, "Subcode", 2)                   // of no peer
	library.With("Key", "192.0.2.77").Error("failed to connect", "Error", "odd") // of another
	peer.WithGroup("g").Error("something else", "Error", "odd")
	if p := s.Peers()[0]; p.Problem != last {
		t.Errorf("changed to %q", p.Problem)
	}
	for _, leaked := range []string{"gobgp", "sent notification", "something else"} {
		if strings.Contains(out.String(), leaked) {
			t.Errorf("in the log, at level info: %q in\n%s", leaked, out.String())
		}
	}
}

func TestSighting(t *testing.T) {
	nlri, err := bgp.NewIPAddrPrefix(netip.MustParsePrefix("2001:db8::9/128"))
	if err != nil {
		t.Fatal(err)
	}
	reach, err := bgp.NewPathAttributeMpReachNLRI(bgp.RF_IPv6_UC, []bgp.PathNLRI{{NLRI: nlri}}, addr("2001:db8::2"))
	if err != nil {
		t.Fatal(err)
	}
	got := sighting(addr("10.0.0.1"), &apiutil.Path{Attrs: []bgp.PathAttributeInterface{
		bgp.NewPathAttributeLargeCommunities([]*bgp.LargeCommunity{bgp.NewLargeCommunity(1, 2, 3)}),
		reach,
		bgp.NewPathAttributeAsPath([]bgp.AsPathParamInterface{
			bgp.NewAs4PathParam(bgp.BGP_ASPATH_ATTR_TYPE_SEQ, []uint32{65001, 4200000000}),
			bgp.NewAs4PathParam(bgp.BGP_ASPATH_ATTR_TYPE_SET, []uint32{65010}),
		}),
		bgp.NewPathAttributeCommunities([]uint32{65020<<16 | 100}),
	}})
	if got.Peer != addr("10.0.0.1") || got.NextHop != addr("2001:db8::2") || !slices.Equal(got.Path, []uint32{65001, 4200000000, 65010}) ||
		!slices.Equal(got.Communities, []string{"65020:100", "1:2:3"}) {
		t.Errorf("%+v", got)
	}
}
