package hostnet

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

func (r *Rule) apply(_ context.Context, h *Host) error {
	standing, err := h.rules(familyOf(r.family()))
	if err != nil {
		return err
	}
	want := r.message()
	for _, s := range standing {
		if sameRule(s, want) {
			return nil
		}
		if s.Priority != r.Priority {
			continue
		}
		if sameSelector(s, want) {
			return fmt.Errorf("%w: a rule of protocol %d looks up table %d for the same packets at priority %d: remove it",
				ErrTaken, s.Protocol, s.Table, s.Priority)
		}
		// Asked to delete the wider of two rules, the kernel may take the
		// narrower one.
		if s.Protocol == Protocol && s.Table == r.Table && (covers(s, want) || covers(want, s)) {
			return fmt.Errorf("%w: rule %q of the same priority is wider or narrower: give one of them another priority",
				ErrTaken, describeRule(s))
		}
	}
	return h.kernel.RuleAdd(&want)
}

func (r *Rule) revert(_ context.Context, h *Host) error {
	standing, err := h.rules(familyOf(r.family()))
	if err != nil {
		return err
	}
	want := r.message()
	for _, s := range standing {
		if !sameRule(s, want) {
			continue
		}
		if err := h.kernel.RuleDel(&want); err != nil && !isGone(err) {
			return err
		}
		return nil
	}
	return nil
}

func (h *Host) rules(family int) ([]netlink.Rule, error) {
	rules, err := complete(func() ([]netlink.Rule, error) { return h.kernel.RuleList(family) })
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	return rules, nil
}

func (r *Rule) message() netlink.Rule {
	m := *netlink.NewRule()
	m.Family = familyOf(r.family())
	m.Priority = r.Priority
	m.Table = r.Table
	m.Protocol = Protocol
	m.IifName = r.IIf
	m.Mark = r.Mark
	if r.Mask != 0 {
		m.Mask = &r.Mask
	}
	if r.From.Bits() > 0 {
		m.Src = toIPNet(r.From)
	}
	if r.To.Bits() > 0 {
		m.Dst = toIPNet(r.To)
	}
	return m
}

func sameRule(a, b netlink.Rule) bool {
	return sameSelector(a, b) && a.Table == b.Table && a.Protocol == b.Protocol
}

// sameSelector tells whether two rules are for the same packets at the same
// priority.
func sameSelector(a, b netlink.Rule) bool {
	return a.Priority == b.Priority && covers(a, b) && covers(b, a)
}

// covers tells whether the kernel, asked to delete the first of two rules of one
// priority, could take the second: all that the first matches by, the second
// matches by as well (rule_find, net/core/fib_rules.c).
func covers(a, b netlink.Rule) bool {
	eitherPrefix := func(a, b netip.Prefix) bool { return a == b || a.Bits() <= 0 }
	mask := func(r netlink.Rule) uint32 {
		if r.Mask == nil {
			return 0
		}
		return *r.Mask
	}
	return eitherPrefix(fromIPNet(a.Src), fromIPNet(b.Src)) &&
		eitherPrefix(fromIPNet(a.Dst), fromIPNet(b.Dst)) &&
		(a.IifName == b.IifName || a.IifName == "") &&
		(a.OifName == b.OifName || a.OifName == "") &&
		(a.Mark == b.Mark || a.Mark == 0) && (mask(a) == mask(b) || mask(a) == 0) &&
		(a.Tos == b.Tos || a.Tos == 0) && a.Invert == b.Invert &&
		(a.IPProto == b.IPProto || a.IPProto <= 0) &&
		(a.Sport == nil || b.Sport != nil && *a.Sport == *b.Sport) &&
		(a.Dport == nil || b.Dport != nil && *a.Dport == *b.Dport) &&
		(a.UIDRange == nil || b.UIDRange != nil && *a.UIDRange == *b.UIDRange)
}

// describeRule prints a rule nearly as ip(8) does.
func describeRule(r netlink.Rule) string {
	prefix := func(p netip.Prefix) string {
		if !p.IsValid() {
			return "all"
		}
		return p.String()
	}
	mask := uint32(0)
	if r.Mask != nil {
		mask = *r.Mask
	}
	return words(fmt.Sprintf("%d: from %s", r.Priority, prefix(fromIPNet(r.Src))),
		when(r.Dst != nil, "to %s", prefix(fromIPNet(r.Dst))),
		when(r.IifName != "", "iif %s", r.IifName),
		when(mask != 0, "fwmark %#x/%#x", r.Mark, mask),
		fmt.Sprintf("lookup %d", r.Table))
}
