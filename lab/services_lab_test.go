//go:build lab

package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

func makeServices(t *testing.T) *Lab {
	t.Helper()
	return upWith(t, Options{NoAgent: true, Services: true})
}

func TestUsersSendFromTheirOwnAddress(t *testing.T) {
	l := makeServices(t)
	for _, c := range []struct{ site, to, device, from string }{
		{Users, "10.10.0.1", "eth0", "10.30.0.1"},
		{Users, "10.20.0.1", "eth1", "10.30.0.1"},
		{Users, "fd00:10::1", "eth0", "fd00:30::1"},
		{Users, "fd00:20::1", "eth1", "fd00:30::1"},
		{Users, "10.11.0.1", "eth0", "10.30.0.1"},
		{Users, "10.21.0.1", "eth1", "10.30.0.1"},
		{Users, "fd00:21::1", "eth1", "fd00:30::1"},
		{Users, "10.255.0.2", "eth0", "10.10.0.100"},
		{LocalDC, "10.30.0.1", "br0", ""},
		{RemoteDC, "10.30.0.1", "users", ""},
		{LocalDC, "fd00:30::1", "br0", ""},
		{RemoteDC, "fd00:30::1", "users", ""},
	} {
		route := run(t, l, c.site, "ip", "route", "get", c.to)
		if !strings.Contains(route, "dev "+c.device+" ") || !strings.Contains(route, "src "+c.from) {
			t.Errorf("%s goes to %s by %s; want device %s, source %q", c.site, c.to, route, c.device, c.from)
		}
		run(t, l, c.site, "ping", "-c", "1", "-W", "5", c.to)
	}
	for _, address := range []string{"10.254.2.1", "10.254.2.3", "10.10.0.2", "fd00:254:2::1", "fd00:254:2::3", "fd00:10::2"} {
		run(t, l, Users, "ping", "-c", "1", "-W", "5", address)
	}
}

func TestRoutersTellEachOther(t *testing.T) {
	l := makeServices(t)
	routes := func(site, what string) string {
		t.Helper()
		out, err := l.Birdc(t.Context(), site, append([]string{"show", "route"}, strings.Fields(what)...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, c := range []struct{ site, what, want string }{
		{Users, "for 10.20.0.0/24", "[remote_dc4"},
		{Users, "for fd00:10::/64", "[local_dc6"},
		{Users, "for 10.21.0.0/24", "[remote_dc4"},
		{Users, "for fd00:11::/64", "[local_dc6"},
		{LocalDC, "for 10.30.0.1/32", "[AS65030i]"},
		{RemoteDC, "for fd00:30::1/128", "[AS65030i]"},
	} {
		if got := routes(c.site, c.what); !strings.Contains(got, c.want) {
			t.Errorf("route %s at %s: want %s in\n%s", c.what, c.site, c.want, got)
		}
	}

	// A router in place of remote-dc's agent announces guests, and what is none.
	config := filepath.Join(t.TempDir(), "bird.conf")
	if err := os.WriteFile(config, []byte(`
router id 10.254.2.3;
protocol device {}
protocol static s4 { ipv4; route 10.10.0.10/32 via 10.254.2.1; route 10.11.0.10/32 via 10.254.2.1; route 10.10.0.0/25 via 10.254.2.1; route 192.0.2.1/32 via 10.254.2.1; }
protocol static s6 { ipv6; route fd00:10::10/128 via fd00:254:2::1; route 2001:db8::1/128 via fd00:254:2::1; }
protocol bgp up {
	local 10.254.2.3 as 65021;
	neighbor 10.254.2.2 as 65030;
	connect delay time 1;
	strict bind yes;
	ipv4 { import none; export all; next hop keep; };
	ipv6 { import none; export all; next hop keep; };
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	agent := exec.Command("true")
	startAgent := func() {
		t.Helper()
		var err error
		agent, err = l.Command(context.Background(), RemoteDC, "bird", "-f", "-c", config, "-s", "/run/agent.ctl", "-P", "/run/agent.pid")
		if err != nil {
			t.Fatal(err)
		}
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
	}
	startAgent()
	has := func(site, to, device string) func() bool {
		return func() bool {
			out, err := l.output(t.Context(), site, "ip", "route", "get", to)
			return err == nil && strings.Contains(out, "dev "+device+" ")
		}
	}
	eventually(t, "users send to the guest by eth1", has(Users, "10.10.0.10", "eth1"))
	eventually(t, "users send to the guest's second NIC by eth1", has(Users, "10.11.0.10", "eth1"))
	eventually(t, "users send to the guest by eth1 in IPv6", has(Users, "fd00:10::10", "eth1"))
	if got := run(t, l, Users, "ip", "route", "get", "10.10.0.10"); !strings.Contains(got, "src 10.30.0.1") {
		t.Errorf("users do not send to the guest from their own address: %s", got)
	}
	eventually(t, "local-dc hears of the guest", func() bool { return strings.Contains(routes(LocalDC, "for 10.10.0.10/32"), "[AS65021i]") })
	if got := routes(RemoteDC, "all"); strings.Contains(got, "10.10.0.10/32") {
		t.Errorf("remote-dc is told of its own guest:\n%s", got)
	}
	if got := routes(Users, "all"); strings.Contains(got, "10.10.0.0/25") || strings.Contains(got, "192.0.2.1") || strings.Contains(got, "2001:db8") {
		t.Errorf("users accept routes that are no guest's:\n%s", got)
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	eventually(t, "the guest's route goes with the session", func() bool { return has(Users, "10.10.0.10", "eth0")() && has(Users, "fd00:10::10", "eth0")() })

	users := l.Sites[Users]
	if err := users.KillBird(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Birdc(t.Context(), Users, "show", "status"); err == nil {
		t.Error("a killed router answers")
	}
	eventually(t, "a data centre forgets users whose router is gone", func() bool { return !has(RemoteDC, "10.30.0.1", "users")() })
	if err := users.StartBird(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the router is back", has(RemoteDC, "10.30.0.1", "users"))
}

func TestNameServer(t *testing.T) {
	l := makeServices(t)
	dig := func(site, name, kind string) string {
		t.Helper()
		records, err := l.Dig(t.Context(), site, name, kind)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(records)
	}
	v := &VM{Name: "web", lab: l}
	v.Address, v.Address6 = l.Sites[LocalDC].BridgeAddr.Addr().Next(), l.Sites[LocalDC].BridgeAddr6.Addr().Next()
	if got := dig(Users, "web.wanlab.test", "A"); got != "[]" {
		t.Errorf("an unknown name has %s", got)
	}
	if err := v.addRecords(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, site := range []string{LocalDC, RemoteDC, Users} {
		for _, c := range []struct{ name, kind, want string }{
			{"web.wanlab.test", "A", "[{web.wanlab.test. 1m0s A 10.10.0.2}]"},
			{"web.wanlab.test", "AAAA", "[{web.wanlab.test. 1m0s AAAA fd00:10::2}]"},
			{"2.0.10.10.in-addr.arpa", "PTR", "[{2.0.10.10.in-addr.arpa. 1m0s PTR web.wanlab.test.}]"},
			{"2." + strings.Repeat("0.", 19) + "0.1.0.0.0.0.0.d.f.ip6.arpa", "PTR", "[]"},
		} {
			if got := dig(site, c.name, c.kind); got != c.want {
				t.Errorf("%s %s at %s: %s, want %s", c.name, c.kind, site, got, c.want)
			}
		}
	}
	if _, err := l.Dig(t.Context(), Users, "example.org", "A"); err == nil || !strings.Contains(err.Error(), "REFUSED") {
		t.Errorf("a name of someone else's zone: %v", err)
	}
	if got := run(t, l, Users, "getent", "ahostsv4", "web"); !strings.HasPrefix(got, "10.10.0.2 ") {
		t.Errorf("the users' own lookup of web: %s", got)
	}

	update := func(site string, args ...string) error {
		cmd, err := l.Command(t.Context(), site, "nsupdate", args...)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdin = strings.NewReader("server 10.10.0.1\nupdate add x.wanlab.test 60 A 10.20.0.9\nsend\n")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	wrong := filepath.Join(t.TempDir(), "wrong.key")
	if err := os.WriteFile(wrong, []byte("key \"wanlab\" {\n\talgorithm hmac-sha256;\n\tsecret \"d3Jvbmc=\";\n};\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := update(RemoteDC); err == nil || !strings.Contains(err.Error(), "REFUSED") {
		t.Errorf("update without a key: %v", err)
	}
	if err := update(RemoteDC, "-k", wrong); err == nil || !strings.Contains(err.Error(), "BADSIG") && !strings.Contains(err.Error(), "NOTAUTH") {
		t.Errorf("update with a wrong key: %v", err)
	}
	if got := dig(Users, "x.wanlab.test", "A"); got != "[]" {
		t.Errorf("a refused update made %s", got)
	}
	for _, site := range DataCentres {
		if err := update(site, "-k", DNSKeyFile); err != nil {
			t.Errorf("update from %s: %v", site, err)
		}
		info, err := os.Stat(l.Sites[site].Dir + DNSKeyFile)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("key of %s: %v, %v", site, info, err)
		}
	}
	if got := dig(Users, "x.wanlab.test", "A"); !strings.Contains(got, "10.20.0.9") {
		t.Errorf("an update made %s", got)
	}

	// The agents have given it another address meanwhile.
	if err := l.updateNames(t.Context(), []string{"delete web.wanlab.test A", "add web.wanlab.test 2 A 10.20.0.192"},
		[]string{"add 192.0.20.10.in-addr.arpa 2 PTR web.wanlab.test"}); err != nil {
		t.Fatal(err)
	}
	local := l.Sites[LocalDC]
	if err := local.KillNamed(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Dig(t.Context(), Users, "web.wanlab.test", "A"); err == nil {
		t.Error("a killed server answers")
	}
	if err := local.StartNamed(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := dig(Users, "web.wanlab.test", "A"), "[{web.wanlab.test. 2s A 10.20.0.192}]"; got != want {
		t.Errorf("after a new start: %s, want %s", got, want)
	}
	if err := v.removeRecords(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{"web.wanlab.test", "A"}, {"web.wanlab.test", "AAAA"}, {"2.0.10.10.in-addr.arpa", "PTR"}, {"192.0.20.10.in-addr.arpa", "PTR"}} {
		if got := dig(Users, c[0], c[1]); got != "[]" {
			t.Errorf("after the removal %s has %s", c[0], got)
		}
	}
	odd := &VM{Name: "web server", lab: l}
	if err := odd.addRecords(t.Context()); err != nil {
		t.Errorf("a VM whose name is no host's: %v", err)
	}
}

func TestKilledSupervisorTakesServicesWithIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lab")
	before := traces(t, dir)
	l, err := Up(t.Context(), Options{Dir: dir, NoAgent: true, Services: true, Third: true})
	if err != nil {
		t.Fatal(err)
	}
	services := findProcesses(func(pid int) bool {
		argv := commandLine(pid)
		return len(argv) > 0 && argv[0] == "bird" && strings.Contains(strings.Join(argv, " "), dir)
	})
	if len(services) != 4 {
		t.Errorf("routers %v, want four", services)
	}
	if err := unix.Kill(l.Supervisor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the routers end with the supervisor", func() bool {
		return !slices.ContainsFunc(services, func(pid int) bool { return len(commandLine(pid)) > 0 })
	})
	if err := Down(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	compareTraces(t, before, traces(t, dir))
}

func TestGuestHasBothFamiliesAndAName(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeServices(t)
	v := createVM(t, l, VMOptions{Name: "web", SecondNIC: true, Memory: 256 << 20, Disks: []DiskOptions{{Size: 64 << 20, Format: "raw", Bus: "virtio"}}})
	if got := fmt.Sprint(v.Address, " ", v.Address6); got != "10.10.0.10 fd00:10::10" {
		t.Errorf("addresses %s", got)
	}
	for _, address := range []string{"10.10.0.10", "fd00:10::10", "10.11.0.10", "fd00:11::10"} {
		// From another network, so that the guest needs its gateway.
		run(t, l, RemoteDC, "ping", "-c", "1", "-W", "5", address)
		run(t, l, Users, "ping", "-c", "1", "-W", "5", address)
	}
	run(t, l, Users, "ping", "-4", "-c", "1", "-W", "5", "web")
	run(t, l, Users, "ping", "-6", "-c", "1", "-W", "5", "web.wanlab.test")
	names := [][3]string{{"web.wanlab.test.", "A", "10.10.0.10"}, {"web.wanlab.test.", "AAAA", "fd00:10::10"},
		{"second.web.wanlab.test.", "A", "10.11.0.10"}, {"second.web.wanlab.test.", "AAAA", "fd00:11::10"}}
	for _, c := range names {
		records, err := l.Dig(t.Context(), Users, c[0], c[1])
		if err != nil || len(records) != 1 || records[0].Data != c[2] || records[0].TTL != time.Minute {
			t.Errorf("%s %s: %+v, %v; want %s for a minute", c[0], c[1], records, err, c[2])
		}
		reverse, err := dns.ReverseAddr(c[2])
		if err != nil {
			t.Fatal(err)
		}
		if records, err := l.Dig(t.Context(), Users, reverse, "PTR"); err != nil || len(records) != 1 || records[0].Data != c[0] {
			t.Errorf("%s: %+v, %v; want %s", reverse, records, err, c[0])
		}
	}
	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range names {
		if records, err := l.Dig(t.Context(), Users, c[0], c[1]); err != nil || len(records) > 0 {
			t.Errorf("after the removal: %+v, %v", records, err)
		}
	}
}

func TestAgentsTakeTheConfigurationOfServices(t *testing.T) {
	l := upWith(t, Options{Wanmig: buildWanmig(t), Services: true, AgentConfig: map[string]string{RemoteDC: "redirect: {quiet: 7s}"}})
	remote := l.Sites[RemoteDC]
	config := func() string {
		t.Helper()
		text, err := os.ReadFile(remote.Dir + agentFile)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if got := config(); !strings.Contains(got, "redirect: {quiet: 7s}") || strings.Contains(got, "quiet: 5s") || !strings.Contains(got, "asn: 65021") {
		t.Errorf("configuration given with up:\n%s", got)
	}
	before, err := remote.Daemons(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.SetAgentConfig(t.Context(), RemoteDC, "redirect: {quiet: 8s}"); err != nil {
		t.Fatal(err)
	}
	after, err := remote.Daemons(t.Context())
	if err != nil || !after[Agent].Running || after[Agent].Pid == before[Agent].Pid || !strings.Contains(config(), "quiet: 8s") {
		t.Errorf("agent %+v, %v; want another than %+v, with\n%s", after[Agent], err, before[Agent], config())
	}
	run(t, l, RemoteDC, "wanmig", "site", "check", LocalDC)
	if err := l.SetAgentConfig(t.Context(), RemoteDC, "colour: red"); err == nil || !strings.Contains(err.Error(), "colour") {
		t.Errorf("unknown key: %v", err)
	}
	if err := l.SetAgentConfig(t.Context(), RemoteDC, ""); err != nil {
		t.Fatal(err)
	}
	if daemons, err := remote.Daemons(t.Context()); err != nil || daemons[Agent].Running {
		t.Errorf("an agent that had ended is %+v, %v", daemons[Agent], err)
	}
	if err := remote.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestThirdDataCentre(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := upWith(t, Options{Wanmig: buildWanmig(t), Services: true, Third: true, Link: LinkSettings{RTT: 40 * time.Millisecond}})
	all := l.DataCentres()
	if !slices.Equal(all, []string{LocalDC, RemoteDC, ThirdDC}) {
		t.Fatalf("data centres %v", all)
	}
	if opened, err := Open(l.Dir); err != nil || !slices.Equal(opened.DataCentres(), all) {
		t.Errorf("read from the directory: %v, %v", opened, err)
	}
	for _, from := range all {
		for _, to := range all {
			if from == to {
				continue
			}
			peer := l.Sites[to]
			for _, address := range []netip.Addr{peer.WANAddr.Addr(), peer.WANAddr6.Addr(), peer.BridgeAddr.Addr(), peer.BridgeAddr6.Addr(), peer.Second.Addr.Addr(), peer.Second.Addr6.Addr()} {
				run(t, l, from, "ping", "-c", "1", "-W", "5", address.String())
			}
			run(t, l, from, "wanmig", "site", "check", to)
		}
	}
	for _, address := range []string{"10.40.0.1", "fd00:40::1"} {
		if got := run(t, l, Users, "ip", "route", "get", address); !strings.Contains(got, "dev eth2 ") || !strings.Contains(got, "src "+usersOwn(address)) {
			t.Errorf("users send to third-dc by %s", got)
		}
		run(t, l, Users, "ping", "-c", "1", "-W", "5", address)
	}

	// Each link is by itself: what goes from one to another is seen on no third.
	if err := l.ResetCounters(t.Context()); err != nil {
		t.Fatal(err)
	}
	const pings = 20
	run(t, l, RemoteDC, "ping", "-c", fmt.Sprint(pings), "-i", "0.05", "-s", "1000", "-W", "5", l.Sites[ThirdDC].WANAddr.Addr().String())
	state, err := l.LinkState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{LocalDC, RemoteDC, LocalDC + ">" + ThirdDC, ThirdDC + ">" + LocalDC, RemoteDC + ">" + ThirdDC, ThirdDC + ">" + RemoteDC} {
		c, counted := state.Counters[name]
		direct := strings.Contains(name, ">") && !strings.Contains(name, LocalDC)
		if !counted || (c.Bytes >= pings*1028) != direct {
			t.Errorf("%s carried %+v, of %d pings between remote-dc and third-dc", name, c, pings)
		}
	}
	if err := l.ChangeLink(t.Context(), LinkChange{Cut: &[]string{ThirdDC}}); err != nil {
		t.Fatal(err)
	}
	for _, to := range DataCentres {
		if out, err := l.output(t.Context(), ThirdDC, "ping", "-c", "1", "-W", "1", l.Sites[to].WANAddr.Addr().String()); err == nil {
			t.Errorf("third-dc is cut, and reaches %s: %s", to, out)
		}
	}
	run(t, l, LocalDC, "ping", "-c", "1", "-W", "5", l.Sites[RemoteDC].WANAddr.Addr().String())
	if status := l.Status(t.Context()); len(status.Problems) > 0 || len(status.Sites) != 4 || !status.Sites[2].Daemons[Agent].Running {
		t.Errorf("status %+v", status)
	}
}

func usersOwn(to string) string {
	if strings.Contains(to, ":") {
		return usersLoopback6.Addr().String()
	}
	return usersLoopback.Addr().String()
}
