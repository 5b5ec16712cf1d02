package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/lab/guest/api"
)

func TestStops(t *testing.T) {
	const s = time.Second
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	for _, test := range []struct {
		name    string
		running []time.Duration // when the always-running clock shows 1 s, 2 s, ...
		count   int64
		longest time.Duration
	}{
		{"regular", []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7 * s}, 0, 0},
		{"late interrupts", []time.Duration{1 * s, 2*s + ms(80), 3 * s, 4 * s, 5*s + ms(30), 6 * s, 7 * s}, 0, 0},
		{"late at first", []time.Duration{1*s + ms(90), 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7 * s}, 0, 0},
		{"drift", []time.Duration{1 * s, 2*s - ms(1), 3*s - ms(2), 4*s - ms(3), 5*s - ms(4), 6*s - ms(5), 7*s - ms(6)}, 0, 0},
		{"a stop", []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7*s - ms(300), 8*s - ms(300)}, 1, ms(300)},
		{"a stop read late", []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 6*s - ms(280), 7*s - ms(300), 8*s - ms(300)}, 1, ms(300)},
		{"two stops", []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 6*s - ms(20), 7*s - ms(20), 8*s - ms(20), 9*s - ms(20), 10*s - ms(70)}, 2, ms(50)},
	} {
		t.Run(test.name, func(t *testing.T) {
			var m stops
			for i, running := range test.running {
				m.edge(time.Duration(i+1)*s, running)
			}
			if m.count != test.count || m.longest != test.longest {
				t.Errorf("%d stops, the longest %v; want %d, %v", m.count, m.longest, test.count, test.longest)
			}
		})
	}
}

func TestParseSettings(t *testing.T) {
	s, err := parseSettings("console=ttyS0 quiet wanlab.name=web%20server wanlab.address=10.10.0.11/24 wanlab.gateway=10.10.0.1" +
		" wanlab.address6=fd00:10::11/64 wanlab.gateway6=fd00:10::1" +
		" wanlab.second-address=10.11.0.11/24 wanlab.second-gateway=10.11.0.1 wanlab.second-address6=fd00:11::11/64 wanlab.second-gateway6=fd00:11::1" +
		" wanlab.seed=ff00 wanlab.disks=2 wanlab.dirty=20MiB wanlab.edit=3MiB wanlab.write=4096 wanlab.working-set=1GiB wanlab.root=vda\n")
	want := settings{"web server", nic{family{"10.10.0.11/24", "10.10.0.1"}, family{"fd00:10::11/64", "fd00:10::1"}},
		nic{family{"10.11.0.11/24", "10.11.0.1"}, family{"fd00:11::11/64", "fd00:11::1"}}, 0xff00, 2, "vda", api.Load{Dirty: 20 << 20, Edit: 3 << 20, Write: 4096, WorkingSet: 1 << 30}}
	if err != nil || s != want {
		t.Errorf("read %+v, %v; want %+v", s, err, want)
	}
	for _, line := range []string{"wanlab.seed=x", "wanlab.disks=", "wanlab.dirty=-1", "wanlab.name=%2", "wanlab.colour=red", "wanlab.root=", "wanlab.root=vd", "wanlab.root=../vda", "wanlab.root=vda1"} {
		if _, err := parseSettings(line); err == nil {
			t.Errorf("%q was accepted", line)
		}
	}
}

func FuzzParseSettings(f *testing.F) {
	f.Add("quiet wanlab.name=a%20b wanlab.seed=ff wanlab.disks=1 wanlab.dirty=20MiB")
	f.Add("wanlab. wanlab.= wanlab.dirty")
	f.Fuzz(func(t *testing.T, line string) { parseSettings(line) })
}

// testGuest serves on loopback, without disks, and returns the addresses of HTTP and echo.
func testGuest(t *testing.T) (g *guest, web, echoAddr string) {
	t.Helper()
	l := newLoad(testMemory(t, 64), nil)
	l.set(api.Load{WorkingSet: 16 * api.PageSize})
	g = &guest{name: "test", seed: 7, load: l, pauses: &pauses{}, echo: &echo{}, off: func() {}}
	var listeners [2]net.Listener
	for i := range listeners {
		var err error
		if listeners[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error, 2)
	go func() { ended <- g.serve(listeners[0]) }()
	go func() { ended <- g.echo.serveTCP(listeners[1]) }()
	t.Cleanup(func() {
		for _, l := range listeners {
			l.Close()
			<-ended
		}
	})
	return g, "http://" + listeners[0].Addr().String(), listeners[1].Addr().String()
}

func request(t *testing.T, method, url string) (*http.Response, []byte) {
	t.Helper()
	r, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, body
}

func TestRequests(t *testing.T) {
	g, web, _ := testGuest(t)
	_, body := request(t, "POST", web+"/load?dirty=1MiB&edit=3MiB&write=2MiB/s")
	var r api.Report
	if err := json.Unmarshal(body, &r); err != nil {
		t.Fatal(err)
	}
	if want := (api.Load{Dirty: 1 << 20, Edit: 3 << 20, Write: 2 << 20, WorkingSet: 16 * api.PageSize}); r.Load != want || r.Name != "test" {
		t.Errorf("report %+v, want the load %+v", r, want)
	}
	_, body = request(t, "POST", web+"/load?working-set=1TiB&dirty=1TiB&edit=1TiB")
	if err := json.Unmarshal(body, &r); err != nil {
		t.Fatal(err)
	}
	if want := (api.Load{Dirty: maxRate, Edit: maxRate, Write: 2 << 20, WorkingSet: 64 * api.PageSize}); r.Load != want {
		t.Errorf("load %+v, want it bounded to %+v", r.Load, want)
	}
	g.load.memory.page(63)[5]++
	_, body = request(t, "POST", web+"/verify")
	var v api.Verification
	if err := json.Unmarshal(body, &v); err != nil {
		t.Fatal(err)
	}
	if v.Pages != 64 || v.Bad() != 1 || v.Report.Errors() != 1 {
		t.Errorf("verification %s", body)
	}
	for _, bad := range []string{"POST /load?dirty=x", "POST /load?colour=1", "GET /file", "GET /file?mib=0", "GET /file?mib=1025", "GET /file?mib=x"} {
		method, path, _ := strings.Cut(bad, " ")
		if response, _ := request(t, method, web+path); response.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: status %d, want 400", bad, response.StatusCode)
		}
	}
	if response, _ := request(t, "GET", web+"/verify"); response.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET /verify: status %d, want 405", response.StatusCode)
	}
}

func TestFileIsWhatItsChecksumSays(t *testing.T) {
	_, web, _ := testGuest(t)
	response, body := request(t, "GET", web+"/file?mib=2")
	if len(body) != 2<<20 {
		t.Fatalf("%d bytes, want 2 MiB", len(body))
	}
	if got := fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli)); got != response.Trailer.Get(api.ChecksumTrailer) {
		t.Errorf("the body has the checksum %s, the trailer says %s", got, response.Trailer.Get(api.ChecksumTrailer))
	}
	if _, again := request(t, "GET", web+"/file?mib=1"); !bytes.Equal(again, body[:1<<20]) {
		t.Error("a shorter file is not the start of a longer one")
	}
}

func TestParseLoadKeepsWhatIsNotNamed(t *testing.T) {
	was := api.Load{Dirty: 1, Write: 2, WorkingSet: 3}
	got, err := parseLoad(was, url.Values{"write": {"0"}})
	if err != nil || got != (api.Load{Dirty: 1, WorkingSet: 3}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestEchoCountsBreaks(t *testing.T) {
	g, _, addr := testGuest(t)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var b [api.EchoSize]byte
	for i, test := range []struct {
		sequence uint64
		breaks   uint32
	}{{100, 0}, {101, 0}, {103, 1}, {104, 1}, {104, 2}} {
		if _, err := c.Write(api.EchoRecord{Sequence: test.sequence, Stamp: 9}.Append(b[:0])); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			t.Fatal(err)
		}
		got, err := api.ParseEcho(b[:])
		if want := (api.EchoRecord{Breaks: test.breaks, Sequence: test.sequence, Count: uint64(i + 1), Stamp: 9}); err != nil || got != want {
			t.Errorf("answer %+v, %v; want %+v", got, err, want)
		}
	}
	if got := g.echo.report(); got != (api.EchoReport{TCPConnections: 1, TCPRecords: 5, Breaks: 2}) {
		t.Errorf("report %+v", got)
	}
	if _, err := c.Write(bytes.Repeat([]byte("x"), api.EchoSize)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(b[:]); err == nil {
		t.Errorf("%d bytes answer what is no record", n)
	}
}

func TestUDPEcho(t *testing.T) {
	var e echo
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- e.serveUDP(server) }()
	defer func() { server.Close(); <-ended }()
	c, err := net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	for _, p := range [][]byte{[]byte("junk"), make([]byte, 2000), api.EchoRecord{Sequence: 5}.Append(nil)} {
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := api.ParseEcho(b[:n]); err != nil || r != (api.EchoRecord{Sequence: 5, Count: 1}) {
		t.Errorf("answer %+v, %v", r, err)
	}
}
