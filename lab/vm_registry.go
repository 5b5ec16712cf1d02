package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func (l *Lab) vmDir() string { return filepath.Join(l.Dir, "guests") }
func (l *Lab) vmFile(name string) string {
	return filepath.Join(l.vmDir(), url.PathEscape(name)+".json")
}
func deriveMAC(name string) (mac [6]byte) {
	h := sha256.Sum256([]byte(name))
	copy(mac[:], []byte{0x52, 0x54, 0, h[0], h[1], h[2]})
	return
}

// linkLocal is the address that IPv6 makes from a MAC (RFC 4291, appendix A).
func linkLocal(m [6]byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

// VM returns a VM made by CreateVM.
func (l *Lab) VM(name string) (*VM, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(l.vmFile(name))
	if errors.Is(err, os.ErrNotExist) {
		names, listErr := l.vmNames()
		if listErr != nil {
			return nil, listErr
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("%q: %w: make one with wanlab vm NAME", name, ErrNoVM)
		}
		return nil, fmt.Errorf("%q: %w: there are %s", name, ErrNoVM, strings.Join(names, ", "))
	}
	if err != nil {
		return nil, fmt.Errorf("read VM: %w", err)
	}
	v := &VM{lab: l}
	if err := json.Unmarshal(b, v); err != nil {
		return nil, fmt.Errorf("read %s: %w", l.vmFile(name), err)
	}
	return v, nil
}

func (l *Lab) vmNames() ([]string, error) {
	entries, err := os.ReadDir(l.vmDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list VMs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if base, ok := strings.CutSuffix(e.Name(), ".json"); ok {
			if name, err := url.PathUnescape(base); err == nil {
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// register gives a VM its identity and the lowest address that no other VM of its site has, and writes it down.
func (l *Lab) register(name, site string) (*VM, error) {
	if err := os.MkdirAll(l.vmDir(), 0o755); err != nil {
		return nil, fmt.Errorf("register VM: %w", err)
	}
	dir, err := os.Open(l.vmDir())
	if err != nil {
		return nil, fmt.Errorf("register VM: %w", err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("register VM: lock: %w", err)
	}
	names, err := l.vmNames()
	if err != nil {
		return nil, err
	}
	mac := deriveMAC(name)
	used := make(map[netip.Addr]bool)
	for _, other := range names {
		if other == name {
			return nil, fmt.Errorf("VM %q exists already", name)
		}
		if deriveMAC(other) == mac {
			return nil, fmt.Errorf("VM %q would have the MAC of %q: choose another name", name, other)
		}
		v, err := l.VM(other)
		if err != nil {
			return nil, err
		}
		used[v.Address] = true
	}
	gateway := l.Sites[site].BridgeAddr.Addr().As4()
	v := &VM{Name: name, MAC: net.HardwareAddr(mac[:]).String(), LinkLocal: linkLocal(mac), Home: site, lab: l}
	for n := byte(10); ; n++ {
		v.Address = netip.AddrFrom4([4]byte{gateway[0], gateway[1], gateway[2], n})
		if n == 100 {
			return nil, fmt.Errorf("%s has no address left for VM %q", site, name)
		}
		if !used[v.Address] {
			break
		}
	}
	v.Address6 = sameHost(l.Sites[site].BridgeAddr6, v.Address)
	h := sha256.Sum256([]byte(l.ID + "/" + name))
	h[6], h[8] = h[6]&0x0f|0x40, h[8]&0x3f|0x80
	id := hex.EncodeToString(h[:16])
	v.UUID = id[:8] + "-" + id[8:12] + "-" + id[12:16] + "-" + id[16:20] + "-" + id[20:]
	return v, v.save()
}

// secondNIC gives the VM, at its own site, a second interface. Its MAC differs from the first one's by one number.
func (v *VM) secondNIC(site *Site) (*NIC, error) {
	mac, err := net.ParseMAC(v.MAC)
	if err != nil {
		return nil, fmt.Errorf("MAC of VM %q: %w", v.Name, err)
	}
	mac[2]++
	a := site.Second.Addr.Addr().As4()
	a[3] = v.Address.As4()[3]
	address := netip.AddrFrom4(a)
	return &NIC{MAC: mac.String(), Address: address, Address6: sameHost(site.Second.Addr6, address)}, nil
}

// sameHost is the address in an IPv6 network whose last group reads like the
// last number of an IPv4 address.
func sameHost(network netip.Prefix, host netip.Addr) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("%s%d", network.Masked().Addr(), host.As4()[3]))
}

func (v *VM) save() error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write VM: %w", err)
	}
	path := v.lab.vmFile(v.Name)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write VM: %w", err)
	}
	return os.Rename(path+".new", path)
}
