package lab

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// The name server of a lab with services is BIND at local-dc. It has the zone
// of the guests and those of their addresses, and takes updates with the key
// (RFC 2136, RFC 8945) that both data centres have.
const (
	Zone       = "wanlab.test"
	DNSKeyFile = "/etc/wanmig/dns.key" // in each data centre, as BIND writes keys

	reverseZone4 = "10.in-addr.arpa"
	reverseZone6 = "0.0.d.f.ip6.arpa"
	recordTTL    = 60 // seconds
)

// nameServer and nameServer6 are where it listens.
func (l *Lab) nameServer() netip.Addr  { return l.Sites[LocalDC].BridgeAddr.Addr() }
func (l *Lab) nameServer6() netip.Addr { return l.Sites[LocalDC].BridgeAddr6.Addr() }

// writeNamed writes the server's configuration where its AppArmor profile in
// Debian lets it read, the key and the users' resolv.conf.
func (l *Lab) writeNamed() error {
	var secret [32]byte
	_, _ = rand.Read(secret[:]) // never fails
	key := fmt.Sprintf("key \"wanlab\" {\n\talgorithm hmac-sha256;\n\tsecret \"%s\";\n};\n", base64.StdEncoding.EncodeToString(secret[:]))
	for _, name := range l.DataCentres() {
		if err := os.WriteFile(l.Sites[name].Dir+DNSKeyFile, []byte(key), 0o600); err != nil {
			return fmt.Errorf("write key: %w", err)
		}
	}
	local := l.Sites[LocalDC]
	files := map[string]string{local.Dir + namedFile: l.namedConfig(key), l.Sites[Users].Dir + resolvFile: l.resolvConf()}
	for _, zone := range []string{Zone, reverseZone4, reverseZone6} {
		files[local.Dir+zoneFile(zone)] = l.zone(zone)
	}
	for path, text := range files {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
	}
	// Other users than root resolve names too.
	if err := os.Chmod(l.Sites[Users].Dir+resolvFile, 0o644); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

const namedFile = "/etc/bind/named.conf"

func zoneFile(zone string) string { return "/var/lib/bind/" + zone + ".zone" }

func (l *Lab) namedConfig(key string) string {
	text := key + fmt.Sprintf(`options {
	directory "/var/cache/bind";
	listen-on { %s; };
	listen-on-v6 { %s; };
	allow-query { any; };
	recursion no;
	dnssec-validation no;
	empty-zones-enable no;
	notify no;
	max-cache-size 4m;
	pid-file none;
	session-keyfile none;
};
controls { };
`, l.nameServer(), l.nameServer6())
	for _, zone := range []string{Zone, reverseZone4, reverseZone6} {
		text += fmt.Sprintf("zone \"%s\" {\n\ttype primary;\n\tfile \"%s\";\n\tallow-update { key \"wanlab\"; };\n};\n", zone, zoneFile(zone))
	}
	return text
}

// zone has, but for the server itself, no records yet. Its name has two labels,
// unlike a guest's.
func (l *Lab) zone(name string) string {
	server := "ns." + LocalDC + "." + Zone + "."
	text := fmt.Sprintf("$TTL %d\n@ SOA %s root.%s. 1 3600 600 86400 1\n@ NS %s\n", recordTTL, server, Zone, server)
	if name == Zone {
		text += fmt.Sprintf("%s A %s\n%s AAAA %s\n", server, l.nameServer(), server, l.nameServer6())
	}
	return text
}

func (l *Lab) resolvConf() string {
	return fmt.Sprintf("nameserver %s\nnameserver %s\nsearch %s\noptions timeout:1 attempts:2\n", l.nameServer(), l.nameServer6(), Zone)
}

// StartNamed starts the name server, which local-dc has, and waits until it answers.
func (s *Site) StartNamed(ctx context.Context) error {
	return s.start(ctx, Named, func(ctx context.Context) error {
		query := new(dns.Msg).SetQuestion(Zone+".", dns.TypeSOA)
		return s.inNamespace(func() error {
			reply, err := dns.ExchangeContext(ctx, query, netip.AddrPortFrom(s.BridgeAddr.Addr(), 53).String())
			if err == nil && reply.Rcode != dns.RcodeSuccess {
				err = fmt.Errorf("it answers %s", dns.RcodeToString[reply.Rcode])
			}
			return err
		})
	})
}

// KillNamed kills the name server with SIGKILL and waits for its end.
func (s *Site) KillNamed(ctx context.Context) error { return s.kill(ctx, Named) }

// Record is a DNS record; Data is in the form of a zone file.
type Record struct {
	Name string // with a dot at the end
	TTL  time.Duration
	Type string
	Data string
}

// Dig asks the lab's name server from a site. A name or type that it does not
// have is an empty answer, all else than an answer is an error.
func (l *Lab) Dig(ctx context.Context, site, name, recordType string) ([]Record, error) {
	if !l.Services {
		return nil, errNoServices
	}
	out, err := l.output(ctx, site, "dig", "@"+l.nameServer().String(), "+tries=2", "+time=2", "+noall", "+comments", "+answer",
		"-q", dns.Fqdn(name), "-t", recordType)
	if err != nil {
		return nil, err
	}
	records, err := parseDig(out)
	if err != nil {
		return nil, fmt.Errorf("look up %s %s from %s: %w", name, recordType, site, err)
	}
	return records, nil
}

// parseDig reads what dig prints with +comments and +answer.
func parseDig(out string) ([]Record, error) {
	var records []Record
	status := "nothing"
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, ";") {
			if _, after, ok := strings.Cut(line, "status: "); ok {
				status, _, _ = strings.Cut(after, ",")
			}
			continue
		}
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 5 {
			return nil, fmt.Errorf("dig printed %q: want name, TTL, class, type and data", line)
		}
		ttl, err := strconv.ParseUint(fields[1], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("dig printed %q: TTL: %w", line, err)
		}
		records = append(records, Record{Name: fields[0], TTL: time.Duration(ttl) * time.Second, Type: fields[3], Data: strings.Join(fields[4:], " ")})
	}
	if status != "NOERROR" && status != "NXDOMAIN" {
		return nil, fmt.Errorf("the server answers %s", status)
	}
	return records, nil
}

var hostLabel = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)

// dnsName is the VM's own name in the zone, with a dot at the end, or empty if its
// own name cannot be one of a host (RFC 952, RFC 1123).
func (v *VM) dnsName() string {
	if !v.lab.Services || !hostLabel.MatchString(v.Name) {
		return ""
	}
	return v.Name + "." + Zone + "."
}

// hostRecords are the records of one name.
type hostRecords struct {
	name      string
	addresses [2]netip.Addr
}

// records are those of the VM's NICs, each of which has a name of its own.
func (v *VM) records() []hostRecords {
	name := v.dnsName()
	if name == "" {
		return nil
	}
	all := []hostRecords{{name, [2]netip.Addr{v.Address, v.Address6}}}
	if v.Second != nil {
		all = append(all, hostRecords{"second." + name, [2]netip.Addr{v.Second.Address, v.Second.Address6}})
	}
	return all
}

// addRecords makes the VM's records.
func (v *VM) addRecords(ctx context.Context) error {
	for _, r := range v.records() {
		forward := []string{
			fmt.Sprintf("add %s %d A %s", r.name, recordTTL, r.addresses[0]),
			fmt.Sprintf("add %s %d AAAA %s", r.name, recordTTL, r.addresses[1]),
		}
		var reverse []string
		for _, address := range r.addresses {
			owner, err := dns.ReverseAddr(address.String())
			if err != nil {
				return err
			}
			reverse = append(reverse, fmt.Sprintf("add %s %d PTR %s", owner, recordTTL, r.name))
		}
		if err := v.lab.updateNames(ctx, forward, reverse[:1], reverse[1:]); err != nil {
			return err
		}
	}
	return nil
}

// removeRecords deletes the VM's records, also those of an address that it got
// at another site.
func (v *VM) removeRecords(ctx context.Context) error {
	for _, r := range v.records() {
		updates := [][]string{{"delete " + r.name}}
		addresses := map[string]bool{r.addresses[0].String(): true, r.addresses[1].String(): true}
		for _, recordType := range []string{"A", "AAAA"} {
			records, err := v.lab.Dig(ctx, LocalDC, r.name, recordType)
			if err != nil {
				return err
			}
			for _, r := range records {
				addresses[r.Data] = true
			}
		}
		for address := range addresses {
			owner, err := dns.ReverseAddr(address)
			if err != nil {
				return err
			}
			updates = append(updates, []string{fmt.Sprintf("delete %s PTR %s", owner, r.name)})
		}
		if err := v.lab.updateNames(ctx, updates...); err != nil {
			return err
		}
	}
	return nil
}

// updateNames has nsupdate send each list of changes, which are to one zone.
func (l *Lab) updateNames(ctx context.Context, updates ...[]string) error {
	script := fmt.Sprintf("server %s\n", l.nameServer())
	for _, changes := range updates {
		for _, change := range changes {
			script += "update " + change + "\n"
		}
		script += "send\n"
	}
	cmd, err := l.Command(ctx, LocalDC, "nsupdate", "-k", DNSKeyFile)
	if err != nil {
		return err
	}
	cmd.Stdin = strings.NewReader(script)
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("update names: %w", err)
	}
	return nil
}
