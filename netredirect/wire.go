package netredirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unicode/utf8"
)

// Ask is what a source wants a destination to know before a move. It travels
// with the checks.
type Ask struct {
	UUID    string     `json:"uuid,omitempty"`
	Options Options    `json:"options"`
	Kinds   []Kind     `json:"kinds"` // that the source's host can make
	Outer   netip.Addr `json:"outer"` // the source's address towards the destination, as it sees it
	NICs    []NIC      `json:"nics"`  // as at the source
}

// Offer is the destination's answer to an Ask.
type Offer struct {
	Kinds    []Kind                    `json:"kinds"`
	Outer    netip.Addr                `json:"outer"`
	NAT      bool                      `json:"nat,omitempty"` // it sees the source at another address than the source does
	Mode     Mode                      `json:"mode"`
	Mapped   map[netip.Addr]netip.Addr `json:"mapped,omitempty"` // the new addresses that the VM would get
	Steps    []string                  `json:"steps"`            // what it would type
	Findings []Finding                 `json:"findings,omitempty"`
}

// The operations that a source asks of a destination for a move, and their
// messages.
const (
	opOpen   = "open"   // openRequest → openReply: make the tunnel's end
	opResize = "resize" // resizeRequest: change the tunnel's MTU
	opArm    = "arm"    // armRequest → armReply: make ready for the VM's packets
	opEnd    = "end"    // endRequest: undo what stands for the tunnel
	opStand  = "stand"  // standRequest: it leads to a VM that runs there already
	opSync   = "sync"   // syncRequest → syncReply: how it stands; after the move
)

type openRequest struct {
	Kind    Kind       `json:"kind"`
	Outer   netip.Addr `json:"outer"`
	MTU     int        `json:"mtu"`
	Options Options    `json:"options"`
	NICs    []NIC      `json:"nics"`
	UUID    string     `json:"uuid"`              // the VM's
	Vouched []string   `json:"vouched,omitempty"` // the agents that send the VM's packets to the source
}

type openReply struct {
	Outer netip.Addr `json:"outer"`
}

type resizeRequest struct {
	MTU int `json:"mtu"`
}

type armRequest struct{}

type standRequest struct{}

type armReply struct {
	Mode   Mode                      `json:"mode"`
	Mapped map[netip.Addr]netip.Addr `json:"mapped,omitempty"`
}

type endRequest struct {
	Reason string `json:"reason"`
}

// syncRequest is what the source has seen since the last one.
type syncRequest struct {
	Idle      time.Duration `json:"idle_ns"`    // since a packet of the VM passed the tunnel there
	RouteSeen bool          `json:"route_seen"` // its BGP peers have a route to the VM by the destination
	Draining  bool          `json:"draining"`   // an operator there said so
	Waits     []string      `json:"waits,omitempty"`
}

type syncReply struct {
	Remove  bool     `json:"remove"`  // the tunnel can go
	Serving bool     `json:"serving"` // routes lead there, so older ones can be withdrawn
	Waits   []string `json:"waits"`   // what it waits for
	Flows   []Flow   `json:"flows,omitempty"`
	Moved   *moved   `json:"moved,omitempty"` // the VM has gone on from there
}

const (
	minMTU  = 576
	maxMTU  = 9216
	maxText = 1 << 10

	maxStep     = 4 << 10   // of an Offer's Steps, in bytes
	maxSteps    = 256 << 10 // of all of them
	maxFindings = 100
	maxProto    = 16 // of a Flow's, in bytes
	maxVouched  = 16
	maxPeer     = 128 // of an agent's ID, in bytes
)

func (a Ask) validate() error {
	if len(a.Kinds) > len(Kinds) {
		return errors.New("more kinds of tunnels than there are")
	}
	if err := a.Options.Validate(); err != nil {
		return err
	}
	return validateNICs(a.NICs)
}

// Validate checks what a destination answered, and clips its texts, which are
// for people.
func (o *Offer) Validate() error {
	switch {
	case len(o.Kinds) > len(Kinds) || len(o.Steps) > 1000 || len(o.Findings) > maxFindings:
		return errors.New("the destination's answer about redirection is out of bounds")
	case o.Mode != Keep && o.Mode != New && o.Mode != "":
		return fmt.Errorf("the destination answers with the unknown mode %.20q", o.Mode)
	}
	if err := validateMapped(o.Mapped); err != nil {
		return err
	}
	room := maxSteps
	for i, text := range o.Steps {
		o.Steps[i] = clip(text, maxStep)
		if room -= len(o.Steps[i]); room < 0 {
			o.Steps = o.Steps[:i]
			break
		}
	}
	for i := range o.Findings {
		f := &o.Findings[i]
		f.Check, f.Problem, f.Remedy = clip(f.Check, maxText), clip(f.Problem, maxText), clip(f.Remedy, maxText)
	}
	return nil
}

// validate checks what a destination answered, and clips what it waits for.
func (r *syncReply) validate() error {
	if len(r.Flows) > maxFlows {
		return fmt.Errorf("the destination answers with %d flows: at most %d", len(r.Flows), maxFlows)
	}
	for _, f := range r.Flows {
		if len(f.Proto) > maxProto || f.From.Addr().Zone() != "" || f.To.Addr().Zone() != "" {
			return fmt.Errorf("the destination answers with a flow that is none: %.20q from %.60q to %.60q", f.Proto, f.From, f.To)
		}
	}
	if r.Moved != nil && len(r.Moved.Peer) > maxPeer {
		return fmt.Errorf("the destination answers with an agent's ID of %d bytes", len(r.Moved.Peer))
	}
	if r.Moved != nil {
		r.Moved.Site = clip(r.Moved.Site, maxPeer)
	}
	r.Waits = bounded(r.Waits)
	return nil
}

// clip cuts a text to a number of bytes, and not within a character.
func clip(text string, most int) string {
	if len(text) <= most {
		return text
	}
	for most > 0 && !utf8.RuneStart(text[most]) {
		most--
	}
	return text[:most]
}

func (r armReply) validate() error {
	if r.Mode != Keep && r.Mode != New {
		return fmt.Errorf("the destination answers with the unknown mode %.20q", r.Mode)
	}
	return validateMapped(r.Mapped)
}

func validateMapped(mapped map[netip.Addr]netip.Addr) error {
	if len(mapped) > maxAddresses {
		return fmt.Errorf("%d new addresses: at most %d", len(mapped), maxAddresses)
	}
	for a, to := range mapped {
		if err := errors.Join(validateAddress(a), validateAddress(to)); err != nil {
			return err
		}
		if a.Is4() != to.Is4() {
			return fmt.Errorf("%s can't be mapped to %s", a, to)
		}
	}
	return nil
}

func (r openRequest) validate() error {
	switch {
	case !slices.Contains(Kinds, r.Kind):
		return fmt.Errorf("tunnel kind %.20q is not known here: update this agent", r.Kind)
	case r.MTU < minMTU || r.MTU > maxMTU:
		return fmt.Errorf("tunnel MTU %d is out of bounds", r.MTU)
	case len(r.Vouched) > maxVouched || slices.ContainsFunc(r.Vouched, func(id string) bool { return len(id) > maxPeer }):
		return errors.New("the list of agents that send the VM's packets is out of bounds")
	}
	if err := r.Options.Validate(); err != nil {
		return err
	}
	return validateNICs(r.NICs)
}

func decode[T any](body []byte) (T, error) {
	var v T
	if err := json.Unmarshal(body, &v); err != nil {
		return v, fmt.Errorf("message about a redirect: %w", err)
	}
	return v, nil
}
