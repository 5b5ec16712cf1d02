package netredirect

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func goodOptions() Options {
	return Options{Kind: Auto, Mode: Keep, Egress: EgressTunnel, Max: time.Hour, Quiet: time.Minute, Names: []string{"a.example."}}
}

func goodAsk() Ask {
	return Ask{Options: goodOptions(), Kinds: Kinds, Outer: addr("203.0.113.1"), NICs: []NIC{
		{MAC: "52:54:00:00:00:01", Bridge: "br0", Tap: "v0", Addresses: addrs("192.0.2.10", "2001:db8:1::10"), Gateways: addrs("192.0.2.1"), Served: "02:00:00:00:00:77"},
		{MAC: "52:54:00:00:00:02", Bridge: "br1"}}}
}

func goodOpen() openRequest {
	a := goodAsk()
	return openRequest{Kind: IPIP, Outer: a.Outer, MTU: 1480, Options: a.Options, NICs: a.NICs}
}

func goodOffer() Offer {
	return Offer{Kinds: Kinds, Outer: addr("203.0.113.2"), NAT: true, Mode: New, Steps: []string{"ip rule"}, Findings: []Finding{{Check: "redirect"}},
		Mapped: map[netip.Addr]netip.Addr{addr("192.0.2.10"): addr("203.0.113.99"), addr("2001:db8:1::10"): addr("2001:db8:9::99")}}
}

// crossed encodes a message and decodes it as the other side does, whole and
// each of its beginnings.
func crossed[T any](t *testing.T, message T) {
	t.Helper()
	b, err := json.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decode[T](b)
	if err != nil || !reflect.DeepEqual(got, message) {
		t.Errorf("%T has become %+v, %v", message, got, err)
	}
	for n := range b {
		if _, err := decode[T](b[:n]); err == nil {
			t.Errorf("%T: the first %d of %d bytes are a message", message, n, len(b))
		}
	}
}

func TestMessagesCross(t *testing.T) {
	crossed(t, goodAsk())
	crossed(t, goodOffer())
	crossed(t, goodOpen())
	crossed(t, openReply{addr("2001:db8::1")})
	crossed(t, resizeRequest{1280})
	crossed(t, armRequest{})
	crossed(t, armReply{New, goodOffer().Mapped})
	crossed(t, endRequest{"no more"})
	crossed(t, syncRequest{Idle: time.Second, RouteSeen: true, Draining: true, Waits: []string{"a"}})
	crossed(t, syncReply{Remove: true, Serving: true, Waits: []string{"b"}, Flows: []Flow{{Proto: "tcp",
		From: netip.MustParseAddrPort("192.0.2.1:1"), To: netip.MustParseAddrPort("[2001:db8::1]:2"), Bytes: 3}}})
}

func many(n int) (all []netip.Addr) {
	a := addr("10.0.0.1")
	for range n {
		all, a = append(all, a), a.Next()
	}
	return all
}

func TestMessagesRefused(t *testing.T) {
	if goodAsk().validate() != nil || goodOpen().validate() != nil || validated(goodOffer()) != nil {
		t.Fatal("good messages are refused")
	}
	for _, none := range []error{Ask{Options: Options{Kind: None}}.validate(), validated(Offer{})} {
		if none != nil {
			t.Errorf("a message of one that redirects nothing: %v", none)
		}
	}
	nics := map[string]func(*NIC){
		"no MAC":           func(n *NIC) { n.MAC = "" },
		"multicast MAC":    func(n *NIC) { n.MAC = "01:00:5e:00:00:01" },
		"broadcast MAC":    func(n *NIC) { n.MAC = "ff:ff:ff:ff:ff:ff" },
		"MAC of zeros":     func(n *NIC) { n.MAC = "00:00:00:00:00:00" },
		"long MAC":         func(n *NIC) { n.MAC = "52:54:00:00:00:00:00:01" },
		"MAC with dots":    func(n *NIC) { n.MAC = "5254.0000.0001" },
		"MAC with hyphens": func(n *NIC) { n.MAC = "52-54-00-00-00-01" },
		"MAC and more":     func(n *NIC) { n.MAC = "52:54:00:00:00:01 drop" },
		"huge MAC":         func(n *NIC) { n.MAC = strings.Repeat("52:", 1<<20) },
		"served":           func(n *NIC) { n.Served = "5254.0000.0001" },
		"served group":     func(n *NIC) { n.Served = "33:33:00:00:00:01" },
		"many addresses":   func(n *NIC) { n.Addresses = many(maxAddresses + 1) },
		"many gateways":    func(n *NIC) { n.Gateways = many(maxAddresses + 1) },
		"gateway":          func(n *NIC) { n.Gateways = addrs("224.0.0.1") },
	}
	for _, a := range []string{"0.0.0.0", "::", "127.0.0.1", "127.255.255.254", "::1", "224.0.0.1", "239.1.2.3", "ff02::1", "ff0e::1",
		"169.254.169.254", "fe80::1", "fe80::1%eth0", "2001:db8::1%$(reboot)", "::ffff:192.0.2.1", "::ffff:127.0.0.1", "255.255.255.255"} {
		nics["address "+a] = func(n *NIC) { n.Addresses = addrs(a) }
	}
	nics["no address"] = func(n *NIC) { n.Addresses = []netip.Addr{{}} }
	for name, spoil := range nics {
		a, o := goodAsk(), goodOpen()
		spoil(&a.NICs[0])
		spoil(&o.NICs[0])
		if a.validate() == nil || o.validate() == nil {
			t.Errorf("%s: accepted", name)
		} else if len(a.validate().Error()) > 500 {
			t.Errorf("%s: an error of %d bytes", name, len(a.validate().Error()))
		}
	}
	for name, list := range map[string][]NIC{
		"many":       make([]NIC, maxNICs+1),
		"many empty": append(goodAsk().NICs, make([]NIC, 1)...),
		"together":   {{MAC: "52:54:00:00:00:01", Addresses: many(40)}, {MAC: "52:54:00:00:00:02", Addresses: many(40)}},
	} {
		a, o := goodAsk(), goodOpen()
		a.NICs, o.NICs = list, list
		if a.validate() == nil || o.validate() == nil {
			t.Errorf("NICs, %s: accepted", name)
		}
	}
	for name, spoil := range map[string]func(*Options){
		"no kind":       func(o *Options) { o.Kind = "" },
		"kind":          func(o *Options) { o.Kind = "gre" },
		"mode":          func(o *Options) { o.Mode = "both" },
		"egress":        func(o *Options) { o.Egress = "nat" },
		"negative time": func(o *Options) { o.Max = -1 },
		"long time":     func(o *Options) { o.Max = 366 * 24 * time.Hour },
		"longest time":  func(o *Options) { o.Max = 1<<63 - 1 },
		"quiet":         func(o *Options) { o.Quiet = -time.Second },
		"long quiet":    func(o *Options) { o.Quiet = 25 * time.Hour },
		"names":         func(o *Options) { o.Names = make([]string, maxNames+1) },
		"a long name":   func(o *Options) { o.Names = []string{strings.Repeat("n", maxName+1)} },
	} {
		a, o := goodAsk(), goodOpen()
		spoil(&a.Options)
		spoil(&o.Options)
		if a.validate() == nil || o.validate() == nil {
			t.Errorf("options, %s: accepted", name)
		}
	}
	for name, spoil := range map[string]func(*openRequest){
		"auto": func(r *openRequest) { r.Kind = Auto }, "none": func(r *openRequest) { r.Kind = None }, "no kind": func(r *openRequest) { r.Kind = "" },
		"no MTU": func(r *openRequest) { r.MTU = 0 }, "small MTU": func(r *openRequest) { r.MTU = minMTU - 1 },
		"big MTU": func(r *openRequest) { r.MTU = maxMTU + 1 }, "negative MTU": func(r *openRequest) { r.MTU = -1 << 62 },
	} {
		r := goodOpen()
		spoil(&r)
		if r.validate() == nil {
			t.Errorf("open, %s: accepted", name)
		}
	}
	for name, spoil := range map[string]func(*Offer){
		"kinds":    func(o *Offer) { o.Kinds = make([]Kind, len(Kinds)+1) },
		"steps":    func(o *Offer) { o.Steps = make([]string, 1001) },
		"findings": func(o *Offer) { o.Findings = make([]Finding, 101) },
		"mode":     func(o *Offer) { o.Mode = "both" },
		"many mapped": func(o *Offer) {
			for _, a := range many(maxAddresses + 1) {
				o.Mapped[a] = a
			}
		},
		"mapped to a zone":     func(o *Offer) { o.Mapped[addr("2001:db8:1::11")] = addr("2001:db8::1%\nWANMIG_VM=x") },
		"mapped to nothing":    func(o *Offer) { o.Mapped[addr("192.0.2.11")] = netip.Addr{} },
		"nothing mapped":       func(o *Offer) { o.Mapped[netip.Addr{}] = addr("192.0.2.11") },
		"mapped to itself":     func(o *Offer) { o.Mapped[addr("192.0.2.11")] = addr("127.0.0.1") },
		"mapped to the other":  func(o *Offer) { o.Mapped[addr("192.0.2.11")] = addr("2001:db8::1") },
		"IPv4 mapped":          func(o *Offer) { o.Mapped[addr("2001:db8:1::11")] = addr("::ffff:192.0.2.1") },
		"mapped to everything": func(o *Offer) { o.Mapped[addr("192.0.2.11")] = addr("0.0.0.0") },
	} {
		o := goodOffer()
		spoil(&o)
		if o.Validate() == nil {
			t.Errorf("offer, %s: accepted", name)
		}
		if name[0] == 'm' && name != "mode" && (armReply{New, o.Mapped}).validate() == nil {
			t.Errorf("answer to arm, %s: accepted", name)
		}
	}
	if (armReply{}).validate() == nil || (armReply{Keep, nil}).validate() != nil {
		t.Error("an answer to arm without mode is accepted, or one without new addresses is refused")
	}
}

func validated(o Offer) error { return o.Validate() }

func TestTextsAreClipped(t *testing.T) {
	o := goodOffer()
	long := strings.Repeat("ä", 1<<20)
	o.Steps = []string{"ip rule", strings.Repeat("x", maxStep), long + "x", "x" + long}
	o.Findings = []Finding{{Check: long, Problem: "x" + long, Remedy: "short"}}
	if err := o.Validate(); err != nil {
		t.Fatal(err)
	}
	var sizes []int
	for _, s := range append(slices.Clone(o.Steps), o.Findings[0].Check, o.Findings[0].Problem, o.Findings[0].Remedy) {
		if !utf8.ValidString(s) {
			t.Errorf("cut within a character: …%x", s[len(s)-4:])
		}
		sizes = append(sizes, len(s))
	}
	if want := []int{7, maxStep, maxStep, maxStep - 1, maxText, maxText - 1, 5}; !slices.Equal(sizes, want) {
		t.Errorf("texts of %d bytes, not %d", sizes, want)
	}
	o.Steps = slices.Repeat([]string{long}, 1000)
	if err := o.Validate(); err != nil || len(o.Steps) != maxSteps/maxStep {
		t.Errorf("%d steps are left: %v", len(o.Steps), err)
	}
}

func TestSyncReply(t *testing.T) {
	flow := Flow{Proto: "tcp", From: netip.MustParseAddrPort("192.0.2.1:1"), To: netip.MustParseAddrPort("[2001:db8::1]:2")}
	good := syncReply{Waits: slices.Repeat([]string{strings.Repeat("x", 2*maxText)}, 30), Flows: slices.Repeat([]Flow{flow}, maxFlows)}
	if err := good.validate(); err != nil || len(good.Waits) != 20 || len(good.Waits[0]) != maxText || len(good.Flows) != maxFlows {
		t.Errorf("%d waits, %d flows: %v", len(good.Waits), len(good.Flows), err)
	}
	if err := (&syncReply{}).validate(); err != nil {
		t.Error(err)
	}
	proto, from, to := flow, flow, flow
	proto.Proto = strings.Repeat("x", maxProto+1)
	from.From = netip.AddrPortFrom(addr("fe80::1%"+strings.Repeat("x", 1<<20)), 1)
	to.To = from.From
	for name, flows := range map[string][]Flow{"many": slices.Repeat([]Flow{flow}, maxFlows+1), "protocol": {flow, proto}, "from": {from}, "to": {to}} {
		err := (&syncReply{Flows: flows}).validate()
		if err == nil || len(err.Error()) > 500 {
			t.Errorf("%s: %.600v", name, err)
		}
	}
}

func TestBounded(t *testing.T) {
	if got := bounded(nil); len(got) != 0 {
		t.Errorf("nothing has become %q", got)
	}
	texts := make([]string, 1000)
	for i := range texts {
		texts[i] = strings.Repeat("ä", 10*maxText)
	}
	got := bounded(texts)
	if len(got) != 20 || len(got[0]) > 4*maxText || len(texts[0]) != 20*maxText {
		t.Errorf("%d texts of %d bytes; what was given has %d", len(got), len(got[0]), len(texts[0]))
	}
}

// safe fails for an address that must not be in a rule.
func safe(t *testing.T, all ...netip.Addr) {
	t.Helper()
	for _, a := range all {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast() {
			t.Errorf("accepted the address %v", a)
		}
	}
}

func FuzzMessages(f *testing.F) {
	for _, message := range []any{goodAsk(), goodOffer(), goodOpen(), resizeRequest{1280}, syncRequest{Idle: 1, Waits: []string{"a"}}, endRequest{"r"},
		armReply{New, goodOffer().Mapped}, syncReply{Waits: []string{"a"}}} {
		b, err := json.Marshal(message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, text := range []string{`{`, `null`, `[]`, `{"nics":null,"mapped":null}`, `{"mtu":-9223372036854775808}`, `{"idle_ns":-1}`,
		`{"kind":"ipip","mtu":1400,"options":{"kind":"auto"},"nics":[{"mac":"52:54:00:00:00:01","addresses":["::ffff:127.0.0.1","fe80::1%x",""]}]}`,
		`{"mapped":{"192.0.2.1":"fe80::1%\n"}}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(nics []NIC) {
			if len(nics) > maxNICs || len(addresses(nics)) > maxAddresses {
				t.Errorf("accepted %d NICs with %d addresses", len(nics), len(addresses(nics)))
			}
			var all []hostNIC
			for _, n := range nics {
				safe(t, n.Addresses...)
				safe(t, n.Gateways...)
				n.Bridge, n.Tap = "br0", "v0" // the host's, not the peer's
				all = append(all, hostNIC{NIC: n, bridgeMAC: "02:00:00:00:00:01", home: n.Served != ""})
			}
			// What is accepted can be done.
			plans := []Plan{planSource(0, topPriority, "wmqtest", all), planDestination(destinationNeeds{priority: topPriority, device: "wmqtest", nics: all})}
			for _, p := range plans {
				for _, s := range remembered(p).steps() {
					if err := s.Validate(); err != nil {
						t.Errorf("accepted, and not possible: %v", err)
					}
				}
			}
		}
		if a, err := decode[Ask](b); err == nil && a.validate() == nil {
			check(a.NICs)
		}
		if r, err := decode[openRequest](b); err == nil && r.validate() == nil {
			check(r.NICs)
		}
		mapped := map[netip.Addr]netip.Addr{}
		if o, err := decode[Offer](b); err == nil && o.Validate() == nil {
			mapped = o.Mapped
			if n := len(strings.Join(o.Steps, "")); n > maxSteps {
				t.Errorf("steps of %d bytes are kept", n)
			}
		}
		for a, to := range mapped {
			safe(t, a, to)
		}
		if r, err := decode[syncRequest](b); err == nil {
			for _, w := range bounded(r.Waits) {
				if len(w) > 4*maxText {
					t.Errorf("a text of %d bytes is kept", len(w))
				}
			}
		}
		if r, err := decode[syncReply](b); err == nil && r.validate() == nil && len(r.Flows) > maxFlows {
			t.Errorf("%d flows are kept", len(r.Flows))
		}
		_, _ = decode[resizeRequest](b)
		_, _ = decode[endRequest](b)
	})
}
