//go:build lab

package names

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// named is one BIND, a child of the test.
type named struct {
	address string
	dir     string
	stop    func()
	log     lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startNamed runs BIND with the options that keep it within its directory,
// until the test ends.
func startNamed(t *testing.T, address, listen6, config string) *named {
	t.Helper()
	n := &named{address: address, dir: t.TempDir()}
	conf := fmt.Sprintf(`
options {
	directory %[1]q;
	pid-file "named.pid";
	lock-file none;
	session-keyfile "session.key";
	managed-keys-directory ".";
	listen-on { %[2]s; };
	listen-on-v6 { %[3]s };
	notify-source %[2]s;
	transfer-source %[2]s;
	notify-delay 0;
	recursion no;
	dnssec-validation no;
	minimal-responses yes;
	max-records-per-type 0;
};
controls {};
%[4]s`, n.dir, address, listen6, config)
	path := filepath.Join(n.dir, "named.conf")
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start(t)
	return n
}

func (n *named) start(t *testing.T) {
	t.Helper()
	child := exec.Command("/usr/sbin/named", "-g", "-n", "1", "-c", filepath.Join(n.dir, "named.conf"))
	child.Stdout, child.Stderr = &n.log, &n.log
	n.stop = testnet.Here(t).Start(child)
	eventually(t, n.address+" answers", func() bool {
		_, err := dns.Exchange(new(dns.Msg).SetQuestion("example.test.", dns.TypeSOA), net.JoinHostPort(n.address, "53"))
		return err == nil
	})
}

func (n *named) writeFile(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

const soa = "$TTL 300\n@ SOA ns1.example.test. admin.example.test. 1 3600 60 86400 60\n@ NS ns1.example.test.\n@ NS ns2.example.test.\n"

// zoneFiles are the dynamic zones. The VM has 10.10.0.5 and fd10:10::5, and
// moves to 10.20.0.9 and fd10:20::9. 10.30.0.0/25 is delegated as RFC 2317 has
// it.
var zoneFiles = map[string]string{
	"example.test": soa + `
ns1 A 10.77.0.1
ns1 AAAA fd77::1
ns2 A 10.77.0.2
ns2 AAAA 2001:db8::2 ; no route to it
vm A 10.10.0.5
vm AAAA fd10:10::5
other A 10.10.0.5
pool A 10.10.0.5
pool A 10.10.0.6
pool A 10.10.0.7
alias CNAME vm
*.wild A 10.10.0.5
`,
	"10.10.in-addr.arpa":         soa + "5.0 PTR vm.example.test.\n5.0 PTR alias.example.test.\n5.0 PTR away.example.net.\n",
	"20.10.in-addr.arpa":         soa,
	"30.10.in-addr.arpa":         soa + "0-127.0 NS ns1.example.test.\n0-127.0 NS ns2.example.test.\n9.0 CNAME 9.0-127.0\n",
	"0-127.0.30.10.in-addr.arpa": soa,
	"0.1.0.0.0.1.d.f.ip6.arpa":   soa + reverse6("fd10:10::5", "0.1.0.0.0.1.d.f.ip6.arpa.") + " PTR vm.example.test.\n",
	"0.2.0.0.0.1.d.f.ip6.arpa":   soa,
	"unwritable.test":            soa + "vm A 10.10.0.5\n",
	"other-key.test":             soa + "vm A 10.10.0.5\n",
}

func reverse6(a, zone string) string {
	name, _ := reverseName(netip.MustParseAddr(a))
	return strings.TrimSuffix(name, "."+zone)
}

// site is a primary and a secondary, and a client of both.
type site struct {
	primary, secondary *named
	key                string // as in a file
	keyFile            string
	*Client
}

var (
	vm4, vm6   = netip.MustParseAddr("10.10.0.5"), netip.MustParseAddr("fd10:10::5")
	new4, new6 = netip.MustParseAddr("10.20.0.9"), netip.MustParseAddr("fd10:20::9")
	moves      = map[netip.Addr]netip.Addr{vm4: new4, vm6: new6}
)

// newSite starts both servers. secondaryFirst is the order in the client's
// configuration.
func newSite(t *testing.T, secondaryFirst bool) *site {
	t.Helper()
	s := &site{key: generateKey(t, "wanmig.", "hmac-sha256")}
	s.keyFile = writeKey(t, s.key)

	var primary, secondary strings.Builder
	primary.WriteString(s.key + generateKey(t, "another.", "hmac-sha512"))
	zones := make([]string, 0, len(zoneFiles))
	for zone := range zoneFiles {
		zones = append(zones, zone)
	}
	slices.Sort(zones)
	for _, zone := range zones {
		allowed := `allow-update { key "wanmig"; };`
		switch zone {
		case "unwritable.test":
			allowed = `allow-update { none; };`
		case "other-key.test":
			allowed = `update-policy { grant another zonesub any; };`
		}
		file := strings.ReplaceAll(zone, "/", "_") + ".zone"
		fmt.Fprintf(&primary, "zone %q { type primary; file %q; %s notify explicit; also-notify { %s; }; allow-transfer { %s; }; };\n",
			zone, file, allowed, secondaryAddr, secondaryAddr)
		fmt.Fprintf(&secondary, "zone %q { type secondary; file %q; primaries { %s; }; };\n", zone, file, primaryAddr)
	}
	// The files must be there when named starts.
	dir := t.TempDir()
	for zone, content := range zoneFiles {
		if err := os.WriteFile(filepath.Join(dir, zone+".zone"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.primary = startNamed(t, primaryAddr, primaryAddr6+";", strings.ReplaceAll(primary.String(), `file "`, `file "`+dir+`/`))
	s.secondary = startNamed(t, secondaryAddr, "none;", secondary.String())
	for _, zone := range zones {
		eventually(t, "the secondary has "+zone, func() bool { return serial(t, secondaryAddr, zone) == 1 })
	}
	s.Client = s.client(t, s.keyFile, secondaryFirst)
	return s
}

func (s *site) client(t *testing.T, keyFile string, secondaryFirst bool) *Client {
	t.Helper()
	servers := []string{primaryAddr, secondaryAddr + ":53"}
	if secondaryFirst {
		slices.Reverse(servers)
	}
	c, err := New(Config{Servers: servers, KeyFile: keyFile, Timeout: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// generateKey is what the key's file should be, as BIND's own tool writes it.
func generateKey(t *testing.T, name, algorithm string) string {
	t.Helper()
	out, err := exec.Command("/usr/sbin/tsig-keygen", "-a", algorithm, strings.TrimSuffix(name, ".")).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func writeKey(t *testing.T, key string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wanmig.key")
	if err := os.WriteFile(path, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func ask(t *testing.T, server, name string, qtype uint16) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: "tcp"}
	answer, _, err := c.Exchange(new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype), net.JoinHostPort(server, "53"))
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func serial(t *testing.T, server, zone string) uint32 {
	t.Helper()
	for _, rr := range ask(t, server, zone, dns.TypeSOA).Answer {
		if soa, ok := rr.(*dns.SOA); ok {
			return soa.Serial
		}
	}
	return 0
}

// has fails the test unless a server answers exactly this, as "TTL data" or
// "data", sorted.
func has(t *testing.T, server, name string, qtype uint16, want ...string) {
	t.Helper()
	if got := answers(t, server, name, qtype); !slices.Equal(got, want) {
		t.Errorf("%s has %s %s %q, want %q", server, name, dns.TypeToString[qtype], got, want)
	}
}

func answers(t *testing.T, server, name string, qtype uint16) []string {
	t.Helper()
	var got []string
	for _, rr := range ask(t, server, name, qtype).Answer {
		data := strings.TrimPrefix(rr.String(), rr.Header().String())
		got = append(got, fmt.Sprintf("%d %s", rr.Header().Ttl, data))
	}
	slices.Sort(got)
	return got
}

// change is what someone else does, with BIND's own tool.
func (s *site) change(t *testing.T, lines ...string) {
	t.Helper()
	c := exec.Command("/usr/bin/nsupdate", "-k", s.keyFile)
	c.Stdin = strings.NewReader("server " + primaryAddr + "\n" + strings.Join(lines, "\n") + "\nsend\n")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("nsupdate: %v: %s", err, out)
	}
}
