// Package lab builds two data centres and their users on one machine: network
// namespaces with a libvirtd and a wanmig agent each, and a WAN between them
// whose rate, delay and loss can be chosen. It serves cmd/wanlab, tests and
// benchmarks. It needs root, and leaves the host's own network alone; only
// /run/netns, where it names its network namespaces, it mounts onto itself for
// good, as ip netns does.
//
//	  users                   local-dc                              remote-dc
//	+-------------+   +---------------------------+       +---------------------------+
//	| eth0        |   | br0             wan0      |       |      wan0             br0 |
//	| 10.10.0.100 +---+ 10.10.0.1       10.255.0.1+--TUN--+10.255.0.2       10.20.0.1 |
//	| fd00:10::100|   | fd00:10::1      fd00:255::1       fd00:255::2      fd00:20::1 |
//	|             |   |   |                       |  link |                       |   |
//	|             |   | guests   libvirtd, agent  | emul. | libvirtd, agent    guests |
//	+-------------+   +---------------------------+       +---------------------------+
//
// A third data centre, third-dc, comes if asked for, with 10.40.0.1, fd00:40::1,
// 10.255.4.1 and fd00:255:4::1, and a link of the same kind to each of the
// others; the devices of the WAN are wan0 and wan1 then.
//
// Guest networks are /24 and /64; each data centre routes to the other's over
// wan0, and the users' default route is local-dc. Guests attach to br0, and with
// a second NIC also to br1, which is a network like it: 10.11.0.1, fd00:11::1 at
// local-dc, 10.21.0.1, fd00:21::1 at remote-dc, 10.41.0.1, fd00:41::1 at third-dc.
//
// A lab with services has a router (BIRD) in each site and a name server (BIND)
// in local-dc; see bird.go for the sessions and named.go for the zones. The
// users then have a second way out, and an address of their own, from which
// they send to either data centre and which all routers know:
//
//	  local-dc                         users                       remote-dc
//	+----------------+   +---------------------------+   +-----------------------+
//	| br0            |   | eth0         lo      eth1 |   | users                 |
//	| 10.10.0.1   .2 +---+ .100    10.30.0.1      .2 +---+ 10.254.2.1         .3 |
//	| fd00:10::1 ::2 |   | ::100   fd00:30::1    ::2 |   | fd00:254:2::1     ::3 |
//	+----------------+   +---------------------------+   +-----------------------+
//
// The routers have the first address of a data centre, its agent the other.
//
// A supervisor process owns the lab: the link emulator, and for each site an
// init, the parent of the site's daemons. In a data centre it is process 1 of
// its own PID, mount, UTS, IPC and network namespaces, at the users it has
// network and mounts of its own. The kernel kills an init with the supervisor,
// and everything in a data centre, guests too, and the users' router with
// their init. Each data centre has its own /run, /etc/libvirt, /etc/wanmig,
// /etc/hosts, /var/{lib,log,cache}/libvirt, /var/lib/wanmig and, in a lab with
// services, /etc/bind and /var/{lib,cache}/bind; the users then have their own
// /etc/resolv.conf. These stand below the lab's directory; all other files are
// the host's.
//
//	DIR/lab.json            Lab, for programs
//	DIR/supervisor.log
//	DIR/control.sock        the supervisor: the link
//	DIR/sites/NAME/run …    the site's own directories, by their paths
//	DIR/sites/NAME/log/     of init and the daemons
//	DIR/sites/NAME/init.sock
package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// DefaultDir holds the lab of who names no other directory.
const DefaultDir = "/var/tmp/wanlab"

var (
	// ErrNoLab is returned when a directory holds no lab.
	ErrNoLab = errors.New("no lab there")
	// ErrRunning is returned when a directory's lab runs already.
	ErrRunning = errors.New("a lab runs there already")
)

// Lab is a lab as DIR/lab.json describes it.
type Lab struct {
	Dir        string       `json:"dir"`
	ID         string       `json:"id"`         // tells labs on one machine apart
	Supervisor int          `json:"supervisor"` // process ID
	Control    string       `json:"control"`    // unix socket of the supervisor
	Wanmig     string       `json:"wanmig"`     // the program of the agents, empty without agents
	Link       LinkSettings `json:"link"`       // as of Up; LinkState has what they are now
	Services   bool         `json:"services"`   // with routers and name servers
	// AgentConfig has, by site, what the agent's configuration says besides what the lab gives it.
	AgentConfig map[string]string `json:"agent_config,omitempty"`
	Sites       map[string]*Site  `json:"sites"`
}

// newLab describes the lab that dir would hold. Names follow from dir alone, so
// that leftovers are found without lab.json.
func newLab(dir string) *Lab {
	sum := sha256.Sum256([]byte(dir))
	l := &Lab{
		Dir:     dir,
		ID:      hex.EncodeToString(sum[:3]),
		Control: filepath.Join(dir, "control.sock"),
		Sites:   map[string]*Site{},
	}
	for _, name := range DataCentres {
		l.Sites[name] = newDataCentre(l, name)
	}
	l.Sites[Users] = newUsers(l)
	return l
}

// addThird puts a third data centre into a new lab.
func (l *Lab) addThird() { l.Sites[ThirdDC] = newDataCentre(l, ThirdDC) }

// DataCentres are the sites of this lab that run guests.
func (l *Lab) DataCentres() []string {
	if l.Sites[ThirdDC] == nil {
		return DataCentres
	}
	return append(slices.Clone(DataCentres), ThirdDC)
}

// Open reads the description of the lab in dir. The lab need not run.
func Open(dir string) (*Lab, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("find lab: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "lab.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: make one with wanlab up", dir, ErrNoLab)
	}
	if err != nil {
		return nil, fmt.Errorf("read lab: %w", err)
	}
	l := &Lab{}
	if err := json.Unmarshal(text, l); err != nil {
		return nil, fmt.Errorf("read %s: %w: remove the lab with wanlab down", filepath.Join(dir, "lab.json"), err)
	}
	for _, name := range []string{LocalDC, RemoteDC, Users} {
		if l.Sites[name] == nil {
			return nil, fmt.Errorf("read %s: it has no site %s: remove the lab with wanlab down", filepath.Join(dir, "lab.json"), name)
		}
	}
	return l, nil
}

// save replaces lab.json at once, so that no reader sees half of it.
func (l *Lab) save() error {
	text, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return fmt.Errorf("encode lab: %w", err)
	}
	path := filepath.Join(l.Dir, "lab.json")
	if err := os.WriteFile(path+".new", append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("write lab: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write lab: %w", err)
	}
	return nil
}

// Site returns the site of a name.
func (l *Lab) Site(name string) (*Site, error) {
	if s := l.Sites[name]; s != nil {
		return s, nil
	}
	return nil, unknownSite(name, slices.Sorted(maps.Keys(l.Sites)))
}

func unknownSite(name string, known []string) error {
	return fmt.Errorf("no site %q: there are %s", name, strings.Join(known, ", "))
}

// Command prepares a command inside a site: in all namespaces of a data
// centre, in the network and mount namespaces of the users. Killing it through ctx kills
// the command inside too. Its working directory is the caller's, and the lab's
// wanmig is found first in its PATH.
func (l *Lab) Command(ctx context.Context, site, name string, args ...string) (*exec.Cmd, error) {
	s, err := l.Site(site)
	if err != nil {
		return nil, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return nil, fmt.Errorf("find working directory: %w", err)
	}
	enter := []string{"--target=" + strconv.Itoa(s.Pid), "--mount", "--net", "--wdns=" + dir}
	if s.Name == Users {
		enter = append(enter, "--")
	} else {
		// nsenter forks to enter a PID namespace; setpriv ties the child to it.
		enter = append(enter, "--uts", "--ipc", "--pid", "--", "setpriv", "--pdeathsig", "KILL", "--")
	}
	if err := s.alive(); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "nsenter", slices.Concat(enter, []string{name}, args)...)
	if l.Wanmig != "" {
		path := filepath.Dir(l.Wanmig) + string(filepath.ListSeparator) + os.Getenv("PATH")
		cmd.Env = append(os.Environ(), "PATH="+path)
	}
	return cmd, nil
}

// LinkState reads the settings and counters of the link as it runs.
func (l *Lab) LinkState(ctx context.Context) (LinkState, error) {
	var state LinkState
	if err := l.call(ctx, "GET", "/v1/link", nil, &state); err != nil {
		return LinkState{}, fmt.Errorf("read link: %w", err)
	}
	return state, nil
}

// ChangeLink changes the link while it runs.
func (l *Lab) ChangeLink(ctx context.Context, change LinkChange) error {
	for _, list := range []**[]string{&change.Cut, &change.Block, &change.NAT} {
		if *list != nil && **list == nil {
			*list = &[]string{} // as JSON, nil would mean that it stays
		}
	}
	if err := l.call(ctx, "PATCH", "/v1/link", change, nil); err != nil {
		return fmt.Errorf("change link: %w", err)
	}
	return nil
}

// Rebind has the NAT before a site use other ports from now on for what the
// site has begun, as if it had been restarted.
func (l *Lab) Rebind(ctx context.Context, site string) error {
	if err := l.call(ctx, "POST", "/v1/link/rebind/"+url.PathEscape(site), nil, nil); err != nil {
		return fmt.Errorf("rebind NAT: %w", err)
	}
	return nil
}

// ResetCounters sets all counters of the link to zero.
func (l *Lab) ResetCounters(ctx context.Context) error {
	if err := l.call(ctx, "POST", "/v1/link/reset-counters", nil, nil); err != nil {
		return fmt.Errorf("reset counters: %w", err)
	}
	return nil
}

func (l *Lab) call(ctx context.Context, method, path string, in, out any) error {
	if len(supervisors(l.Dir)) == 0 {
		return fmt.Errorf("the lab in %s does not run: remove it with wanlab down and make it again with wanlab up", l.Dir)
	}
	return call(ctx, l.Control, method, path, in, out)
}

// Down removes the lab: see the function Down.
func (l *Lab) Down(ctx context.Context) error { return Down(ctx, l.Dir) }
