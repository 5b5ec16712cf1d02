package netredirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/wanmig/wanmig/netredirect/names"
)

// record is a redirect as the journal keeps it, at one of its hosts.
type record struct {
	Move    string  `json:"move"`
	VM      string  `json:"vm"`
	UUID    string  `json:"uuid"`
	Site    string  `json:"site"` // the other side's
	Peer    string  `json:"peer"` // the other side's ID
	Role    Role    `json:"role"`
	State   State   `json:"state"`
	Options Options `json:"options"`

	Kind     Kind       `json:"kind"`
	Device   string     `json:"device"`
	Local    netip.Addr `json:"local"` // outer addresses
	Remote   netip.Addr `json:"remote"`
	MTU      int        `json:"mtu"`
	Slot     int        `json:"slot"`
	Priority int        `json:"priority"`
	NICs     []nic      `json:"nics"`
	Plan     Plan       `json:"plan"`

	Removing bool      `json:"removing,omitempty"` // it is being undone
	Ending   bool      `json:"ending,omitempty"`   // what stood for its tunnel is being undone
	Began    time.Time `json:"began"`
	Switched time.Time `json:"switched,omitzero"`
	Deadline time.Time `json:"deadline,omitzero"`

	// Of a destination.
	Vouched   []string                  `json:"vouched,omitempty"` // the agents that sent the VM's packets to the source
	Follows   string                    `json:"follows,omitempty"` // the move by which the VM came here, where it was another
	Mode      Mode                      `json:"mode,omitempty"`
	Mapped    map[netip.Addr]netip.Addr `json:"mapped,omitempty"` // the VM's own address: its new one
	Names     []names.Record            `json:"names,omitempty"`
	Found     bool                      `json:"found,omitempty"`     // Names is complete
	Lowered   time.Time                 `json:"lowered,omitzero"`    // the TTL is low since then
	NameMoved time.Time                 `json:"name_moved,omitzero"` // every server answers with the new addresses since then
	Announced []netip.Prefix            `json:"announced,omitempty"` // by BGP
	RouteSeen time.Time                 `json:"route_seen,omitzero"` // the network has the routes since then
	Restored  bool                      `json:"restored,omitempty"`  // the TTL is as it was
	Direct    bool                      `json:"direct,omitempty"`    // the VM's own connections leave directly by now
	NameBack  time.Time                 `json:"name_back,omitzero"`  // the VM has left, and its names have their old addresses since then
}

// nic is a hostNIC in the journal.
type nic struct {
	NIC
	BridgeMAC string `json:"bridge_mac"`
	Home      bool   `json:"home,omitempty"`

	Networks []netip.Prefix `json:"networks,omitempty"`
}

func (r *record) hostNICs() []hostNIC {
	var all []hostNIC
	for _, n := range r.NICs {
		all = append(all, hostNIC{n.NIC, n.BridgeMAC, n.Home, n.Networks})
	}
	return all
}

func (r *record) setNICs(nics []hostNIC) {
	r.NICs = nil
	for _, n := range nics {
		r.NICs = append(r.NICs, nic{n.NIC, n.bridgeMAC, n.home, n.networks})
	}
}

func (r *record) addresses() []netip.Addr { return addressesOf(r.hostNICs()) }

// tunnelled reports whether the tunnel is part of the redirect still.
func (r *record) tunnelled() bool { return r.State != Resident }

var moveID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,63}$`)

// validate checks what the journal or a peer could have brought in.
func (r *record) validate() error {
	switch {
	case !moveID.MatchString(r.Move):
		return fmt.Errorf("move %.40q is no ID", r.Move)
	case r.Role != Source && r.Role != Destination:
		return fmt.Errorf("role %.20q is not known", r.Role)
	case !slices.Contains(states, r.State):
		return fmt.Errorf("state %.20q is not known", r.State)
	case r.Slot < 0 || r.Slot >= maxSlots:
		return fmt.Errorf("slot %d is out of bounds", r.Slot)
	case r.Priority < 1 || r.Priority > topPriority:
		return fmt.Errorf("priority %d of its rules is out of bounds", r.Priority)
	}
	var nics []NIC
	for _, n := range r.NICs {
		nics = append(nics, n.NIC)
		if _, err := parseMAC(n.BridgeMAC); err != nil {
			return err
		}
	}
	if err := errors.Join(validateNICs(nics), validateMapped(r.Mapped)); err != nil {
		return err
	}
	for _, s := range r.Plan.steps() {
		if err := s.Validate(); err != nil {
			return err
		}
	}
	return r.Options.Validate()
}

// journal is a folder with one file a redirect.
type journal struct{ dir string }

func (j journal) path(move string) string { return filepath.Join(j.dir, move+".json") }

// put makes a record durable.
func (j journal) put(r *record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = renameio.WriteFile(j.path(r.Move), b, 0o600)
	}
	if err == nil {
		err = j.sync()
	}
	if err != nil {
		return fmt.Errorf("journal redirect of %s: %w", r.Move, err)
	}
	return nil
}

// sync makes the names of the files durable.
func (j journal) sync() error {
	d, err := os.Open(j.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// remove forgets a record.
func (j journal) remove(move string) error {
	if err := os.Remove(j.path(move)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("journal redirect of %s: %w", move, err)
	}
	return nil
}

// all reads every record. One that can't be read is an error of its own, so that
// the others are repaired all the same.
func (j journal) all() (records []*record, err error) {
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return nil, fmt.Errorf("open journal of redirects: %w", err)
	}
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("read journal of redirects: %w", err)
	}
	var errs []error
	for _, e := range entries {
		move, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue // a temporary file of a write that was cut short
		}
		b, err := os.ReadFile(filepath.Join(j.dir, e.Name()))
		r := &record{}
		if err == nil {
			err = json.Unmarshal(b, r)
		}
		if err == nil {
			err = r.validate()
		}
		if err == nil && r.Move != move {
			err = fmt.Errorf("it is of move %q", r.Move)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("redirect %s: %w: undo by hand what ip rule and nft list tables show of wanmig, then remove the file", filepath.Join(j.dir, e.Name()), err))
			continue
		}
		records = append(records, r)
	}
	return records, errors.Join(errs...)
}
