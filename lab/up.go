package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Options of a new lab.
type Options struct {
	Dir     string // DefaultDir if empty; missing, or an empty directory
	Link    LinkSettings
	Wanmig  string // the program for the agents; by default wanmig beside this program
	NoAgent bool
	// Third adds a data centre third-dc, with links like the other one to both.
	Third bool
	// Services adds a router to each site and a name server to local-dc.
	Services bool
	// AgentConfig has, by data centre, YAML for the agent's configuration: its
	// keys come in place of the lab's or besides them.
	AgentConfig map[string]string
}

// The marker says that a directory is a lab's, and whether the lab made it.
const (
	markerName  = ".wanlab"
	markerMade  = "made by wanlab\n"
	markerFound = "found by wanlab, empty\n"
)

// Up makes a lab and returns when its parts answer each other. If it fails
// nothing is left.
func Up(ctx context.Context, o Options) (*Lab, error) {
	if !canRunChildren {
		return nil, errors.New("lab.RunChild must be called at the start of the program")
	}
	dir, err := checkOptions(&o)
	if err != nil {
		return nil, err
	}
	l := newLab(dir)
	if err := l.apply(o); err != nil {
		return nil, err
	}
	lock, err := claim(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := l.make(ctx, lock); err != nil {
		// The caller may have given up; the cleaning up goes on.
		return nil, errors.Join(err, l.remove(context.WithoutCancel(ctx)))
	}
	return l, nil
}

// checkOptions completes the options and returns the directory.
func checkOptions(o *Options) (string, error) {
	if err := checkHost(o.Services); err != nil {
		return "", err
	}
	if o.Dir == "" {
		o.Dir = DefaultDir
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return "", fmt.Errorf("find directory: %w", err)
	}
	if err := checkDir(dir); err != nil {
		return "", err
	}
	if o.NoAgent {
		o.Wanmig = ""
		return dir, nil
	}
	if o.Wanmig == "" {
		self, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("find wanmig: %w", err)
		}
		o.Wanmig = filepath.Join(filepath.Dir(self), "wanmig")
	}
	if o.Wanmig, err = filepath.Abs(o.Wanmig); err != nil {
		return "", fmt.Errorf("find wanmig: %w", err)
	}
	if err := unix.Access(o.Wanmig, unix.X_OK); err != nil {
		return "", fmt.Errorf("no program %s (%w): build it, name another with --wanmig, or use --no-agent", o.Wanmig, err)
	}
	return dir, nil
}

// apply describes what the options ask for.
func (l *Lab) apply(o Options) error {
	if o.Third {
		l.addThird()
	}
	if o.Services {
		l.Services = true
		l.Sites[Users].Loopback, l.Sites[Users].Loopback6 = usersLoopback, usersLoopback6
	}
	if err := o.Link.validate(l.DataCentres()); err != nil {
		return err
	}
	l.Link, l.Wanmig, l.AgentConfig = o.Link, o.Wanmig, o.AgentConfig
	for site := range o.AgentConfig {
		if !slices.Contains(l.DataCentres(), site) {
			return unknownSite(site, l.DataCentres())
		}
		if _, err := l.agentConfig(l.Sites[site]); err != nil {
			return err
		}
	}
	return nil
}

// maxSocketPath is the length of sun_path less its NUL (unix(7)).
const maxSocketPath = 107

func checkDir(dir string) error {
	l := newLab(dir)
	longest := l.Control
	for _, name := range DataCentres {
		for _, path := range []string{l.Sites[name].Control, l.Sites[name].LibvirtSocket, l.Sites[name].AgentSocket} {
			if len(path) > len(longest) {
				longest = path
			}
		}
	}
	if excess := len(longest) - maxSocketPath; excess > 0 {
		return fmt.Errorf("directory %s: %d bytes too long for the unix sockets in it: choose a shorter --dir", dir, excess)
	}
	for _, private := range slices.Concat([]string{"/proc", "/sys"}, privateDirs, namedDirs) {
		if within(dir, private) {
			return fmt.Errorf("directory %s: sites have a %s of their own and would not see it: choose another --dir", dir, private)
		}
	}
	return nil
}

// claim makes the directory a lab's and locks it. The lock is open in Up and
// in the supervisor, and is free when both have ended.
func claim(dir string) (*os.File, error) {
	path := filepath.Join(dir, markerName)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return claimNew(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read directory: %w", err)
	}
	if len(entries) > 0 {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("directory %s is not empty and not a lab's: choose another --dir", dir)
		}
		if len(supervisors(dir)) > 0 {
			return nil, fmt.Errorf("%s: %w: see it with wanlab status, remove it with wanlab down", dir, ErrRunning)
		}
		return nil, fmt.Errorf("%s holds what is left of a lab that does not run: remove it with wanlab down", dir)
	}
	// Exclusive: of two that come here at once, one goes on.
	return mark(path, os.O_EXCL, markerFound)
}

// unclaimed is where a directory is made: it gets its name with its marker in
// it, or an end in between would leave one that is nobody's.
func unclaimed(dir string) string {
	return filepath.Join(filepath.Dir(dir), markerName+"-"+filepath.Base(dir))
}

func claimNew(dir string) (*os.File, error) {
	fresh := unclaimed(dir)
	if err := os.Mkdir(fresh, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	lock, err := mark(filepath.Join(fresh, markerName), 0, markerMade)
	if err != nil {
		return nil, err
	}
	if err := os.Rename(fresh, dir); err != nil {
		lock.Close()
		return nil, fmt.Errorf("make directory: %w", err)
	}
	return lock, nil
}

// mark writes and locks the marker of a lab's directory.
func mark(path string, flags int, marker string) (*os.File, error) {
	lock, err := os.OpenFile(path, flags|os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("mark directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock directory %s: %w", filepath.Dir(path), err)
	}
	if err := lock.Truncate(0); err != nil {
		lock.Close()
		return nil, fmt.Errorf("mark directory: %w", err)
	}
	if _, err := lock.WriteString(marker); err != nil {
		lock.Close()
		return nil, fmt.Errorf("mark directory: %w", err)
	}
	return lock, nil
}

// make starts all parts in the order in which they need each other.
func (l *Lab) make(ctx context.Context, lock *os.File) error {
	if err := l.save(); err != nil {
		return err
	}
	supervisor, err := startChild(supervisorName, []string{l.Dir}, filepath.Join(l.Dir, "supervisor.log"),
		[]*os.File{lock}, &syscall.SysProcAttr{Setsid: true})
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	go func() { _ = supervisor.Wait() }() // reaps it, should this process outlive it
	made, err := Open(l.Dir)
	if err != nil {
		return err
	}
	*l = *made

	var daemons errgroup.Group
	for _, name := range l.DataCentres() {
		daemons.Go(func() error { return l.Sites[name].StartLibvirtd(ctx) })
	}
	if l.Services {
		for _, s := range l.Sites {
			daemons.Go(func() error { return s.StartBird(ctx) })
		}
		daemons.Go(func() error { return l.Sites[LocalDC].StartNamed(ctx) })
	}
	if err := daemons.Wait(); err != nil {
		return err
	}
	if l.Services {
		if err := l.awaitRoutes(ctx); err != nil {
			return err
		}
	}
	for i, name := range l.DataCentres() {
		if name != LocalDC { // whose libvirtd the users reach without the WAN
			if err := l.checkReach(ctx, Users, name); err != nil {
				return err
			}
		}
		for _, other := range l.DataCentres()[:i] {
			if err := l.checkReach(ctx, name, other); err != nil {
				return err
			}
		}
	}
	if l.Wanmig == "" {
		return nil
	}
	return l.startAgents(ctx)
}

// startAgents starts the agents and makes each known to the others.
func (l *Lab) startAgents(ctx context.Context) error {
	ids := map[string]string{}
	for _, name := range l.DataCentres() {
		if err := l.Sites[name].StartAgent(ctx); err != nil {
			return err
		}
		id, err := l.output(ctx, name, l.Wanmig, "id")
		if err != nil {
			return err
		}
		ids[name] = id
	}
	for _, name := range l.DataCentres() {
		for _, other := range l.DataCentres() {
			if other == name {
				continue
			}
			if _, err := l.output(ctx, name, l.Wanmig, "site", "add", other, l.Sites[other].AgentAddr.String(), "--id", ids[other]); err != nil {
				return err
			}
		}
	}
	return nil
}

// output runs a command in a site and returns what it prints.
func (l *Lab) output(ctx context.Context, site, name string, args ...string) (string, error) {
	cmd, err := l.Command(ctx, site, name, args...)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s in %s: %w: %s", filepath.Base(name), site, err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

const reachTimeout = 15 * time.Second

// checkReach connects from one site to the libvirtd of another.
func (l *Lab) checkReach(ctx context.Context, from, to string) error {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	addr := netip.AddrPortFrom(l.Sites[to].WANAddr.Addr(), libvirtPort)
	err := l.Sites[from].inNamespace(func() error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		return fmt.Errorf("reach %s from %s: %w", to, from, err)
	}
	return nil
}
