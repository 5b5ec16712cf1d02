//go:build lab

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/wanmig/wanmig/lab"
	"github.com/wanmig/wanmig/netredirect"
)

// The tests of this file run beside each other, each in a lab of its own: they mostly
// wait for links, caches and quiet times.

// flows are a client's connections to a guest, from users.
type flows struct {
	w        *world
	streams  map[string]*lab.Stream // by what they are to
	udp      *lab.UDPFlow
	download *lab.Download
	ssh      *lab.SSHSession
}

// startFlows opens one connection of each kind, and a stream to each address.
func (w *world) startFlows(v *lab.VM, ssh bool) *flows {
	w.t.Helper()
	f := &flows{w: w, streams: map[string]*lab.Stream{}}
	ctx := w.t.Context()
	var errs [3]error
	f.udp, errs[0] = v.StartUDP(ctx, lab.Users, v.Address, 10*time.Millisecond)
	f.download, errs[1] = v.StartDownload(ctx, lab.Users, v.Address, lab.DownloadOptions{MiB: 256, Limit: 2 << 20})
	if ssh {
		f.ssh, errs[2] = v.StartSSH(ctx, lab.Users, v.Address)
	}
	all := errs[:]
	for _, a := range addresses(v) {
		stream, err := v.StartStream(ctx, lab.Users, a, 10*time.Millisecond)
		f.streams["stream to "+a.String()] = stream
		all = append(all, err)
	}
	if err := errors.Join(all...); err != nil {
		w.t.Fatal(err)
	}
	return f
}

// stop ends the flows, which must all have lived and been right.
func (f *flows) stop() {
	t := f.w.t
	t.Helper()
	check := func(what string, r fmt.Stringer, err error) {
		t.Logf("%-21s %s", what, r)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	udp := f.udp.Stop()
	check("udp", udp, udp.Err())
	for what, stream := range f.streams {
		r := stream.Stop()
		check(what, r, r.Err())
	}
	download := f.download.Stop()
	check("download", download, download.Err())
	if f.ssh != nil {
		ssh := f.ssh.Stop()
		check("ssh", ssh, ssh.Err())
	}
}

// addresses are those of all of a guest's NICs.
func addresses(v *lab.VM) []netip.Addr {
	all := []netip.Addr{v.Address, v.Address6}
	if v.Second != nil {
		all = append(all, v.Second.Address, v.Second.Address6)
	}
	return all
}

// named names a guest's addresses for wanmig move: those that are quiet could
// not be seen.
func named(v *lab.VM) (args []string) {
	for i, a := range addresses(v) {
		mac := v.MAC
		if i > 1 {
			mac = v.Second.MAC
		}
		args = append(args, "--address", mac+"="+a.String())
	}
	return args
}

// redirects reads the redirects of a site.
func (w *world) redirects(site string) (all []netredirect.Status) {
	w.t.Helper()
	for line := range strings.Lines(w.wanmig(site, "redirect", "list", "--json")) {
		var s netredirect.Status
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			w.t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

// awaitRedirect waits until the redirects of a site are as wanted.
func (w *world) awaitRedirect(site, what string, is func([]netredirect.Status) bool) []netredirect.Status {
	w.t.Helper()
	var all []netredirect.Status
	for until := time.Now().Add(90 * time.Second); time.Now().Before(until); time.Sleep(250 * time.Millisecond) {
		if all = w.redirects(site); is(all) {
			return all
		}
	}
	for i := range all {
		all[i].Steps, all[i].Undo = nil, nil
	}
	w.t.Fatalf("the redirects at %s did not come to: %s: %+v", site, what, all)
	return nil
}

func none(all []netredirect.Status) bool { return len(all) == 0 }

func allAre(state netredirect.State) func([]netredirect.Status) bool {
	return func(all []netredirect.Status) bool {
		return len(all) > 0 && !slices.ContainsFunc(all, func(s netredirect.Status) bool { return s.State != state })
	}
}

var bridgeState, bridgeRoute = regexp.MustCompile(`^br[01] `), regexp.MustCompile(`dev br[01] proto kernel`)

// dump is everything of a host's network that a redirect may change. The
// addresses that neighbours happen to have in a cache are left out.
func (w *world) dump(site string) string {
	w.t.Helper()
	const script = `
		ip rule; ip -6 rule
		ip route show table all | grep -v ' proto bird '
		ip -6 route show table all | grep -v ' proto bird '
		ip neigh show proxy; ip -6 neigh show proxy; ip neigh show nud permanent; ip -6 neigh show nud permanent
		ip -br link | grep -v ^vnet; ip -br addr | grep -v ^vnet
		bridge fdb show | grep -v vnet
		nft list ruleset
		cd /proc/sys/net; grep -H . ipv4/conf/*/forwarding ipv4/conf/*/rp_filter ipv6/conf/*/proxy_ndp ipv4/neigh/*/proxy_delay ipv6/neigh/*/proxy_delay | grep -v vnet`
	out, complaint, status := w.run(site, "sh", "-c", script)
	if status != 0 {
		w.t.Fatalf("dump of %s: %s", site, complaint)
	}
	var kept []string
	for line := range strings.Lines(out) {
		// A bridge has these, its link-local address and its state, only while it
		// has a port, the guest's.
		if !strings.Contains(line, "vnet") && !strings.Contains(line, "fe80:") && !strings.Contains(line, "33:33:") && !strings.Contains(line, "ff00::/8") && !bridgeState.MatchString(line) {
			// Nor is the bridge's own network down but for that.
			if line = strings.Replace(line, " linkdown", "", 1); !bridgeRoute.MatchString(line) && !strings.Contains(line, "broadcast") {
				kept = append(kept, line)
			}
		}
	}
	return strings.Join(kept, "")
}

// unchanged compares a host's network with what it was.
func (w *world) unchanged(site, before string) {
	w.t.Helper()
	if after := w.dump(site); after != before {
		w.t.Errorf("the network of %s is not as it was:\n%s", site, difference(before, after))
	}
}

func difference(before, after string) string {
	var b strings.Builder
	was, is := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, l := range was {
		if !slices.Contains(is, l) {
			fmt.Fprintln(&b, "- ", l)
		}
	}
	for _, l := range is {
		if !slices.Contains(was, l) {
			fmt.Fprintln(&b, "+ ", l)
		}
	}
	return b.String()
}

// detour is how many bytes the WAN carries while f runs.
func (w *world) detour(f func()) uint64 {
	w.t.Helper()
	if err := w.ResetCounters(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	f()
	state, err := w.LinkState(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	var n uint64
	for _, c := range state.Counters {
		n += c.Bytes
	}
	return n
}

// directly downloads a file from an address of the guest and checks that it did
// not cross the WAN between the data centres.
func (w *world) directly(v *lab.VM, to netip.Addr) {
	w.t.Helper()
	const mib = 8
	crossed := w.detour(func() {
		d, err := v.StartDownload(w.t.Context(), lab.Users, to, lab.DownloadOptions{MiB: mib, Limit: 4 << 20})
		if err != nil {
			w.t.Fatal(err)
		}
		select {
		case <-d.Done():
		case <-time.After(30 * time.Second):
		}
		if r := d.Stop(); !r.Complete() || r.Err() != nil {
			w.t.Fatalf("a new connection to %s: %s", to, r)
		}
	})
	if crossed > mib<<20/10 {
		w.t.Errorf("a download of %d MiB from %s took the WAN: %d bytes crossed it", mib, to, crossed)
	}
}

// record is what the name server has for the name that one of a guest's addresses
// had when it was made, or nothing if that is not one record.
func (w *world) record(v *lab.VM, own netip.Addr) (r lab.Record) {
	w.t.Helper()
	name, kind := v.Name+"."+lab.Zone, "A"
	if own.Is6() {
		kind = "AAAA"
	}
	if v.Second != nil && (own == v.Second.Address || own == v.Second.Address6) {
		name = "second." + name
	}
	all, err := w.Dig(w.t.Context(), lab.Users, name, kind)
	if err != nil {
		w.t.Log(err)
	}
	if len(all) == 1 {
		r = all[0]
	}
	return r
}

// TestConnectionsFollowTheRoute moves a guest that keeps the addresses of its two
// NICs away and back, with connections of every kind open all the time, and checks
// that both hosts are as they were once nothing uses the tunnels.
func TestConnectionsFollowTheRoute(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, lab.Options{Services: true}, "100mbit", "50ms")
	before := map[string]string{lab.LocalDC: w.dump(lab.LocalDC), lab.RemoteDC: w.dump(lab.RemoteDC)}
	v := w.vm(lab.VMOptions{Name: "web", Memory: 192 << 20, SSH: true, SecondNIC: true, Disks: []lab.DiskOptions{disk(t, "256MiB")}})
	f := w.startFlows(v, true)
	r := w.move(lab.LocalDC, "web", lab.RemoteDC, named(v)...)
	t.Logf("moved: downtime %d ms", r.DowntimeMS)

	w.awaitRedirect(lab.LocalDC, "gone", none)
	s := w.awaitRedirect(lab.RemoteDC, "only the addresses are served", allAre(netredirect.Resident))[0]
	w.unchanged(lab.LocalDC, before[lab.LocalDC])
	for _, a := range addresses(v) {
		p := netip.PrefixFrom(a, a.BitLen())
		if !slices.Contains(s.Announced, p) {
			t.Errorf("%s is not announced: %v", p, s.Announced)
		}
		out, err := w.Birdc(t.Context(), lab.Users, "show", "route", "for", p.Addr().String())
		if err != nil || !strings.Contains(out, "eth1") {
			t.Errorf("users' BIRD does not lead to %s by remote-dc: %v\n%s", p, err, out)
		}
	}
	for _, a := range addresses(v) {
		w.directly(v, a)
	}

	t.Log("and back")
	w.move(lab.RemoteDC, "web", lab.LocalDC)
	w.awaitRedirect(lab.RemoteDC, "gone", none)
	w.awaitRedirect(lab.LocalDC, "gone", none)
	f.stop()
	w.healthy(lab.LocalDC, v)
	for site, was := range before {
		w.unchanged(site, was)
	}
}

// TestConnectionsOutliveTheOldAddress moves a guest with two NICs to new addresses
// of both networks there: DNS leads new clients to them, and old connections go on.
func TestConnectionsOutliveTheOldAddress(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, lab.Options{Services: true}, "100mbit", "50ms")
	before := map[string]string{lab.LocalDC: w.dump(lab.LocalDC), lab.RemoteDC: w.dump(lab.RemoteDC)}
	v := w.vm(lab.VMOptions{Name: "web", Memory: 128 << 20, WorkingSet: 16 << 20, SecondNIC: true, Disks: []lab.DiskOptions{disk(t, "256MiB")}})
	f := w.startFlows(v, false)
	args := append(named(v), "--addresses", "new", "--lower-ttl", "--redirect", "quic")
	w.move(lab.LocalDC, "web", lab.RemoteDC, args...)
	s := w.awaitRedirect(lab.RemoteDC, "names have moved", func(all []netredirect.Status) bool {
		return len(all) == 1 && !slices.ContainsFunc(addresses(v), func(a netip.Addr) bool { return w.record(v, a).Data != all[0].Mapped[a].String() })
	})[0]
	if s.Kind != netredirect.QUIC {
		t.Errorf("the tunnel is %s", s.Kind)
	}
	// The old connections still use the tunnel, and it waits for them.
	if s := w.redirects(lab.LocalDC); len(s) != 1 || s[0].State != netredirect.Standing || len(s[0].Waits) == 0 {
		t.Errorf("with connections in it the tunnel is %+v", s)
	}
	f.stop()
	for n, old := range addresses(v) {
		now := s.Mapped[old]
		reverse, err := dns.ReverseAddr(now.String())
		if err != nil {
			t.Fatal(err)
		}
		if back, err := w.Dig(t.Context(), lab.Users, reverse, "PTR"); err != nil || len(back) != 1 || back[0].Data != w.record(v, old).Name {
			t.Errorf("PTR of %s, once %s: %v %v", now, old, back, err)
		}
		first, second := w.Sites[lab.RemoteDC], w.Sites[lab.RemoteDC].Second
		network := []netip.Prefix{first.BridgeAddr, first.BridgeAddr6, second.Addr, second.Addr6}[n]
		if !network.Contains(now) {
			t.Errorf("the new address %s, once %s, is not of %s", now, old, network.Masked())
		}
		w.directly(v, now)
	}
	w.awaitRedirect(lab.LocalDC, "gone", none)
	w.unchanged(lab.LocalDC, before[lab.LocalDC])
	w.awaitRedirect(lab.RemoteDC, "the names have their TTL of a minute back", func([]netredirect.Status) bool {
		return !slices.ContainsFunc(addresses(v), func(a netip.Addr) bool { return w.record(v, a).TTL != time.Minute })
	})

	if !soaking {
		return
	}

	t.Log("and back")
	w.move(lab.RemoteDC, "web", lab.LocalDC)
	w.awaitRedirect(lab.RemoteDC, "gone", none)
	w.awaitRedirect(lab.LocalDC, "gone", none)
	for _, a := range addresses(v) {
		if r := w.record(v, a); r.Data != a.String() || r.TTL != time.Minute {
			t.Errorf("%s is %s for %v, its address is %s again, its TTL 1m", r.Name, r.Data, r.TTL, a)
		}
	}
	for site, was := range before {
		w.unchanged(site, was)
	}
}

// TestRedirectOutlivesItsAgents kills the agents while a redirect is made and
// while it stands: connections go on, and nothing is left in the end.
func TestRedirectOutlivesItsAgents(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, lab.Options{Services: true}, "200mbit", "20ms")
	before := map[string]string{lab.LocalDC: w.dump(lab.LocalDC), lab.RemoteDC: w.dump(lab.RemoteDC)}
	v := w.vm(lab.VMOptions{Name: "web", Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "256MiB")}})
	restart := func(site string) {
		t.Helper()
		if err := w.Sites[site].KillAgent(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := w.Sites[site].StartAgent(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	f := w.startFlows(v, false)
	for _, site := range lab.DataCentres {
		move := w.begin("web", named(v)...)
		w.awaitRedirect(site, "armed", allAre(netredirect.Armed))
		restart(site)
		w.await(lab.LocalDC, move, "its end", final)
		w.awaitRedirect(lab.LocalDC, "gone", none)
		w.awaitRedirect(lab.RemoteDC, "gone", none)
		for site, was := range before {
			w.unchanged(site, was)
		}
	}
	// This one is made, and its agents die while it stands.
	w.move(lab.LocalDC, "web", lab.RemoteDC, append(named(v), "--redirect", "ipip-user")...)
	for _, site := range lab.DataCentres {
		restart(site)
	}
	w.awaitRedirect(lab.LocalDC, "gone", none)
	w.unchanged(lab.LocalDC, before[lab.LocalDC])
	restart(lab.RemoteDC)
	w.awaitRedirect(lab.RemoteDC, "only the addresses are served", allAre(netredirect.Resident))
	f.stop()
	w.directly(v, v.Address)
	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.awaitRedirect(lab.RemoteDC, "gone with the guest", none)
	w.unchanged(lab.RemoteDC, before[lab.RemoteDC])
}

// TestRedirectTellsWhatIsMissing lets DNS and BGP fail: the move is unharmed, the
// tunnel stays, and the status says what to do.
func TestRedirectTellsWhatIsMissing(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, lab.Options{Services: true}, "200mbit", "20ms")
	cases := []struct {
		name, config, want string
		move               []string
	}{
		{"wrong key", "dns: {servers: [10.10.0.1], key_file: /etc/wanmig/wrong.key, ttl: 2s}", "key", []string{"--addresses", "new"}},
		{"server down", "dns: {servers: [10.10.0.250], key_file: /etc/wanmig/dns.key, ttl: 2s}", "10.10.0.250", []string{"--addresses", "new"}},
		{"peer down", "bgp: {asn: 65021, router_id: 10.254.2.3, peers: [{address: 10.254.2.7, asn: 65030}]}", "10.254.2.7", nil},
	}
	const wrong = "key \"wanlab\" { algorithm hmac-sha256; secret \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"; };\n"
	if err := os.WriteFile(w.path(lab.RemoteDC, "/etc/wanmig/wrong.key"), []byte(wrong), 0o600); err != nil {
		t.Fatal(err)
	}
	if !soaking {
		cases = cases[:1]
	}
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := &world{w.Lab, t}
			if err := w.SetAgentConfig(t.Context(), lab.RemoteDC, c.config); err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprint("web", i)
			v := w.vm(lab.VMOptions{Name: name, Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "64MiB")}})
			f := w.startFlows(v, false)
			w.move(lab.LocalDC, name, lab.RemoteDC, append(named(v), c.move...)...)
			w.awaitRedirect(lab.RemoteDC, "its problem is told", func(all []netredirect.Status) bool {
				return len(all) == 1 && all[0].State == netredirect.Standing && len(all[0].Waits) > 0 &&
					strings.Contains(strings.ToLower(strings.Join(all[0].Problems, "\n")), c.want)
			})
			f.stop()
			move := w.redirects(lab.LocalDC)[0].Move
			w.wanmig(lab.LocalDC, "redirect", "drain", move)
			w.awaitRedirect(lab.LocalDC, "drained", none)
			if err := v.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.awaitRedirect(lab.RemoteDC, "gone with the guest", none)
			for _, site := range []string{lab.Users, lab.LocalDC} { // the next guest has its address and another MAC
				w.run(site, "sh", "-c", "ip neigh flush all; ip -6 neigh flush all")
			}
		})
	}
}

// TestConnectionsFollowToAThirdSite moves a guest on while the tunnel of its first
// move stands: its packets soon go straight from the first site to the third.
func TestConnectionsFollowToAThirdSite(t *testing.T) {
	t.Parallel()
	config := map[string]string{}
	sites := []string{lab.LocalDC, lab.RemoteDC, lab.ThirdDC}
	for _, site := range sites {
		config[site] = "redirect: {quiet: 2s}"
	}
	w := newWorldWith(t, lab.Options{Third: true, AgentConfig: config}, "200mbit", "20ms")
	before := map[string]string{}
	for _, site := range sites {
		before[site] = w.dump(site)
	}
	v := w.vm(lab.VMOptions{Name: "web", Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "64MiB")}})
	f := w.startFlows(v, false)
	w.move(lab.LocalDC, "web", lab.RemoteDC, named(v)...)
	w.move(lab.RemoteDC, "web", lab.ThirdDC)

	w.awaitRedirect(lab.LocalDC, "it leads to the third site", func(all []netredirect.Status) bool {
		return len(all) == 1 && all[0].State == netredirect.Standing && all[0].Peer == lab.ThirdDC
	})
	w.awaitRedirect(lab.RemoteDC, "gone", none)
	w.unchanged(lab.RemoteDC, before[lab.RemoteDC])
	if err := w.ResetCounters(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second) // of the flows
	state, err := w.LinkState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	direct, detour := uint64(0), uint64(0)
	for link, c := range state.Counters {
		if strings.Contains(link, lab.LocalDC) && strings.Contains(link, lab.ThirdDC) {
			direct += c.Bytes
		} else {
			detour += c.Bytes
		}
	}
	if direct < 1<<20 || detour > direct/50 {
		t.Errorf("%d bytes went straight to the third site, %d another way: %+v", direct, detour, state.Counters)
	}
	f.stop()

	w.wanmig(lab.LocalDC, "redirect", "drain", "web")
	w.awaitRedirect(lab.LocalDC, "drained", none)
	w.unchanged(lab.LocalDC, before[lab.LocalDC])
	w.awaitRedirect(lab.ThirdDC, "only the addresses are served", allAre(netredirect.Resident))
	w.healthy(lab.ThirdDC, v)
	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.awaitRedirect(lab.ThirdDC, "gone with the guest", none)
	w.unchanged(lab.ThirdDC, before[lab.ThirdDC])
}

// TestHooks runs programs of the operator's at their moments.
func TestHooks(t *testing.T) {
	t.Parallel()
	const hooks = "hooks: {before_stop: /etc/wanmig/hook, after_resume: /etc/wanmig/hook, after_settle: /etc/wanmig/hook, timeout: 5s}\nredirect: {quiet: 1s}"
	const script = "#!/bin/sh\n[ -e /etc/wanmig/refuse ] && { echo not now; exit 1; }\necho \"$1 $WANMIG_ROLE $WANMIG_VM $WANMIG_FROM $WANMIG_TO $WANMIG_ADDRESSES\" >>/etc/wanmig/hook.log\n"
	w := newWorldWith(t, lab.Options{}, "400mbit", "20ms")
	for _, site := range lab.DataCentres {
		if err := os.WriteFile(w.path(site, "/etc/wanmig/hook"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := w.SetAgentConfig(t.Context(), site, hooks); err != nil {
			t.Fatal(err)
		}
	}
	v := w.vm(lab.VMOptions{Name: "a guest", Memory: 128 << 20, WorkingSet: 16 << 20, Disks: []lab.DiskOptions{disk(t, "64MiB")}})
	refuse := w.path(lab.LocalDC, "/etc/wanmig/refuse")
	if err := os.WriteFile(refuse, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, complaint, status := w.run(lab.LocalDC, "wanmig", "move", v.Name, "--to", lab.RemoteDC)
	if status == 0 || !strings.Contains(complaint, "not now") {
		t.Fatalf("a hook that fails before the stop: status %d\n%s", status, complaint)
	}
	w.healthy(lab.LocalDC, v)
	if err := os.Remove(refuse); err != nil {
		t.Fatal(err)
	}
	w.move(lab.LocalDC, v.Name, lab.RemoteDC, "--address", v.MAC+"="+v.Address.String())
	w.wanmig(lab.LocalDC, "redirect", "drain", v.Name)
	w.awaitRedirect(lab.LocalDC, "gone", none)
	for site, want := range map[string]string{
		lab.LocalDC:  "before_stop source a guest local-dc remote-dc %[1]s\nafter_resume source a guest local-dc remote-dc %[1]s\nafter_settle source a guest local-dc remote-dc %[1]s\n",
		lab.RemoteDC: "after_resume destination a guest local-dc remote-dc %[1]s\nafter_settle destination a guest local-dc remote-dc %[1]s\n",
	} {
		want = fmt.Sprintf(want, v.Address)
		var got string
		for until := time.Now().Add(10 * time.Second); time.Now().Before(until) && got != want; time.Sleep(100 * time.Millisecond) {
			b, _ := os.ReadFile(filepath.Join(w.Sites[site].Dir, "/etc/wanmig/hook.log"))
			got = string(b)
		}
		if got != want {
			t.Errorf("hooks at %s:\n%swant\n%s", site, got, want)
		}
	}
}
