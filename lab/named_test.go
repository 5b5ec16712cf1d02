package lab

import (
	"reflect"
	"testing"
	"time"
)

const dug = `;; Got answer:
;; ->>HEADER<<- opcode: QUERY, status: NOERROR, id: 34172
;; flags: qr aa rd; QUERY: 1, ANSWER: 2, AUTHORITY: 0, ADDITIONAL: 1

web.wanlab.test.	60	IN	A	10.10.0.10
web.wanlab.test.	2	IN	TXT	"two words"
`

func TestParseDig(t *testing.T) {
	want := []Record{
		{"web.wanlab.test.", time.Minute, "A", "10.10.0.10"},
		{"web.wanlab.test.", 2 * time.Second, "TXT", `"two words"`},
	}
	if got, err := parseDig(dug); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if got, err := parseDig(";; ->>HEADER<<- opcode: QUERY, status: NXDOMAIN, id: 1\n"); err != nil || len(got) > 0 {
		t.Errorf("an unknown name: %+v, %v", got, err)
	}
	for _, text := range []string{
		"",
		";; connection timed out; no servers could be reached\n",
		";; ->>HEADER<<- opcode: QUERY, status: REFUSED, id: 1\n",
		";; ->>HEADER<<- opcode: QUERY, status: NOERROR, id: 1\nweb.wanlab.test. 60 IN A\n",
		";; ->>HEADER<<- opcode: QUERY, status: NOERROR, id: 1\nweb.wanlab.test. -1 IN A 10.10.0.10\n",
	} {
		if got, err := parseDig(text); err == nil {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
}

func FuzzParseDig(f *testing.F) {
	f.Add(dug)
	f.Add(";; status: \n1 2 3 4 5")
	f.Fuzz(func(t *testing.T, out string) {
		records, err := parseDig(out)
		for _, r := range records {
			if err != nil || r.Name == "" || r.Type == "" || r.Data == "" || r.TTL < 0 {
				t.Errorf("%q was read as %+v, %v", out, r, err)
			}
		}
	})
}

func TestNamesOfHostsOnlyAreRegistered(t *testing.T) {
	l := newLab("/lab")
	v := &VM{Name: "web-1", lab: l}
	if got := v.dnsName(); got != "" {
		t.Errorf("%q in a lab without services", got)
	}
	l.Services = true
	if got, want := v.dnsName(), "web-1.wanlab.test."; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for _, name := range []string{"web server", "a.b", "a_b", "a-", "Käse", "a+b", "a@b"} {
		v.Name = name
		if got := v.dnsName(); got != "" {
			t.Errorf("VM %q is registered as %q", name, got)
		}
	}
}
