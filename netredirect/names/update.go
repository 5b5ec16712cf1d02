package names

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/dns"
)

// attempts is how often an update is made anew when the records change between
// the reading and the update.
const attempts = 3

// edit changes one RRset. Change returns what the records become; an error keeps
// the whole zone as it is.
type edit struct {
	name   string
	rrtype uint16
	change func(rrset) (rrset, error)
}

// edits are those of each zone, in the order in which the zones are updated.
type edits struct {
	zones  []string
	inZone map[string][]edit
}

// add appends an edit; one of the same RRset comes after the former.
func (e *edits) add(zone string, n edit) {
	if e.inZone == nil {
		e.inZone = map[string][]edit{}
	}
	for i, o := range e.inZone[zone] {
		if o.name == n.name && o.rrtype == n.rrtype {
			e.inZone[zone][i].change = func(s rrset) (rrset, error) {
				s, err := o.change(s)
				if err != nil {
					return s, err
				}
				return n.change(s)
			}
			return
		}
	}
	if len(e.inZone[zone]) == 0 {
		e.zones = append(e.zones, zone)
	}
	e.inZone[zone] = append(e.inZone[zone], n)
}

// step is an edit with the records before and after it.
type step struct {
	name          string
	rrtype        uint16
	before, after rrset
}

// update makes the edits of one zone at the server that takes updates.
func (c *Client) update(ctx context.Context, zone string, changes []edit) error {
	var failed []error
	for _, server := range c.inOrder() {
		taken, err := c.updateAt(ctx, server, zone, changes)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("update %s at %s: %w", zone, server, err)
		if taken || ctx.Err() != nil {
			return err
		}
		failed = append(failed, err)
	}
	return joined(failed)
}

// updateAt tells whether the server has taken an update. It also sends one that
// changes nothing, because of an edit's error or because all is done: whether
// the records read are those in force, only the server that takes updates knows.
func (c *Client) updateAt(ctx context.Context, server, zone string, changes []edit) (taken bool, err error) {
	for range attempts {
		steps, changed, err := c.plan(ctx, server, changes)
		if err != nil {
			return false, err
		}
		answer, err := c.exchange(ctx, server, updateMessage(zone, steps), true)
		if err != nil {
			return false, err
		}
		switch answer.Rcode {
		case dns.RcodeSuccess:
			return true, changed
		case dns.RcodeNXRrset, dns.RcodeYXRrset, dns.RcodeNameError, dns.RcodeYXDomain:
			// Read them again.
		default:
			return false, c.refusal(answer, zone)
		}
	}
	return false, fmt.Errorf("%w: records change while they are updated, or are answered from a wildcard or from another view", ErrChanged)
}

// plan reads the records and makes the edits. changed is the edits' ErrChanged.
func (c *Client) plan(ctx context.Context, server string, changes []edit) (steps []step, changed, err error) {
	var failed []error
	for _, e := range changes {
		answer, err := c.query(ctx, server, e.name, e.rrtype, true)
		if err != nil {
			return nil, nil, fmt.Errorf("read %s %s: %w", e.name, dns.TypeToString[e.rrtype], err)
		}
		before, err := readRRset(answer, e.name, e.rrtype)
		if errors.Is(err, ErrAlias) {
			return nil, nil, fmt.Errorf("%w: %w", ErrChanged, err)
		}
		if err != nil {
			return nil, nil, err
		}
		after, err := e.change(before)
		if err != nil {
			failed = append(failed, fmt.Errorf("%s %s: %w", e.name, dns.TypeToString[e.rrtype], err))
		}
		steps = append(steps, step{e.name, e.rrtype, before, after})
	}
	if len(failed) > 0 {
		for i := range steps {
			steps[i].after = steps[i].before
		}
	}
	return steps, joined(failed), nil
}

// updateMessage makes the records before a prerequisite of those after.
func updateMessage(zone string, steps []step) *dns.Msg {
	m := new(dns.Msg).SetUpdate(zone)
	for _, s := range steps {
		if len(s.before.data) == 0 {
			m.RRsetNotUsed([]dns.RR{&dns.ANY{Hdr: dns.RR_Header{Name: s.name, Rrtype: s.rrtype}}})
		}
		for _, data := range s.before.data {
			m.Used([]dns.RR{record(s.name, s.rrtype, 0, data)})
			if !s.after.has(data) {
				m.Remove([]dns.RR{record(s.name, s.rrtype, 0, data)})
			}
		}
		for _, data := range s.after.data {
			// The same record with another TTL takes the place of the former
			// (RFC 2136 section 3.4.2.2).
			if !s.before.has(data) || s.after.ttl != s.before.ttl {
				m.Insert([]dns.RR{record(s.name, s.rrtype, s.after.ttl, data)})
			}
		}
	}
	return m
}
