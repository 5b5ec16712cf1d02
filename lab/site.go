package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// The sites of a lab.
const (
	LocalDC  = "local-dc"
	RemoteDC = "remote-dc"
	ThirdDC  = "third-dc" // only if asked for
	Users    = "users"
)

// DataCentres are the sites that run guests in every lab, in the order of their
// numbers; the method of Lab has a third where there is one.
var DataCentres = []string{LocalDC, RemoteDC}

// Site is a data centre or the users. Paths are the host's.
type Site struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"` // network namespace, a name for ip netns
	Dir       string `json:"dir"`
	Pid       int    `json:"pid,omitempty"` // of its init
	Control   string `json:"control"`

	// Of data centres only.
	LibvirtSocket string         `json:"libvirt_socket,omitempty"`
	LibvirtURI    string         `json:"libvirt_uri,omitempty"` // for virsh at the other data centre
	AgentSocket   string         `json:"agent_socket,omitempty"`
	AgentAddr     netip.AddrPort `json:"agent_addr,omitzero"`
	WANAddr       netip.Prefix   `json:"wan_addr,omitzero"`
	WANAddr6      netip.Prefix   `json:"wan_addr6,omitzero"`
	Bridge        string         `json:"bridge,omitempty"`
	BridgeAddr    netip.Prefix   `json:"bridge_addr,omitzero"` // gateway and network of the guests
	BridgeAddr6   netip.Prefix   `json:"bridge_addr6,omitzero"`
	Second        GuestNetwork   `json:"second,omitzero"` // of guests' second NICs

	// Of the users only: on the guests' network of local-dc, and, in a lab with
	// services, the addresses from which they send.
	Addr      netip.Prefix `json:"addr,omitzero"`
	Addr6     netip.Prefix `json:"addr6,omitzero"`
	Loopback  netip.Prefix `json:"loopback,omitzero"`
	Loopback6 netip.Prefix `json:"loopback6,omitzero"`
}

// GuestNetwork is a bridge for guests, with its gateway and network.
type GuestNetwork struct {
	Bridge string       `json:"bridge"`
	Addr   netip.Prefix `json:"addr"`
	Addr6  netip.Prefix `json:"addr6"`
}

// guestNetworks are those of a data centre, the first one first.
func (s *Site) guestNetworks() []GuestNetwork {
	return []GuestNetwork{{s.Bridge, s.BridgeAddr, s.BridgeAddr6}, s.Second}
}

const (
	bridgeName = "br0"
	secondName = "br1"
	agentPort  = 7946
	// libvirtPort is where libvirtd listens without TLS by default.
	libvirtPort = 16509
)

// dcNumber is the number of a data centre in its addresses.
func dcNumber(name string) int {
	switch name {
	case RemoteDC:
		return 2
	case ThirdDC:
		return 4 // 3 is the users'
	}
	return 1
}

func newDataCentre(l *Lab, name string) *Site {
	n := dcNumber(name)
	dir := filepath.Join(l.Dir, "sites", name)
	wan, wan6 := fmt.Sprintf("10.255.0.%d/30", n), fmt.Sprintf("fd00:255::%d/64", n)
	if name == ThirdDC { // beside the network of the others' link
		wan, wan6 = "10.255.4.1/32", "fd00:255:4::1/128"
	}
	wanAddr := netip.MustParsePrefix(wan)
	return &Site{
		Name:          name,
		Namespace:     "wanlab-" + l.ID + "-" + name,
		Dir:           dir,
		Control:       filepath.Join(dir, "init.sock"),
		LibvirtSocket: filepath.Join(dir, "run/libvirt/libvirt-sock"),
		LibvirtURI:    libvirtURI(wanAddr.Addr()),
		AgentSocket:   filepath.Join(dir, "run/wanmig/agent.sock"),
		AgentAddr:     netip.AddrPortFrom(wanAddr.Addr(), agentPort),
		WANAddr:       wanAddr,
		WANAddr6:      netip.MustParsePrefix(wan6),
		Bridge:        bridgeName,
		BridgeAddr:    netip.MustParsePrefix(fmt.Sprintf("10.%d0.0.1/24", n)),
		BridgeAddr6:   netip.MustParsePrefix(fmt.Sprintf("fd00:%d0::1/64", n)),
		Second: GuestNetwork{
			Bridge: secondName,
			Addr:   netip.MustParsePrefix(fmt.Sprintf("10.%d1.0.1/24", n)),
			Addr6:  netip.MustParsePrefix(fmt.Sprintf("fd00:%d1::1/64", n)),
		},
	}
}

func libvirtURI(wan netip.Addr) string { return fmt.Sprintf("qemu+tcp://%s/system", wan) }

func newUsers(l *Lab) *Site {
	dir := filepath.Join(l.Dir, "sites", Users)
	return &Site{
		Name:      Users,
		Namespace: "wanlab-" + l.ID + "-" + Users,
		Dir:       dir,
		Control:   filepath.Join(dir, "init.sock"),
		Addr:      netip.MustParsePrefix("10.10.0.100/24"),
		Addr6:     netip.MustParsePrefix("fd00:10::100/64"),
	}
}

func (s *Site) namespacePath() string { return filepath.Join(namespaceDir, s.Namespace) }

// peer is the name of the other data centre of the pair.
func (s *Site) peer() string {
	if s.Name == LocalDC {
		return RemoteDC
	}
	return LocalDC
}

// alive says why a site cannot be entered.
func (s *Site) alive() error {
	if !isSiteInit(s.Pid, s.Name) {
		return fmt.Errorf("site %s does not run: remove the lab with wanlab down and make it again with wanlab up", s.Name)
	}
	if _, err := os.Stat(s.namespacePath()); err != nil {
		return fmt.Errorf("site %s does not run: its namespace %s is gone: remove the lab with wanlab down and make it again with wanlab up", s.Name, s.Namespace)
	}
	return nil
}

// The daemons that a site's init runs.
const (
	Libvirtd = "libvirtd"
	Agent    = "agent"
	Bird     = "bird"
	Named    = "named"
)

// DaemonStatus says whether a daemon runs, and otherwise how it ended.
type DaemonStatus struct {
	Running bool   `json:"running"`
	Pid     int    `json:"pid,omitempty"`   // inside the site
	Ended   string `json:"ended,omitempty"` // such as "exit status 1"
}

// Daemons reads the state of the daemons that were started, by name.
func (s *Site) Daemons(ctx context.Context) (map[string]DaemonStatus, error) {
	var status map[string]DaemonStatus
	if err := call(ctx, s.Control, "GET", "/v1/daemons", nil, &status); err != nil {
		return nil, fmt.Errorf("read daemons of %s: %w", s.Name, err)
	}
	return status, nil
}

// StartLibvirtd starts libvirtd and waits until its drivers answer.
func (s *Site) StartLibvirtd(ctx context.Context) error {
	return s.start(ctx, Libvirtd, func(ctx context.Context) error {
		// It listens before its drivers have started, or not.
		uri := "qemu+unix:///system?socket=" + s.LibvirtSocket
		out, err := exec.CommandContext(ctx, "virsh", "--connect", uri, "list", "--all").CombinedOutput()
		if err != nil {
			return fmt.Errorf("virsh list: %w: %s", err, bytes.TrimSpace(out))
		}
		return nil
	})
}

// KillLibvirtd kills libvirtd with SIGKILL and waits for its end. Guests go on.
func (s *Site) KillLibvirtd(ctx context.Context) error { return s.kill(ctx, Libvirtd) }

// StartAgent starts the agent and waits until it listens on its socket.
func (s *Site) StartAgent(ctx context.Context) error {
	return s.start(ctx, Agent, func(ctx context.Context) error {
		// A socket of an earlier run stays behind, but refuses.
		conn, err := new(net.Dialer).DialContext(ctx, "unix", s.AgentSocket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// KillAgent kills the agent with SIGKILL and waits for its end.
func (s *Site) KillAgent(ctx context.Context) error { return s.kill(ctx, Agent) }

const startTimeout = 30 * time.Second

func (s *Site) start(ctx context.Context, daemon string, answers func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := call(ctx, s.Control, "POST", "/v1/daemons/"+daemon+"/start", nil, nil); err != nil {
		return fmt.Errorf("start %s in %s: %w", daemon, s.Name, err)
	}
	for {
		answer := answers(ctx)
		if answer == nil {
			return nil
		}
		daemons, err := s.Daemons(ctx)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if err == nil && !daemons[daemon].Running {
			return fmt.Errorf("start %s in %s: %s, %s", daemon, s.Name, daemons[daemon].Ended, logEnd(s.log(daemon)))
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("start %s in %s: no answer: %w: %w, %s", daemon, s.Name, err, answer, logEnd(s.log(daemon)))
		}
	}
}

func (s *Site) kill(ctx context.Context, daemon string) error {
	if err := call(ctx, s.Control, "POST", "/v1/daemons/"+daemon+"/kill", nil, nil); err != nil {
		return fmt.Errorf("kill %s in %s: %w", daemon, s.Name, err)
	}
	return nil
}

func (s *Site) log(daemon string) string { return filepath.Join(s.Dir, "log", daemon+".log") }

// logEnd tells what a program said last.
func logEnd(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "its log ends:\n" + strings.Join(lines[max(0, len(lines)-5):], "\n")
}
