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
	"text/template"

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

// birdHead is what all routers have. Its timers let a lost session be noticed,
// and a new one begin, within seconds; guests4 and guests6 are true for the host
// routes of guests.
const birdHead = `router id {{.ID}};
log stderr all;
protocol device { scan time 2; }
{{range .Families}}
function guests{{.Version}}() { return net ~ [ {{.Guests}} ]; }
{{end}}
template bgp session {
	hold time 9;
	keepalive time 3;
	connect delay time 1;
	connect retry time 2;
	error wait time 1, 4;
	strict bind yes;
}
`

// dcBird is the rest of a data centre's router.
const dcBird = `{{$dc := .}}{{range .Families}}
protocol static bridge{{.Version}} {
	ipv{{.Version}};
{{- range .Networks}}
	route {{.Network}} via "{{.Bridge}}";
{{- end}}
}
protocol kernel kernel{{.Version}} {
	ipv{{.Version}} { import none; export where source = RTS_BGP; };
}
protocol bgp users{{.Version}} from session {
	local {{.DC}} as {{$dc.Uplink.ASN}};
	neighbor {{.Users}} as {{$dc.UsersASN}};
	ipv{{.Version}} {
		import where net = {{.Loopback}} || guests{{.Version}}();
		export where source = RTS_STATIC;
	};
}
{{end}}`

// usersBird is the rest of the users' router. What is connected has its route
// already. A data centre is not told what its own agent announced: the next hop
// would be itself.
const usersBird = `{{range .Families}}
protocol static loopback{{.Version}} {
	ipv{{.Version}};
	route {{.Loopback}} via "lo";
}
protocol kernel kernel{{.Version}} {
	ipv{{.Version}} {
		import none;
		export filter {
			if source != RTS_BGP || net = {{(index .Networks 0).Network}} then reject;
			krt_prefsrc = {{.Loopback.Addr}};
			accept;
		};
	};
}
{{end}}{{range $dc := .DCs}}{{range .Families}}
protocol bgp {{$dc.Name}}{{.Version}} from session {
	local {{.Users}} as {{$dc.UsersASN}};
	neighbor {{.DC}} as {{$dc.Uplink.ASN}};
	ipv{{.Version}} {
		import where net ~ [ {{range $i, $n := .Networks}}{{if $i}}, {{end}}{{$n.Network}}{{end}} ];
		export where source = RTS_STATIC || guests{{.Version}}() && proto != "{{$dc.Name}}_agent";
	};
}
{{end}}
protocol bgp {{.Name}}_agent from session {
	local {{.Uplink.Users.Addr}} as {{.UsersASN}};
	neighbor {{.Uplink.Agent.Addr}} as {{.Uplink.AgentASN}};
	passive yes;
	ipv4 { import where guests4(); export where guests4(); };
	ipv6 { import where guests6(); export where guests6(); };
}
{{end}}`

var (
	dcBirdTemplate    = template.Must(template.New("").Parse(birdHead + dcBird))
	usersBirdTemplate = template.Must(template.New("").Parse(birdHead + usersBird))
)

// birdView is what the templates need of a data centre; for the users, of
// local-dc, to whose guests' network they are connected, and of all.
type birdView struct {
	Name     string // of its sessions at the users
	ID       netip.Addr
	Uplink   uplink
	UsersASN int
	Families [2]birdFamily
	DCs      []birdView
}

type birdFamily struct {
	Version   int
	Guests    string // a set of BIRD's: host routes in any bridge's network
	Networks  [2]birdNetwork
	Loopback  netip.Prefix
	DC, Users netip.Addr
}

type birdNetwork struct {
	Bridge  string
	Network netip.Prefix
}

func (l *Lab) birdView(dc *Site) birdView {
	var guests4, guests6 []string
	for _, name := range l.DataCentres() {
		for _, n := range l.Sites[name].guestNetworks() {
			guests4 = append(guests4, n.Addr.Masked().String()+"{32,32}")
			guests6 = append(guests6, n.Addr6.Masked().String()+"{128,128}")
		}
	}
	var networks4, networks6 [2]birdNetwork
	for i, n := range dc.guestNetworks() {
		networks4[i] = birdNetwork{n.Bridge, n.Addr.Masked()}
		networks6[i] = birdNetwork{n.Bridge, n.Addr6.Masked()}
	}
	u := l.uplink(dc)
	return birdView{
		Name: strings.ReplaceAll(dc.Name, "-", "_"), ID: u.DC.Addr(), Uplink: u, UsersASN: usersASN,
		Families: [2]birdFamily{
			{4, strings.Join(guests4, ", "), networks4, usersLoopback, u.DC.Addr(), u.Users.Addr()},
			{6, strings.Join(guests6, ", "), networks6, usersLoopback6, u.DC6.Addr(), u.Users6.Addr()},
		},
	}
}

// birdText is the configuration of a site's router.
func (l *Lab) birdText(s *Site) (string, error) {
	var text strings.Builder
	if s.Name != Users {
		err := dcBirdTemplate.Execute(&text, l.birdView(s))
		return text.String(), err
	}
	view := l.birdView(l.Sites[LocalDC])
	view.ID = usersLoopback.Addr()
	for _, name := range l.DataCentres() {
		view.DCs = append(view.DCs, l.birdView(l.Sites[name]))
	}
	err := usersBirdTemplate.Execute(&text, view)
	return text.String(), err
}

func (l *Lab) writeBird() error {
	for _, s := range l.Sites {
		text, err := l.birdText(s)
		if err != nil {
			return fmt.Errorf("write configuration: %w", err)
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
			{dc.Second.Addr.Addr(), usersLoopback.Addr()},
			{dc.Second.Addr6.Addr(), usersLoopback6.Addr()},
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
