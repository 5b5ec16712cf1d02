package names

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/miekg/dns"
)

// LowerTTL gives the records the low TTL, unless theirs is lower, and waits
// until every authoritative server answers with it; the end of ctx ends the
// waiting, with an error that names the servers that are behind. It returns
// ErrChanged for a record that is not as found. Caches keep what they have for
// the TTL as found.
func (c *Client) LowerTTL(ctx context.Context, recs []Record) error {
	var all edits
	var awaited []question
	for _, r := range recs {
		all.add(r.Zone, edit{r.Name, rrtype(r.Address), func(s rrset) (rrset, error) {
			if !s.has(r.Address.String()) {
				return s, fmt.Errorf("%w: it was %v and is %v", ErrChanged, r.Address, s)
			}
			s.ttl = min(s.ttl, c.ttl)
			return s, nil
		}})
		awaited = append(awaited, question{r.Zone, r.Name, rrtype(r.Address), func(s rrset) bool {
			return s.has(r.Address.String()) && s.ttl <= c.ttl
		}})
	}
	if _, err := c.updateAll(ctx, all); err != nil {
		return fmt.Errorf("lower TTL: %w", err)
	}
	if err := c.await(ctx, awaited); err != nil {
		return fmt.Errorf("lower TTL: %w", err)
	}
	return nil
}

// RestoreTTL gives the records, moved or not, the TTL that they had when found.
// A TTL that is not the low one was set by someone else and stays. It may be
// called again.
func (c *Client) RestoreTTL(ctx context.Context, recs []Record) error {
	var all edits
	for _, r := range recs {
		all.add(r.Zone, edit{r.Name, rrtype(r.Address), func(s rrset) (rrset, error) {
			if s.ttl == c.ttl {
				s.ttl = max(r.TTL, c.ttl)
			}
			return s, nil
		}})
	}
	if _, err := c.updateAll(ctx, all); err != nil {
		return fmt.Errorf("restore TTL: %w", err)
	}
	return nil
}

// Move gives the names the new addresses in the place of the old ones, and then
// lets the PTR records follow. Other addresses of the names stay, as does the
// TTL. A zone with a record that has neither the old nor the new address stays
// as it is, with ErrChanged. It may be called again: what has moved is left
// alone. ErrReverse is returned when only PTR records could not follow.
func (c *Client) Move(ctx context.Context, recs []Record, to map[netip.Addr]netip.Addr) error {
	return c.move(ctx, recs, to, false)
}

// MoveBack is the reverse of Move, with the same arguments. What did not move
// is left alone.
func (c *Client) MoveBack(ctx context.Context, recs []Record, to map[netip.Addr]netip.Addr) error {
	return c.move(ctx, recs, to, true)
}

func (c *Client) move(ctx context.Context, recs []Record, to map[netip.Addr]netip.Addr, back bool) error {
	if err := checkMove(recs, to); err != nil {
		return fmt.Errorf("move DNS records: %w", err)
	}
	var all edits
	for _, r := range recs {
		from, into := r.Address.String(), to[r.Address].String()
		if back {
			from, into = into, from
		}
		all.add(r.Zone, edit{r.Name, rrtype(r.Address), func(s rrset) (rrset, error) {
			if !s.has(from) && !s.has(into) {
				return s, fmt.Errorf("%w: it was %s and is %v", ErrChanged, from, s)
			}
			return s.without(from).with(into), nil
		}})
	}
	moved, err := c.updateAll(ctx, all)
	var failed []error
	for _, r := range recs {
		if r.Pointer == nil || !slices.Contains(moved, r.Zone) || ctx.Err() != nil {
			continue
		}
		if err := c.movePointer(ctx, r, to[r.Address], back); err != nil {
			failed = append(failed, fmt.Errorf("PTR of %s: %w", r.Name, err))
		}
	}
	switch reverse := joined(failed); {
	case err != nil && reverse != nil:
		return fmt.Errorf("move DNS records: %w; %w", err, reverse)
	case err != nil:
		return fmt.Errorf("move DNS records: %w", err)
	case reverse != nil:
		return fmt.Errorf("%w: %w", ErrReverse, reverse)
	}
	return nil
}

// movePointer makes the new PTR record before it removes the old one, so that
// the name always has one.
func (c *Client) movePointer(ctx context.Context, r Record, to netip.Addr, back bool) error {
	zone, name, err := c.reverseOf(ctx, to)
	if back && errors.Is(err, ErrNotServed) {
		zone, name = "", "" // it never came there
	} else if err != nil {
		return err
	}
	here, there := *r.Pointer, Pointer{Zone: zone, Name: name, TTL: r.Pointer.TTL}
	if back {
		here, there = there, here
	}
	var all edits
	all.add(there.Zone, edit{there.Name, dns.TypePTR, func(s rrset) (rrset, error) {
		if len(s.data) == 0 {
			s.ttl = there.TTL
		}
		return s.with(r.Name), nil
	}})
	if here.Zone != "" {
		all.add(here.Zone, edit{here.Name, dns.TypePTR, func(s rrset) (rrset, error) {
			return s.without(r.Name), nil
		}})
	}
	for _, zone := range all.zones {
		if err := c.update(ctx, zone, all.inZone[zone]); err != nil {
			return err
		}
	}
	return nil
}

// checkMove finds what would make a move half a move.
func checkMove(recs []Record, to map[netip.Addr]netip.Addr) error {
	for _, r := range recs {
		if n := to[r.Address]; !n.IsValid() || n.Zone() != "" || n.Is4In6() || n.Is4() != r.Address.Is4() {
			return fmt.Errorf("%s has %v, for which there is no new address of its family", r.Name, r.Address)
		}
	}
	return nil
}

// updateAll updates each zone, also after one has failed, and returns those
// which are done.
func (c *Client) updateAll(ctx context.Context, all edits) (done []string, err error) {
	var failed []error
	for _, zone := range all.zones {
		if err := c.update(ctx, zone, all.inZone[zone]); err != nil {
			failed = append(failed, err)
			if ctx.Err() != nil {
				break
			}
			continue
		}
		done = append(done, zone)
	}
	return done, joined(failed)
}
