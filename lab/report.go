package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// Report asks the guest for its report, from inside a data centre and over the link-local address, so that no route or
// address of either site matters. Site says where it runs.
func (v *VM) Report(ctx context.Context, site string) (*api.Report, error) {
	r := new(api.Report)
	return r, v.ask(ctx, site, "GET", "/report", r)
}

// LoadChange changes the load of a guest; what is nil stays.
type LoadChange struct {
	Dirty, Edit, Write, WorkingSet *int64
}

// Load changes what the guest does.
func (v *VM) Load(ctx context.Context, site string, c LoadChange) (*api.Report, error) {
	query := url.Values{}
	for key, value := range map[string]*int64{"dirty": c.Dirty, "edit": c.Edit, "write": c.Write, "working-set": c.WorkingSet} {
		if value != nil {
			query.Set(key, strconv.FormatInt(*value, 10))
		}
	}
	r := new(api.Report)
	return r, v.ask(ctx, site, "POST", "/load?"+query.Encode(), r)
}

// Verify has the guest check all its memory, the blocks it wrote and the files that its disks came with.
func (v *VM) Verify(ctx context.Context, site string) (*api.Verification, error) {
	r := new(api.Verification)
	return r, v.ask(ctx, site, "POST", "/verify", r)
}

// PowerOff has the guest write everything out and power off; it does not wait for the end.
func (v *VM) PowerOff(ctx context.Context, site string) error {
	return v.ask(ctx, site, "POST", "/poweroff", new(api.Report))
}

const maxAnswer = 1 << 20

func (v *VM) ask(ctx context.Context, site, method, path string, answer any) error {
	s, err := v.lab.Site(site)
	if err != nil {
		return err
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return s.dialBridge(ctx, network, netip.AddrPortFrom(v.LinkLocal, api.HTTPPort))
		},
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://guest"+path, nil)
	if err != nil {
		return err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return fmt.Errorf("ask VM %q from %s: %w", v.Name, site, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("ask VM %q from %s: %w", v.Name, site, err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("VM %q refuses: %s", v.Name, strings.TrimSpace(string(body)))
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("answer of VM %q: %w", v.Name, err)
	}
	return nil
}

// dialBridge connects to a link-local address on the data centre's bridge.
func (s *Site) dialBridge(ctx context.Context, network string, to netip.AddrPort) (conn net.Conn, err error) {
	if s.Bridge == "" {
		return nil, fmt.Errorf("guests are at data centres, not at %s", s.Name)
	}
	err = s.inNamespace(func() error {
		bridge, err := net.InterfaceByName(s.Bridge)
		if err != nil {
			return fmt.Errorf("bridge of %s: %w", s.Name, err)
		}
		// By number: net remembers numbers by name, for all namespaces alike.
		zone := strconv.Itoa(bridge.Index)
		conn, err = new(net.Dialer).DialContext(ctx, network, netip.AddrPortFrom(to.Addr().WithZone(zone), to.Port()).String())
		return err
	})
	return conn, err
}
