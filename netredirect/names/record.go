package names

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// maxRecords bounds an RRset, and what is looked at in an answer's section.
const maxRecords = 256

// Record is a name with one address of the VM, as Find found it.
type Record struct {
	Zone    string     `json:"zone"` // canonical: lower case, final dot
	Name    string     `json:"name"` // canonical
	Address netip.Addr `json:"address"`
	TTL     uint32     `json:"ttl"` // seconds

	// Pointer is the PTR record by which Address names Name; nil: there is none.
	Pointer *Pointer `json:"pointer,omitempty"`
}

// Pointer is where a PTR record is.
type Pointer struct {
	Zone string `json:"zone"` // canonical
	Name string `json:"name"` // canonical: the reverse name, or what that is an alias of (RFC 2317)
	TTL  uint32 `json:"ttl"`  // seconds
}

// rrtype returns the type of the address's record.
func rrtype(a netip.Addr) uint16 {
	if a.Is4() {
		return dns.TypeA
	}
	return dns.TypeAAAA
}

// rrset is the records of one name and one type.
type rrset struct {
	ttl  uint32
	data []string // sorted; addresses, or canonical names
}

func (s rrset) has(data string) bool { return slices.Contains(s.data, data) }

func (s rrset) with(data string) rrset {
	if s.has(data) {
		return s
	}
	s.data = append(slices.Clone(s.data), data)
	slices.Sort(s.data)
	return s
}

func (s rrset) without(data string) rrset {
	s.data = slices.DeleteFunc(slices.Clone(s.data), func(d string) bool { return d == data })
	return s
}

func (s rrset) String() string {
	if len(s.data) == 0 {
		return "nothing"
	}
	return strings.Join(s.data, ", ")
}

// readRRset takes an RRset out of an answer.
func readRRset(answer *dns.Msg, name string, rrtype uint16) (rrset, error) {
	if len(answer.Answer) > maxRecords {
		return rrset{}, fmt.Errorf("%w: %d records for %s, more than %d", ErrAnswer, len(answer.Answer), name, maxRecords)
	}
	var s rrset
	for _, rr := range answer.Answer {
		h := rr.Header()
		if h.Class != dns.ClassINET || dns.CanonicalName(h.Name) != name {
			continue
		}
		if alias, ok := rr.(*dns.CNAME); ok {
			return rrset{}, &aliasError{name: name, target: dns.CanonicalName(alias.Target)}
		}
		if h.Rrtype != rrtype {
			continue
		}
		data, err := rdata(rr)
		if err != nil {
			return rrset{}, fmt.Errorf("%w: %s %s: %w", ErrAnswer, name, dns.TypeToString[rrtype], err)
		}
		if len(s.data) == 0 || h.Ttl < s.ttl {
			s.ttl = h.Ttl
		}
		s = s.with(data)
	}
	return s, nil
}

// rdata returns what an address or a PTR record has, in its one spelling.
func rdata(rr dns.RR) (string, error) {
	switch rr := rr.(type) {
	case *dns.A:
		if a, ok := netip.AddrFromSlice(rr.A.To4()); ok {
			return a.String(), nil
		}
	case *dns.AAAA:
		if a, ok := netip.AddrFromSlice(rr.AAAA.To16()); ok {
			return a.String(), nil
		}
	case *dns.PTR:
		return canonical(rr.Ptr)
	}
	return "", errors.New("a record without data")
}

// record makes a record of an RRset.
func record(name string, rrtype uint16, ttl uint32, data string) dns.RR {
	h := dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: ttl}
	switch rrtype {
	case dns.TypeA:
		return &dns.A{Hdr: h, A: netip.MustParseAddr(data).AsSlice()}
	case dns.TypeAAAA:
		a := netip.MustParseAddr(data).As16()
		return &dns.AAAA{Hdr: h, AAAA: a[:]}
	default:
		return &dns.PTR{Hdr: h, Ptr: data}
	}
}

// reverseName returns the name that has an address's PTR record.
func reverseName(a netip.Addr) (string, error) {
	name, err := dns.ReverseAddr(a.Unmap().WithZone("").String())
	if err != nil {
		return "", fmt.Errorf("reverse name of %v: %w", a, err)
	}
	return name, nil
}

// aliasError is an ErrAlias with its target.
type aliasError struct{ name, target string }

func (e *aliasError) Error() string {
	return fmt.Sprintf("%s is an alias (CNAME) of %s: give that name instead", e.name, e.target)
}

func (e *aliasError) Is(target error) bool { return target == ErrAlias }
