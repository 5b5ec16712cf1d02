package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Routers in a lab with services: BIRD in each site, all eBGP. The agents have
// sessions with the users' router alone, which lets them in and tells each what
// the others announced.
//
//	local-dc 65010 ---- users 65030 ---- remote-dc 65020
//	agent    65011 ----/           \---- agent     65021

func (s *Site) birdConfig() string { return filepath.Join(s.Dir, "etc/bird/bird.conf") }

// BirdSocket is where the site's router takes commands, for birdc -s. It is below
// the site's directory, which every process sees; in a data centre birdc looks
// there by itself.
func (s *Site) BirdSocket() string { return filepath.Join(s.Dir, "run/bird/bird.ctl") }

// birdTimers let a lost session be noticed, and a new one begin, within seconds.
const birdTimers = `template bgp session {
	hold time 9;
	keepalive time 3;
	connect delay time 1;
	connect retry time 2;
	error wait time 1, 4;
	strict bind yes;
}
`

// birdHead is what all routers have. guests4 and guests6 are true for the host
// routes of guests.
func (l *Lab) birdHead(id netip.Addr) string {
	var nets4, nets6 []string
	for _, name := range l.DataCentres() {
		dc := l.Sites[name]
		nets4 = append(nets4, dc.BridgeAddr.Masked().String()+"{32,32}")
		nets6 = append(nets6, dc.BridgeAddr6.Masked().String()+"{128,128}")
	}
	return fmt.Sprintf(`router id %s;
log stderr all;
protocol device { scan time 2; }
function guests4() { return net ~ [ %s ]; }
function guests6() { return net ~ [ %s ]; }
%s`, id, strings.Join(nets4, ", "), strings.Join(nets6, ", "), birdTimers)
}

// dcBird is the configuration of a data centre's router.
func (l *Lab) dcBird(dc *Site) string {
	u := l.uplink(dc)
	text := l.birdHead(u.DC.Addr())
	for _, family := range []struct {
		version                string
		bridge, own, dc, users netip.Prefix
	}{
		{"4", dc.BridgeAddr, usersLoopback, u.DC, u.Users},
		{"6", dc.BridgeAddr6, usersLoopback6, u.DC6, u.Users6},
	} {
		text += strings.NewReplacer("VERSION", family.version, "BRIDGE", family.bridge.Masked().String(), "DEVICE", dc.Bridge,
			"OWN", family.own.String(), "LOCAL", family.dc.Addr().String(), "PEER", family.users.Addr().String()).Replace(`
protocol static bridgeVERSION {
	ipvVERSION;
	route BRIDGE via "DEVICE";
}
protocol kernel kernelVERSION {
	ipvVERSION { import none; export where source = RTS_BGP; };
}
protocol bgp usersVERSION from session {
	local LOCAL as ` + fmt.Sprint(u.ASN) + `;
	neighbor PEER as ` + fmt.Sprint(usersASN) + `;
	ipvVERSION { import where net = OWN || guestsVERSION(); export where source = RTS_STATIC; };
}
`)
	}
	return text
}

// usersBird is the configuration of the users' router. A data centre is not
// told what its own agent announced: the next hop would be itself.
func (l *Lab) usersBird() string {
	text := l.birdHead(usersLoopback.Addr())
	local := l.Sites[LocalDC]
	for _, family := range []struct {
		version        string
		own, connected netip.Prefix
	}{
		{"4", usersLoopback, local.BridgeAddr},
		{"6", usersLoopback6, local.BridgeAddr6},
	} {
		text += strings.NewReplacer("VERSION", family.version, "OWN", family.own.String(), "ADDRESS", family.own.Addr().String(),
			"CONNECTED", family.connected.Masked().String()).Replace(`
protocol static loopbackVERSION {
	ipvVERSION;
	route OWN via "lo";
}
protocol kernel kernelVERSION {
	ipvVERSION {
		import none;
		export filter {
			if source != RTS_BGP || net = CONNECTED then reject;
			krt_prefsrc = ADDRESS;
			accept;
		};
	};
}
`)
	}
	for _, name := range l.DataCentres() {
		dc := l.Sites[name]
		u := l.uplink(dc)
		replace := strings.NewReplacer("NAME", strings.ReplaceAll(name, "-", "_"), "DCASN", fmt.Sprint(u.ASN), "AGENTASN", fmt.Sprint(u.AgentASN),
			"OWNASN", fmt.Sprint(usersASN), "LOCAL4", u.Users.Addr().String(), "LOCAL6", u.Users6.Addr().String(), "DC4", u.DC.Addr().String(),
			"DC6", u.DC6.Addr().String(), "AGENT4", u.Agent.Addr().String(),
			"BRIDGE4", dc.BridgeAddr.Masked().String(), "BRIDGE6", dc.BridgeAddr6.Masked().String())
		text += replace.Replace(`
protocol bgp NAME4 from session {
	local LOCAL4 as OWNASN;
	neighbor DC4 as DCASN;
	ipv4 {
		import where net = BRIDGE4;
		export where source = RTS_STATIC || guests4() && proto != "NAME_agent";
	};
}
protocol bgp NAME6 from session {
	local LOCAL6 as OWNASN;
	neighbor DC6 as DCASN;
	ipv6 {
		import where net = BRIDGE6;
		export where source = RTS_STATIC || guests6() && proto != "NAME_agent";
	};
}
protocol bgp NAME_agent from session {
	local LOCAL4 as OWNASN;
	neighbor AGENT4 as AGENTASN;
	passive yes;
	ipv4 { import where guests4(); export where guests4(); };
	ipv6 { import where guests6(); export where guests6(); };
}
`)
	}
	return text
}

func (l *Lab) writeBird() error {
	for _, s := range l.Sites {
		text := l.usersBird()
		if s.Name != Users {
			text = l.dcBird(s)
		}
		if err := os.WriteFile(s.birdConfig(), []byte(text), 0o644); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
	}
	return nil
}

// StartBird starts the site's router and waits until it answers.
func (s *Site) StartBird(ctx context.Context) error {
	return s.start(ctx, Bird, func(ctx context.Context) error {
		_, err := s.birdc(ctx, "show", "status")
		return err
	})
}

// KillBird kills the site's router with SIGKILL and waits for its end. The
// routes that it made stay.
func (s *Site) KillBird(ctx context.Context) error { return s.kill(ctx, Bird) }

// Birdc asks a site's router, as in: show route all for 10.10.0.10/32. Its
// sessions at the users are local_dc4, local_dc6, local_dc_agent and so on.
func (l *Lab) Birdc(ctx context.Context, site string, args ...string) (string, error) {
	s, err := l.Site(site)
	if err != nil {
		return "", err
	}
	if !l.Services {
		return "", errNoServices
	}
	return s.birdc(ctx, args...)
}

var errNoServices = errors.New("this lab has no services: make it with wanlab up --services")

func (s *Site) birdc(ctx context.Context, args ...string) (string, error) {
	program, err := lookPath("birdc")
	if err != nil {
		return "", err
	}
	out, err := output(exec.CommandContext(ctx, program, append([]string{"-r", "-s", s.BirdSocket()}, args...)...))
	if err != nil {
		return "", fmt.Errorf("router of %s: %w", s.Name, err)
	}
	return string(out), nil
}

// awaitRoutes returns when the routers have told each other their networks and
// their kernels know.
func (l *Lab) awaitRoutes(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for _, name := range l.DataCentres() {
		dc := l.Sites[name]
		for _, family := range []struct{ bridge, users netip.Addr }{
			{dc.BridgeAddr.Addr(), usersLoopback.Addr()},
			{dc.BridgeAddr6.Addr(), usersLoopback6.Addr()},
		} {
			for {
				err := l.Sites[Users].checkSource(family.bridge, family.users)
				if err == nil {
					err = dc.checkSource(family.users, netip.Addr{})
				}
				if err == nil {
					break
				}
				if pause(ctx) != nil {
					return fmt.Errorf("routers of users and %s: %w: %w", name, ctx.Err(), err)
				}
			}
		}
	}
	return nil
}

// checkSource checks that the site's kernel has a route to an address, and what
// it sends from, if from is valid.
func (s *Site) checkSource(to, from netip.Addr) error {
	return s.inNamespace(func() error {
		routes, err := netlink.RouteGet(to.AsSlice())
		if err != nil {
			return fmt.Errorf("route from %s to %s: %w", s.Name, to, err)
		}
		if len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
			return fmt.Errorf("no route from %s to %s", s.Name, to)
		}
		if got, _ := netip.AddrFromSlice(routes[0].Src); from.IsValid() && got.Unmap() != from {
			return fmt.Errorf("%s would send to %s from %s, not %s", s.Name, to, got.Unmap(), from)
		}
		return nil
	})
}
