package names

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// What a configuration leaves out, and what it may say.
const (
	DefaultTTL     = 5 * time.Second
	DefaultTimeout = 3 * time.Second

	maxTTL     = 24 * time.Hour
	maxTimeout = time.Minute
	maxServers = 32 // configured ones, and name servers of a zone

	// silence is for how long a server that did not answer is asked last.
	silence = 30 * time.Second
)

// Config says which servers have the VM's records, and how they are changed.
type Config struct {
	Servers []string      // authoritative servers, host or host:port; updates go to the first that takes them
	KeyFile string        // TSIG key as tsig-keygen prints it
	Zones   []string      // the only zones to change; empty: all for which the servers are authoritative
	TTL     time.Duration // lowered TTL in whole seconds; 0: DefaultTTL
	Timeout time.Duration // for each exchange, by UDP and again by TCP; 0: DefaultTimeout
}

// Validate says what is wrong with the configuration. It reads no file and asks
// no server.
func (c Config) Validate() error {
	if len(c.Servers) == 0 {
		return errors.New("dns: servers: name at least one authoritative server")
	}
	if len(c.Servers) > maxServers {
		return fmt.Errorf("dns: servers: %d are too many, at most %d", len(c.Servers), maxServers)
	}
	for _, s := range c.Servers {
		if _, err := serverAddress(s); err != nil {
			return fmt.Errorf("dns: servers: %w", err)
		}
	}
	if c.KeyFile == "" {
		return errors.New("dns: key file: name the file that tsig-keygen wrote")
	}
	for _, z := range c.Zones {
		if _, err := canonical(z); err != nil {
			return fmt.Errorf("dns: zones: %w", err)
		}
	}
	if c.TTL != 0 && (c.TTL < time.Second || c.TTL > maxTTL || c.TTL%time.Second != 0) {
		return fmt.Errorf("dns: ttl: %v is not a number of whole seconds from 1s to %v", c.TTL, maxTTL)
	}
	if c.Timeout < 0 || c.Timeout > maxTimeout {
		return fmt.Errorf("dns: timeout: %v is not within %v", c.Timeout, maxTimeout)
	}
	return nil
}

// Client asks and updates the servers of one configuration. It is safe for
// concurrent use and holds no connection open.
type Client struct {
	servers []string // host:port
	keyFile string
	key     Key
	zones   []string // canonical
	ttl     uint32   // seconds
	timeout time.Duration
	clock   func() time.Time

	mu     sync.Mutex
	silent map[string]time.Time // when a server last did not answer
}

// New checks the configuration and reads its key. It asks no server.
func New(c Config) (*Client, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	key, err := LoadKey(c.KeyFile)
	if err != nil {
		return nil, err
	}
	n := &Client{keyFile: c.KeyFile, key: key, clock: time.Now, silent: map[string]time.Time{}}
	for _, s := range c.Servers {
		address, err := serverAddress(s)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(n.servers, address) {
			n.servers = append(n.servers, address)
		}
	}
	for _, z := range c.Zones {
		zone, err := canonical(z)
		if err != nil {
			return nil, err
		}
		n.zones = append(n.zones, zone)
	}
	n.ttl = uint32(cmp.Or(c.TTL, DefaultTTL) / time.Second)
	n.timeout = cmp.Or(c.Timeout, DefaultTimeout)
	return n, nil
}

// serverAddress turns host or host:port into host:port.
func serverAddress(s string) (string, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return net.JoinHostPort(a.String(), "53"), nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = s, "53"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("%q has no valid port: write host or host:port", s)
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return net.JoinHostPort(host, port), nil
	}
	if !hostName(host) {
		return "", fmt.Errorf("%q is no server: write host or host:port", s)
	}
	return net.JoinHostPort(host, port), nil
}

// hostName tells whether s can be the name of a host: letters, digits, dots,
// hyphens and, as seen in the wild, underscores.
func hostName(s string) bool {
	_, ok := dns.IsDomainName(s)
	if !ok || s == "" || s == "." {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}

// canonical returns a domain name in lower case and with its final dot. A slash
// may be part of it, as in the zones of RFC 2317.
func canonical(name string) (string, error) {
	_, ok := dns.IsDomainName(name)
	if !ok || name == "" || dns.Fqdn(name) == "." {
		return "", fmt.Errorf("%q is no domain name", name)
	}
	for i := range len(name) {
		if name[i] <= ' ' || name[i] > '~' {
			return "", fmt.Errorf("%q is no domain name", name)
		}
	}
	return dns.CanonicalName(name), nil
}

// inOrder returns the servers as configured, but those that were silent lately
// last.
func (c *Client) inOrder() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	order := slices.Clone(c.servers)
	rank := func(s string) int {
		if since, ok := c.silent[s]; ok && time.Since(since) < silence {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(order, func(a, b string) int { return rank(a) - rank(b) })
	return order
}

// heard remembers whether a configured server answered.
func (c *Client) heard(server string, answered bool) {
	if !slices.Contains(c.servers, server) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if answered {
		delete(c.silent, server)
	} else {
		c.silent[server] = time.Now()
	}
}
