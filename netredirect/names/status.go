package names

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

// pollInterval is between two looks at servers that are behind.
const pollInterval = time.Second

// maxAddresses bounds the addresses of one name server.
const maxAddresses = 8

// ServerStatus is what one authoritative server has for one name.
type ServerStatus struct {
	Server  string   `json:"server"` // host:port, and its name where the zone gives it
	Zone    string   `json:"zone"`
	Name    string   `json:"name"`
	Type    string   `json:"type"`   // A, AAAA or PTR
	Moved   bool     `json:"moved"`  // it has the new and not the old
	Answer  []string `json:"answer"` // addresses, or names; sorted
	TTL     uint32   `json:"ttl"`    // seconds, as answered
	Serial  uint32   `json:"serial"` // of the zone, at this server
	Problem string   `json:"problem,omitempty"`
}

// Status asks every authoritative server: the configured ones, and the name
// servers that each zone lists. It returns a row for each server and name; the
// PTR record of an old and of a new address are two. What keeps a server from
// answering is the Problem of its rows, and an error only that nothing could be
// asked.
func (c *Client) Status(ctx context.Context, recs []Record, to map[netip.Addr]netip.Addr) ([]ServerStatus, error) {
	if err := checkMove(recs, to); err != nil {
		return nil, fmt.Errorf("look at DNS records: %w", err)
	}
	var asked []question
	var rows []ServerStatus
	for _, r := range recs {
		from, into := r.Address.String(), to[r.Address].String()
		asked = append(asked, question{r.Zone, r.Name, rrtype(r.Address), func(s rrset) bool { return s.has(into) && !s.has(from) }})
		if r.Pointer == nil {
			continue
		}
		asked = append(asked, question{r.Pointer.Zone, r.Pointer.Name, dns.TypePTR, func(s rrset) bool { return !s.has(r.Name) }})
		zone, name, err := c.reverseOf(ctx, to[r.Address])
		if err != nil {
			rows = append(rows, ServerStatus{Zone: zone, Name: name, Type: "PTR", Problem: err.Error()})
			continue
		}
		asked = append(asked, question{zone, name, dns.TypePTR, func(s rrset) bool { return s.has(r.Name) }})
	}
	rows = append(rows, c.survey(ctx, asked)...)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("look at DNS records: %w", context.Cause(ctx))
	}
	return rows, nil
}

// question is what to ask the servers of a zone, and when they are right.
type question struct {
	zone, name string
	rrtype     uint16
	done       func(rrset) bool
}

// await looks until every server is right.
func (c *Client) await(ctx context.Context, asked []question) error {
	var behind []string
	for {
		rows := c.survey(ctx, asked)
		if ctx.Err() == nil {
			behind = nil
			for _, r := range rows {
				switch {
				case r.Problem != "":
					behind = append(behind, cmp.Or(r.Server, r.Zone)+": "+r.Problem)
				case !r.Moved:
					behind = append(behind, fmt.Sprintf("%s answers %s %s with TTL %d, serial %d", r.Server, r.Name, r.Type, r.TTL, r.Serial))
				}
			}
			if len(behind) == 0 {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not at every server: %s: %w", cmp.Or(strings.Join(behind, "; "), "none asked"), context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// survey asks all servers at once, and each one question after the other.
func (c *Client) survey(ctx context.Context, asked []question) []ServerStatus {
	inZone := map[string][]question{}
	var zones []string
	for _, q := range merged(asked) {
		if len(inZone[q.zone]) == 0 {
			zones = append(zones, q.zone)
		}
		inZone[q.zone] = append(inZone[q.zone], q)
	}
	var rows []ServerStatus
	for _, zone := range zones {
		rows = append(rows, c.surveyZone(ctx, zone, inZone[zone])...)
	}
	return rows
}

// merged makes one question of several about one RRset.
func merged(asked []question) []question {
	var out []question
	for _, q := range asked {
		i := slices.IndexFunc(out, func(o question) bool {
			return o.zone == q.zone && o.name == q.name && o.rrtype == q.rrtype
		})
		if i < 0 {
			out = append(out, q)
			continue
		}
		first := out[i].done
		out[i].done = func(s rrset) bool { return first(s) && q.done(s) }
	}
	return out
}

// report is the rows of one server, and why it is asked.
type report struct {
	nameserver
	rows []ServerStatus
	err  error // the first Problem
}

func (c *Client) surveyZone(ctx context.Context, zone string, asked []question) []ServerStatus {
	servers := c.nameservers(ctx, zone)
	reports := make([]report, len(servers))
	var wg sync.WaitGroup
	for i, s := range servers {
		wg.Go(func() { reports[i] = c.surveyServer(ctx, s, zone, asked) })
	}
	wg.Wait()

	var rows []ServerStatus
	for _, r := range reports {
		if r.listed == "" && (errors.Is(r.err, ErrNotServed) || errors.Is(r.err, ErrRefused)) {
			continue // a configured server of other zones
		}
		otherWay := func(o report) bool { return o.listed != "" && o.listed == r.listed && o.err == nil }
		if isUnroutable(r.err) && slices.ContainsFunc(reports, otherWay) {
			continue // this host has no IPv6, say, and the server answers by IPv4
		}
		rows = append(rows, r.rows...)
	}
	if len(rows) == 0 {
		for _, q := range asked {
			rows = append(rows, ServerStatus{Zone: zone, Name: q.name, Type: dns.TypeToString[q.rrtype],
				Problem: ErrNotServed.Error()})
		}
	}
	return rows
}

func isUnroutable(err error) bool {
	return errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)
}

// surveyServer stops asking after the first problem.
func (c *Client) surveyServer(ctx context.Context, server nameserver, zone string, asked []question) report {
	r := report{nameserver: server, err: server.err}
	var serial uint32
	if r.err == nil {
		serial, r.err = c.serial(ctx, server.address, zone)
	}
	for _, q := range asked {
		row := ServerStatus{Server: server.String(), Zone: zone, Name: q.name, Type: dns.TypeToString[q.rrtype], Serial: serial}
		if r.err == nil {
			var s rrset
			if s, r.err = c.lookupAt(ctx, server.address, q.name, q.rrtype); r.err == nil {
				row.Answer, row.TTL, row.Moved = s.data, s.ttl, q.done(s)
			}
		}
		if r.err != nil {
			row.Problem = r.err.Error()
		}
		r.rows = append(r.rows, row)
	}
	return r
}

func (c *Client) serial(ctx context.Context, server, zone string) (uint32, error) {
	answer, err := c.query(ctx, server, zone, dns.TypeSOA, false)
	if err != nil {
		return 0, err
	}
	found, serial, err := readSOA(answer, zone)
	if err == nil && found != zone {
		err = fmt.Errorf("%w: the server has %s, but not %s", ErrNotServed, found, zone)
	}
	return serial, err
}

func (c *Client) lookupAt(ctx context.Context, server, name string, qtype uint16) (rrset, error) {
	answer, err := c.query(ctx, server, name, qtype, false)
	if err != nil {
		return rrset{}, err
	}
	return readRRset(answer, name, qtype)
}

// nameserver is one address of a server.
type nameserver struct {
	address string // host:port
	listed  string // its name in the zone's NS records; "": it is configured only
	err     error  // why it has no address
}

func (n nameserver) String() string {
	switch {
	case n.address == "":
		return n.listed
	case n.listed == "":
		return n.address
	}
	return n.address + " (" + n.listed + ")"
}

// nameservers returns the configured servers and those in the zone's NS
// records, each address once.
func (c *Client) nameservers(ctx context.Context, zone string) []nameserver {
	var servers []nameserver
	for _, address := range c.servers {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			continue // New wrote it
		}
		addrs, err := c.resolve(ctx, host)
		if err != nil {
			servers = append(servers, nameserver{address: address, err: err})
		}
		for _, a := range addrs {
			servers = append(servers, nameserver{address: net.JoinHostPort(a.String(), port)})
		}
	}
	hosts, err := c.nsRecords(ctx, zone)
	if err != nil && ctx.Err() == nil && !errors.Is(err, ErrSilent) {
		servers = append(servers, nameserver{listed: "name servers of " + zone, err: err})
	}
	for _, host := range hosts {
		addrs, err := c.resolveNameserver(ctx, host)
		if err != nil {
			servers = append(servers, nameserver{listed: host, err: err})
		}
		for _, a := range addrs {
			i := slices.IndexFunc(servers, func(s nameserver) bool { return s.has(a) })
			if i < 0 {
				servers = append(servers, nameserver{address: net.JoinHostPort(a.String(), "53"), listed: host})
			} else {
				servers[i].listed = cmp.Or(servers[i].listed, host)
			}
		}
	}
	return servers
}

// has tells whether the server is at an address, at whatever port.
func (n nameserver) has(a netip.Addr) bool {
	at, err := netip.ParseAddrPort(n.address)
	return err == nil && at.Addr() == a
}

// nsRecords returns the names of a zone's name servers.
func (c *Client) nsRecords(ctx context.Context, zone string) ([]string, error) {
	answer, err := c.ask(ctx, zone, dns.TypeNS)
	if err != nil {
		return nil, err
	}
	var hosts []string
	for _, rr := range answer.Answer {
		ns, ok := rr.(*dns.NS)
		if !ok || dns.CanonicalName(ns.Hdr.Name) != zone {
			continue
		}
		host, err := canonical(ns.Ns)
		if err != nil || !hostName(host) {
			return nil, fmt.Errorf("%w: name server %q of %s is no host", ErrAnswer, ns.Ns, zone)
		}
		if len(hosts) == maxServers {
			return nil, fmt.Errorf("%w: %s has more than %d name servers", ErrAnswer, zone, maxServers)
		}
		if !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	return hosts, nil
}

// resolveNameserver returns the addresses of a name server as the configured
// servers have them, or else the host's resolver.
func (c *Client) resolveNameserver(ctx context.Context, host string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		s, err := c.lookup(ctx, host, qtype)
		if errors.Is(err, ErrNotServed) {
			break
		}
		if err != nil {
			return nil, err
		}
		for _, data := range s.data[:min(len(s.data), maxAddresses)] {
			if a, err := netip.ParseAddr(data); err == nil {
				addrs = append(addrs, a.Unmap())
			}
		}
	}
	if len(addrs) > 0 {
		return addrs, nil
	}
	return c.resolve(ctx, host)
}

// resolve asks the host's resolver.
func (c *Client) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("address of name server %s: %w: let this host resolve it, or correct the name", host, err)
	}
	addrs = addrs[:min(len(addrs), maxAddresses)]
	for i, a := range addrs {
		addrs[i] = a.Unmap()
	}
	return addrs, nil
}
