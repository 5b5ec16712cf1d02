package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/wanmig/wanmig/tunnel"
)

// errNoSite is returned when a site is not known here.
var errNoSite = errors.New("no such site")

// sites are the peers that an operator has added, in a file of the state folder.
type sites struct {
	path string
	mu   sync.Mutex
	list []Site
}

func openSites(path string) (*sites, error) {
	s := &sites{path: path}
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read sites: %w", err)
	}
	if err := json.Unmarshal(b, &s.list); err != nil {
		return nil, fmt.Errorf("read sites %s: %w: repair or remove the file and add the sites again", path, err)
	}
	for _, site := range s.list {
		if err := checkSite(&site); err != nil {
			return nil, fmt.Errorf("read sites %s: %w", path, err)
		}
	}
	return s, nil
}

// checkSite validates a site and brings its ID and transport to their one form.
func checkSite(site *Site) error {
	if !siteName.MatchString(site.Name) {
		return fmt.Errorf("%q is not a site's name: use letters, digits, dots and dashes", site.Name)
	}
	host, port, err := net.SplitHostPort(site.Address)
	if n, perr := strconv.Atoi(port); err != nil || host == "" || perr != nil || n < 1 || n > 65535 {
		return fmt.Errorf("%q is not an address: use HOST:PORT, with an IPv6 address in brackets", site.Address)
	}
	id, err := tunnel.ParseID(site.ID)
	if err != nil {
		return err
	}
	site.ID = string(id)
	if site.Transport == "" {
		return nil
	}
	transport, err := tunnel.ParseTransport(site.Transport)
	if err != nil {
		return fmt.Errorf("%q is no transport: there are auto, quic and tcp", site.Transport)
	}
	site.Transport = transport.String()
	return nil
}

// transport is that of a site that was checked.
func (s Site) transport() tunnel.Transport {
	t, err := tunnel.ParseTransport(s.Transport)
	if err != nil {
		return tunnel.Auto // it is not set
	}
	return t
}

func (s *sites) all() []Site {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.list)
}

// get finds a site, and tells which there are when it is not known.
func (s *sites) get(name string) (Site, error) {
	list := s.all()
	names := make([]string, 0, len(list))
	for _, site := range list {
		if site.Name == name {
			return site, nil
		}
		names = append(names, site.Name)
	}
	if len(names) == 0 {
		return Site{}, fmt.Errorf("%w: %q: none is known here: add it with wanmig site add NAME ADDRESS --id ID", errNoSite, name)
	}
	return Site{}, fmt.Errorf("%w: %q: there are %s", errNoSite, name, strings.Join(names, ", "))
}

// trusted reports whether a peer with this ID may connect.
func (s *sites) trusted(id tunnel.ID) bool { return s.nameOf(id) != "" }

func (s *sites) nameOf(id tunnel.ID) string {
	for _, site := range s.all() {
		if site.ID == string(id) {
			return site.Name
		}
	}
	return ""
}

// put adds a site or replaces the one of that name.
func (s *sites) put(site Site, self tunnel.ID) error {
	if err := checkSite(&site); err != nil {
		return err
	}
	if site.ID == string(self) {
		return errors.New("that is this agent's own ID: run wanmig id at the other site")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(s.list), func(o Site) bool { return o.Name == site.Name })
	for _, o := range list {
		if o.ID == site.ID {
			return fmt.Errorf("the site %s has that ID already: remove it first", o.Name)
		}
	}
	return s.save(append(list, site))
}

func (s *sites) remove(name string) error {
	if _, err := s.get(name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.save(slices.DeleteFunc(slices.Clone(s.list), func(o Site) bool { return o.Name == name }))
}

// save writes the list durably: a new file, its content and then its name.
func (s *sites) save(list []Site) error {
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.path), ".sites-*")
	if err != nil {
		return fmt.Errorf("write sites: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), s.path)
	}
	if err == nil {
		err = syncFolder(filepath.Dir(s.path))
	}
	if err != nil {
		return fmt.Errorf("write sites: %w", err)
	}
	s.list = list
	return nil
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
