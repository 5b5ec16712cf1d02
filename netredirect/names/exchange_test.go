package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// serve answers each message on loopback with what f makes of it; nil is no
// answer.
func serve(t *testing.T, f func(q *dns.Msg, network string) []byte) (address string) {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenPacket("udp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{}, 2)
	t.Cleanup(func() {
		tcp.Close()
		udp.Close()
		<-done
		<-done
	})
	reply := func(p []byte, network string) []byte {
		q := new(dns.Msg)
		if err := q.Unpack(p); err != nil {
			t.Errorf("the client sent %x: %v", p, err)
		}
		return f(q, network)
	}
	go func() {
		defer func() { done <- struct{}{} }()
		p := make([]byte, 64<<10)
		for {
			n, from, err := udp.ReadFrom(p)
			if err != nil {
				return
			}
			if out := reply(p[:n], "udp"); out != nil {
				udp.WriteTo(out, from)
			}
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			var n uint16
			if binary.Read(conn, binary.BigEndian, &n) == nil {
				p := make([]byte, n)
				if _, err := io.ReadFull(conn, p); err == nil {
					if out := reply(p, "tcp"); out != nil {
						conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
					}
				}
			}
			conn.Close()
		}
	}()
	return tcp.Addr().String()
}

// answerTo makes an authoritative answer of records, in zone file format.
func answerTo(t *testing.T, q *dns.Msg, records ...string) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	for _, s := range records {
		rr, err := dns.NewRR(s)
		if err != nil {
			t.Error(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

func packed(t *testing.T, m *dns.Msg) []byte {
	t.Helper()
	p, err := m.Pack()
	if err != nil {
		t.Error(err)
	}
	return p
}

// signedBy is what a server with the key answers.
func signedBy(t *testing.T, m, q *dns.Msg, secret string) []byte {
	t.Helper()
	asked := q.IsTsig()
	m.SetTsig(asked.Hdr.Name, asked.Algorithm, tsigFudge, int64(asked.TimeSigned))
	p, _, err := dns.TsigGenerate(m, secret, asked.MAC, false)
	if err != nil {
		t.Error(err)
	}
	return p
}

const vmA = "VM.Example.Test. 300 A 10.0.0.1"

func TestHostileAnswers(t *testing.T) {
	for _, tt := range []struct {
		about  string
		answer func(q *dns.Msg, network string) []byte
		want   error // nil: an answer is taken
	}{
		{"good", func(q *dns.Msg, _ string) []byte { return packed(t, answerTo(t, q, vmA)) }, nil},
		{"other case", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Question[0].Name = "vM.eXAMPLE.tEST."
			return packed(t, m)
		}, nil},
		{"by TCP only", func(q *dns.Msg, network string) []byte {
			if network == "udp" {
				return nil
			}
			return packed(t, answerTo(t, q, vmA))
		}, nil},
		{"truncated by UDP", func(q *dns.Msg, network string) []byte {
			m := answerTo(t, q, vmA)
			if network == "udp" {
				m.Truncated, m.Answer = true, nil
			}
			return packed(t, m)
		}, nil},
		{"garbage by UDP", func(q *dns.Msg, network string) []byte {
			if network == "udp" {
				return append(binary.BigEndian.AppendUint16(nil, q.Id), strings.Repeat("\xff", 30)...)
			}
			return packed(t, answerTo(t, q, vmA))
		}, nil},
		{"truncated by both", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q)
			m.Truncated = true
			return packed(t, m)
		}, ErrAnswer},
		{"none", func(*dns.Msg, string) []byte { return nil }, ErrSilent},
		{"empty", func(*dns.Msg, string) []byte { return []byte{} }, ErrSilent},
		{"other ID", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Id++
			return packed(t, m)
		}, ErrAnswer},
		{"the query itself", func(q *dns.Msg, _ string) []byte { return packed(t, q) }, ErrAnswer},
		{"other opcode", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Opcode = dns.OpcodeNotify
			return packed(t, m)
		}, ErrAnswer},
		{"other name", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Question[0].Name = "other.example.test."
			return packed(t, m)
		}, ErrAnswer},
		{"other type", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Question[0].Qtype = dns.TypeAAAA
			return packed(t, m)
		}, ErrAnswer},
		{"no question", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Question = nil
			return packed(t, m)
		}, ErrAnswer},
		{"two questions", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q, vmA)
			m.Question = append(m.Question, m.Question[0])
			return packed(t, m)
		}, ErrAnswer},
		{"referral", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q)
			m.Authoritative = false
			return packed(t, m)
		}, ErrNotServed},
		{"refused", func(q *dns.Msg, _ string) []byte {
			return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeRefused))
		}, ErrNotServed},
		{"failed", func(q *dns.Msg, _ string) []byte {
			return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeServerFailure))
		}, ErrFailed},
		{"alias", func(q *dns.Msg, _ string) []byte {
			return packed(t, answerTo(t, q, "vm.example.test. 300 CNAME other.example.test.", "other.example.test. 300 A 10.0.0.1"))
		}, ErrAlias},
		{"too many records", func(q *dns.Msg, network string) []byte {
			m := answerTo(t, q, slices.Repeat([]string{vmA}, maxRecords+1)...)
			m.Compress = true
			if network == "udp" {
				m.Truncated, m.Answer = true, nil
			}
			return packed(t, m)
		}, ErrAnswer},
		{"record without data", func(q *dns.Msg, _ string) []byte {
			m := answerTo(t, q)
			m.Answer = []dns.RR{&dns.ANY{Hdr: dns.RR_Header{Name: "vm.example.test.", Rrtype: dns.TypeA, Class: dns.ClassINET}}}
			return packed(t, m)
		}, ErrAnswer},
	} {
		t.Run(tt.about, func(t *testing.T) {
			c := testClient(t, serve(t, tt.answer))
			s, err := c.lookup(t.Context(), "vm.example.test.", dns.TypeA)
			if tt.want != nil {
				if !errors.Is(err, tt.want) {
					t.Errorf("%v, %v, want %v", s, err, tt.want)
				}
				return
			}
			if err != nil || !s.equal(rrset{300, []string{"10.0.0.1"}}) {
				t.Errorf("%v, %v", s, err)
			}
		})
	}
}

// An answer to an update is believed with a valid signature only.
func TestHostileAnswersToUpdates(t *testing.T) {
	const otherSecret = "c2VjcmV0"
	for _, tt := range []struct {
		about  string
		answer func(q *dns.Msg) []byte // to the update; queries are answered well
		want   error
	}{
		{"good", func(q *dns.Msg) []byte { return signedBy(t, new(dns.Msg).SetReply(q), q, testSecret) }, nil},
		{"no zone in it", func(q *dns.Msg) []byte {
			m := new(dns.Msg).SetReply(q)
			m.Question = nil
			return signedBy(t, m, q, testSecret)
		}, nil},
		{"unsigned success", func(q *dns.Msg) []byte { return packed(t, new(dns.Msg).SetReply(q)) }, ErrAnswer},
		{"unsigned prerequisite", func(q *dns.Msg) []byte { return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeNXRrset)) }, ErrAnswer},
		{"signed by another", func(q *dns.Msg) []byte { return signedBy(t, new(dns.Msg).SetReply(q), q, otherSecret) }, ErrAnswer},
		{"signature of another request", func(q *dns.Msg) []byte {
			q.IsTsig().MAC = strings.Repeat("ab", 32)
			return signedBy(t, new(dns.Msg).SetReply(q), q, testSecret)
		}, ErrAnswer},
		{"changed after signing", func(q *dns.Msg) []byte {
			p := signedBy(t, new(dns.Msg).SetRcode(q, dns.RcodeNXRrset), q, testSecret)
			p[3] &^= 0xf // NOERROR
			return p
		}, ErrAnswer},
		{"old signature", func(q *dns.Msg) []byte {
			q.IsTsig().TimeSigned -= 2 * tsigFudge
			return signedBy(t, new(dns.Msg).SetReply(q), q, testSecret)
		}, ErrAnswer},
		{"not authoritative", func(q *dns.Msg) []byte { return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeNotAuth)) }, ErrRefused},
		{"not implemented", func(q *dns.Msg) []byte { return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeNotImplemented)) }, ErrRefused},
		{"unknown code", func(q *dns.Msg) []byte { return packed(t, new(dns.Msg).SetRcode(q, 15)) }, ErrRefused},
		{"failed", func(q *dns.Msg) []byte { return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)) }, ErrFailed},
		{"clock with odd time", func(q *dns.Msg) []byte {
			m := new(dns.Msg).SetRcode(q, dns.RcodeNotAuth)
			m.Extra = []dns.RR{&dns.TSIG{Hdr: dns.RR_Header{Name: "wanmig.", Rrtype: dns.TypeTSIG, Class: dns.ClassANY}, Algorithm: dns.HmacSHA256,
				Error: dns.RcodeBadTime, OtherLen: 2, OtherData: "ffff"}}
			return packed(t, m)
		}, ErrClock},
		{"always changed", func(q *dns.Msg) []byte {
			return signedBy(t, new(dns.Msg).SetRcode(q, dns.RcodeNXRrset), q, testSecret)
		}, ErrChanged},
	} {
		t.Run(tt.about, func(t *testing.T) {
			c := testClient(t, serve(t, func(q *dns.Msg, _ string) []byte {
				if q.Opcode == dns.OpcodeUpdate {
					return tt.answer(q)
				}
				return signedBy(t, answerTo(t, q, vmA), q, testSecret)
			}))
			err := c.update(t.Context(), "example.test.", []edit{{"vm.example.test.", dns.TypeA, func(s rrset) (rrset, error) {
				return s.without("10.0.0.1").with("10.0.0.9"), nil
			}}})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestZoneOf(t *testing.T) {
	const soa = " 60 SOA ns.example.test. admin.example.test. 7 1 1 1 1"
	for _, tt := range []struct {
		about, answer, authority, zone string
		want                           error
	}{
		{"apex", "Example.Test." + soa, "", "example.test.", nil},
		{"below", "", "example.test." + soa, "example.test.", nil},
		{"the name itself", "", "vm.example.test." + soa, "vm.example.test.", nil},
		{"of another zone", "", "other.test." + soa, "", ErrAnswer},
		{"of a child", "", "a.vm.example.test." + soa, "", ErrAnswer},
		{"of a name that ends alike", "", "ample.test." + soa, "", ErrAnswer},
		{"of the root", "", "." + soa, "", ErrAnswer},
		{"none", "", "", "", ErrAnswer},
		{"alias", "vm.example.test. 60 CNAME other.test.", "other.test." + soa, "", ErrAlias},
	} {
		t.Run(tt.about, func(t *testing.T) {
			c := testClient(t, serve(t, func(q *dns.Msg, _ string) []byte {
				m := answerTo(t, q)
				if tt.answer != "" {
					m = answerTo(t, q, tt.answer)
				}
				if tt.authority != "" {
					rr, err := dns.NewRR(tt.authority)
					if err != nil {
						t.Error(err)
					}
					m.Ns = []dns.RR{rr}
				}
				return packed(t, m)
			}))
			zone, err := c.zoneOf(t.Context(), "vm.example.test.")
			if zone != tt.zone || !errors.Is(err, tt.want) {
				t.Errorf("%q, %v, want %q, %v", zone, err, tt.zone, tt.want)
			}
		})
	}
}

// A zone may list more name servers than are good, or names that are none.
func TestHostileNameservers(t *testing.T) {
	for _, hosts := range [][]string{
		slices.Collect(func(yield func(string) bool) {
			for i := 0; i <= maxServers && yield(fmt.Sprintf("ns%d.example.test.", i)); i++ {
			}
		}),
		{`a\032b.example.test.`},
		{"."},
	} {
		c := testClient(t, serve(t, func(q *dns.Msg, _ string) []byte {
			var records []string
			for _, h := range hosts {
				records = append(records, "example.test. 60 NS "+h)
			}
			m := answerTo(t, q, records...)
			m.Compress = true
			return packed(t, m)
		}))
		if got, err := c.nsRecords(t.Context(), "example.test."); !errors.Is(err, ErrAnswer) {
			t.Errorf("%v, %v", got, err)
		}
	}
}

func TestTooManyPointers(t *testing.T) {
	c := testClient(t, serve(t, func(q *dns.Msg, _ string) []byte {
		if q.Question[0].Qtype == dns.TypeSOA {
			return packed(t, answerTo(t, q, q.Question[0].Name+" 60 SOA ns. admin. 7 1 1 1 1"))
		}
		var records []string
		for i := range maxPointers + 1 {
			records = append(records, fmt.Sprintf("%s 60 PTR vm%d.example.test.", q.Question[0].Name, i))
		}
		return packed(t, answerTo(t, q, records...))
	}))
	if _, err := c.Find(t.Context(), nil, []netip.Addr{netip.MustParseAddr("10.0.0.1")}); !errors.Is(err, ErrAnswer) {
		t.Errorf("error %v", err)
	}
}

func TestCancelledWhileWaiting(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := testClient(t, serve(t, func(*dns.Msg, string) []byte {
		cancel()
		return nil
	}))
	c.timeout = maxTimeout
	if _, err := c.lookup(ctx, "vm.example.test.", dns.TypeA); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if len(c.silent) > 0 {
		t.Errorf("servers %v count as silent", c.silent)
	}
}

// A server that is not authoritative does not hide one that does not answer.
func TestSilenceIsNotIgnorance(t *testing.T) {
	refuses := serve(t, func(q *dns.Msg, _ string) []byte { return packed(t, new(dns.Msg).SetRcode(q, dns.RcodeRefused)) })
	silent := serve(t, func(*dns.Msg, string) []byte { return nil })
	_, err := testClient(t, refuses, silent).zoneOf(t.Context(), "vm.example.test.")
	if !errors.Is(err, ErrSilent) || strings.Contains(err.Error(), ErrNotServed.Error()) || !strings.Contains(err.Error(), silent) {
		t.Errorf("error %v", err)
	}
	_, err = testClient(t, refuses).zoneOf(t.Context(), "vm.example.test.")
	if !errors.Is(err, ErrNotServed) || !strings.Contains(err.Error(), refuses) {
		t.Errorf("error %v", err)
	}
}

func answerForFuzz(t testing.TB) (q *dns.Msg, p []byte) {
	q = new(dns.Msg).SetQuestion("vm.example.test.", dns.TypeA)
	q.Id = 1
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	for _, s := range []string{vmA, "vm.example.test. 300 A 10.0.0.2"} {
		rr, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	p, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return q, p
}

func TestEveryPrefixOfAnAnswerFails(t *testing.T) {
	q, whole := answerForFuzz(t)
	for n := range whole {
		if answer, err := parseAnswer(whole[:n], q, signature{}); err == nil {
			t.Errorf("%d of %d bytes are taken as %v", n, len(whole), answer)
		}
	}
	answer, err := parseAnswer(whole, q, signature{})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := readRRset(answer, "vm.example.test.", dns.TypeA); err != nil || !s.equal(rrset{300, []string{"10.0.0.1", "10.0.0.2"}}) {
		t.Errorf("%v, %v", s, err)
	}
}

func FuzzParseAnswer(f *testing.F) {
	q, p := answerForFuzz(f)
	f.Add(p)
	m := new(dns.Msg).SetRcode(q, dns.RcodeNotAuth)
	m.SetTsig("wanmig.", dns.HmacSHA256, tsigFudge, 1)
	signed, _, err := dns.TsigGenerate(m, testSecret, "", false)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	soa, err := dns.NewRR("example.test. 60 SOA ns. admin. 7 1 1 1 1")
	if err != nil {
		f.Fatal(err)
	}
	m = new(dns.Msg).SetReply(q)
	m.Ns = []dns.RR{soa}
	if p, err = m.Pack(); err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	c := &Client{clock: time.Now}
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, sent := range []signature{{}, {secret: testSecret, mac: strings.Repeat("00", 32)}} {
			answer, err := parseAnswer(slices.Clone(p), q, sent)
			if err != nil {
				continue
			}
			if t := answer.IsTsig(); t != nil {
				_ = c.keyRefusal(t)
			}
			for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypePTR} {
				s, err := readRRset(answer, "vm.example.test.", qtype)
				if err != nil {
					continue
				}
				if len(s.data) > maxRecords || !slices.IsSorted(s.data) {
					t.Errorf("%v", s)
				}
				if _, err := updateMessage("example.test.", []step{{"vm.example.test.", qtype, s, rrset{}}}).Pack(); err != nil {
					t.Errorf("%v cannot be sent: %v", s, err)
				}
			}
			if zone, _, err := readSOA(answer, "vm.example.test."); err == nil && !strings.HasSuffix("vm.example.test.", zone) {
				t.Errorf("zone %q", zone)
			}
		}
	})
}
