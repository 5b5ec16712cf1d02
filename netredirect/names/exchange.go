package names

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	udpSize   = 1232 // bytes, what passes without fragments (DNS flag day 2020)
	tsigFudge = 300  // seconds, RFC 8945 section 10
)

// exchange sends a message to a server and returns its answer, by UDP or else
// by TCP.
func (c *Client) exchange(ctx context.Context, server string, m *dns.Msg, signed bool) (*dns.Msg, error) {
	var failed []error
	for _, network := range []string{"udp", "tcp"} {
		if network == "udp" && m.Len() > udpSize {
			continue
		}
		answer, err := c.exchangeOver(ctx, network, server, m.Copy(), signed)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err == nil {
			c.heard(server, true)
			return answer, nil
		}
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op.Err // the addresses are told elsewhere
		}
		failed = append(failed, fmt.Errorf("%s: %w", strings.ToUpper(network), err))
	}
	err := joined(failed)
	if errors.Is(err, ErrAnswer) {
		return nil, err
	}
	c.heard(server, false)
	return nil, fmt.Errorf("%w (%w): is the server up, and open to this host by UDP and TCP?", ErrSilent, err)
}

func (c *Client) exchangeOver(ctx context.Context, network, server string, m *dns.Msg, signed bool) (*dns.Msg, error) {
	dialer := dns.Client{Net: network, Timeout: c.timeout, UDPSize: udpSize}
	conn, err := dialer.DialContext(ctx, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := conn.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return nil, err
	}

	var out []byte
	var sent signature
	if signed {
		sent.secret = c.key.secret
		m.SetTsig(c.key.Name, c.key.Algorithm, tsigFudge, c.clock().Unix())
		out, sent.mac, err = dns.TsigGenerate(m, c.key.secret, "", false)
	} else {
		out, err = m.Pack()
	}
	if err != nil {
		return nil, fmt.Errorf("pack message: %w", err)
	}
	if _, err := conn.Write(out); err != nil {
		return nil, err
	}
	for {
		p, err := conn.ReadMsgHeader(nil)
		if err != nil {
			return nil, err
		}
		// A datagram with another ID is late, or of someone who guesses.
		if network == "udp" && binary.BigEndian.Uint16(p) != m.Id {
			continue
		}
		return parseAnswer(p, m, sent)
	}
}

// signature is what the answer's is verified with; the zero value is that of an
// unsigned message.
type signature struct {
	secret string // base64
	mac    string // of the message sent, hex
}

// parseAnswer takes the answer to a message only as a whole: what the library
// would make of one that is cut short is an answer with fewer records.
func parseAnswer(p []byte, m *dns.Msg, sent signature) (*dns.Msg, error) {
	answer := new(dns.Msg)
	if err := answer.Unpack(p); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	for i, n := range []int{len(answer.Question), len(answer.Answer), len(answer.Ns), len(answer.Extra)} {
		if int(binary.BigEndian.Uint16(p[4+2*i:])) != n {
			return nil, fmt.Errorf("%w: it ends early", ErrAnswer)
		}
	}
	signed := sent.secret != ""
	if signed && answer.IsTsig() != nil {
		// ErrAuth stands for NOTAUTH, which is explained later. The server need not
		// have the key to sign that.
		if err := dns.TsigVerify(p, sent.secret, sent.mac, false); err != nil && !errors.Is(err, dns.ErrAuth) {
			return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
		}
	}
	if err := acceptable(m, answer, signed); err != nil {
		return nil, err
	}
	return answer, nil
}

// acceptable tells whether an answer is one to the message.
func acceptable(m, answer *dns.Msg, signed bool) error {
	switch {
	case !answer.Response || answer.Id != m.Id || answer.Opcode != m.Opcode:
		return fmt.Errorf("%w: it is not to what was asked", ErrAnswer)
	case answer.Truncated:
		return fmt.Errorf("%w: it is truncated", ErrAnswer)
	case signed && answer.IsTsig() == nil && !isRefusal(answer.Rcode):
		return fmt.Errorf("%w: it is not signed", ErrAnswer)
	}
	// Servers may leave the zone out of the answer to an update, and the question
	// out of a refusal.
	if len(answer.Question) == 0 && (m.Opcode == dns.OpcodeUpdate || isRefusal(answer.Rcode)) {
		return nil
	}
	if len(answer.Question) != 1 {
		return fmt.Errorf("%w: it has %d questions", ErrAnswer, len(answer.Question))
	}
	asked, got := m.Question[0], answer.Question[0]
	if asked.Qtype != got.Qtype || asked.Qclass != got.Qclass || dns.CanonicalName(asked.Name) != dns.CanonicalName(got.Name) {
		return fmt.Errorf("%w: it is to another question", ErrAnswer)
	}
	return nil
}

// isRefusal tells the codes that say nothing about the records.
func isRefusal(rcode int) bool {
	switch rcode {
	case dns.RcodeSuccess, dns.RcodeNameError, dns.RcodeYXDomain, dns.RcodeYXRrset, dns.RcodeNXRrset:
		return false
	}
	return true
}

// refusal explains the code of an answer that is no success, and what to do.
func (c *Client) refusal(answer *dns.Msg, zone string) error {
	if t := answer.IsTsig(); answer.Rcode == dns.RcodeNotAuth && t != nil && t.Error != 0 {
		return c.keyRefusal(t)
	}
	update := answer.Opcode == dns.OpcodeUpdate
	switch answer.Rcode {
	case dns.RcodeRefused:
		if update {
			return fmt.Errorf("%w (REFUSED): allow key %v to update %s there (allow-update, update-policy), unless it is a secondary", ErrRefused, c.key, zone)
		}
		return fmt.Errorf("%w (REFUSED): allow this host's queries there, if the server has %s", ErrRefused, zone)
	case dns.RcodeNotAuth, dns.RcodeNotZone:
		return fmt.Errorf("%w (%s): the server is not authoritative for %s: list those that are", ErrRefused, rcodeName(answer.Rcode), zone)
	case dns.RcodeNotImplemented:
		return fmt.Errorf("%w (NOTIMP): the server takes no updates: list the primary of %s", ErrRefused, zone)
	case dns.RcodeServerFailure:
		return fmt.Errorf("%w (SERVFAIL): the server has %s not loaded, expired or not writable: see its log", ErrFailed, zone)
	}
	return fmt.Errorf("%w (%s): see the server's log about %s", ErrRefused, rcodeName(answer.Rcode), zone)
}

// keyRefusal explains the error in a TSIG record, RFC 8945 section 3.
func (c *Client) keyRefusal(t *dns.TSIG) error {
	switch t.Error {
	case dns.RcodeBadKey:
		return fmt.Errorf("%w (BADKEY): key %v of %s is not in the server's configuration: add it there with this name and algorithm, unless it is a secondary", ErrKey, c.key, c.keyFile)
	case dns.RcodeBadSig:
		return fmt.Errorf("%w (BADSIG): key %v of %s has another secret at the server: copy the server's", ErrKey, c.key, c.keyFile)
	case dns.RcodeBadTime:
		there := ""
		if b, err := hex.DecodeString(t.OtherData); err == nil && len(b) == 6 {
			var seconds int64
			for _, x := range b {
				seconds = seconds<<8 | int64(x)
			}
			there = " and " + time.Unix(seconds, 0).UTC().Format(time.DateTime) + " there"
		}
		return fmt.Errorf("%w (BADTIME): it is %s UTC here%s: set both by NTP", ErrClock, c.clock().UTC().Format(time.DateTime), there)
	}
	return fmt.Errorf("%w (%s): see the server's log about key %v", ErrKey, rcodeName(int(t.Error)), c.key)
}

func rcodeName(rcode int) string {
	if name, ok := dns.RcodeToString[rcode]; ok {
		return name
	}
	return fmt.Sprintf("code %d", rcode)
}

// query asks one server, which must be authoritative for the name. An answer
// that the name does not exist is one.
func (c *Client) query(ctx context.Context, server, name string, qtype uint16, signed bool) (*dns.Msg, error) {
	m := new(dns.Msg).SetQuestion(name, qtype)
	m.RecursionDesired = false
	m.SetEdns0(udpSize, false)
	answer, err := c.exchange(ctx, server, m, signed)
	switch {
	case err != nil:
		return nil, err
	case answer.Rcode != dns.RcodeSuccess && answer.Rcode != dns.RcodeNameError:
		return nil, c.refusal(answer, name)
	case !answer.Authoritative:
		return nil, fmt.Errorf("%w: the server is not authoritative for %s", ErrNotServed, name)
	}
	return answer, nil
}

// ask asks the configured servers in turn until one is authoritative.
func (c *Client) ask(ctx context.Context, name string, qtype uint16) (*dns.Msg, error) {
	var failed []error
	for _, server := range c.inOrder() {
		answer, err := c.query(ctx, server, name, qtype, false)
		if err == nil {
			return answer, nil
		}
		err = fmt.Errorf("ask %s for %s %s: %w", server, name, dns.TypeToString[qtype], err)
		if ctx.Err() != nil {
			return nil, err
		}
		// Servers of other zones refuse, or refer to others.
		if !errors.Is(err, ErrNotServed) && !errors.Is(err, ErrRefused) {
			failed = append(failed, err)
		}
	}
	if len(failed) == 0 {
		return nil, fmt.Errorf("%s: %w (%s): list the authoritative ones, and let them answer this host", name, ErrNotServed, strings.Join(c.servers, ", "))
	}
	return nil, joined(failed)
}
