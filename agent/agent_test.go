package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wanmig/wanmig/migrate"
)

// start runs an agent without a libvirtd until the test ends. The state that it
// finds is what prepare makes.
func start(t *testing.T, site string, prepare ...func(Config)) (*Client, Config) {
	t.Helper()
	dir := t.TempDir()
	c := Config{Site: site, Listen: "127.0.0.1:0", API: filepath.Join(dir, "api.sock"), State: filepath.Join(dir, "state"),
		Libvirt: filepath.Join(dir, "no-libvirtd"), Outbox: OutboxConfig{Memory: 1 << 20, Dir: filepath.Join(dir, "spool")}}
	for _, p := range prepare {
		p(c)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, c, slog.New(slog.NewTextHandler(io.Discard, nil))) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("agent %s ends with %v", site, err)
		}
	})
	client := NewClient(c.API)
	for {
		_, err := client.Info(t.Context())
		if err == nil {
			return client, c
		}
		select {
		case err := <-ended:
			ended <- nil
			t.Fatalf("agent %s: %v", site, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestTwoAgentsCheckEachOther(t *testing.T) {
	north, _ := start(t, "north")
	south, _ := start(t, "south")
	ni, err := north.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	si, err := south.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(ni.Problem, "libvirtd") {
		t.Errorf("an agent without libvirtd says %q", ni.Problem)
	}
	if err := north.PutSite(t.Context(), Site{Name: "south", Address: si.Listen, ID: si.ID}); err != nil {
		t.Fatal(err)
	}
	check, err := north.CheckSite(t.Context(), "south")
	if err != nil || check.Reachable || len(check.Findings) != 1 || !check.Findings[0].Fatal {
		t.Errorf("a peer that does not know us is found: %+v, %v", check, err)
	}
	if err := south.PutSite(t.Context(), Site{Name: "north", Address: ni.Listen, ID: ni.ID}); err != nil {
		t.Fatal(err)
	}
	check, err = north.CheckSite(t.Context(), "south")
	if err != nil || !check.Reachable || check.PeerSite != "south" || check.RTTMS <= 0 ||
		len(check.Carriers) != 2 || check.Carriers[0].Rate < 1<<20 || check.Carriers[1].Transport != "tcp" || check.Carriers[1].RTTMS <= 0 {
		t.Errorf("the peer is found as %+v, %v", check, err)
	}
	if problems := len(check.Findings); problems != 2 {
		t.Errorf("libvirtd is missing on both sides, and %d problems are found: %+v", problems, check.Findings)
	}
	if _, err := north.StartMove(t.Context(), migrate.Request{VM: "web", To: "south"}); err == nil || !strings.Contains(err.Error(), "libvirt") {
		t.Errorf("a move without libvirtd: %v", err)
	}
}

func TestSitesAreChecked(t *testing.T) {
	client, c := start(t, "north")
	self, err := client.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other, _ := start(t, "south")
	info, err := other.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for want, site := range map[string]Site{
		"not a site's name":            {Name: "a/b", Address: "192.0.2.1:7946", ID: info.ID},
		"not an address":               {Name: "south", Address: "192.0.2.1", ID: info.ID},
		"HOST:PORT":                    {Name: "south", Address: "192.0.2.1:99999", ID: info.ID},
		"ID":                           {Name: "south", Address: "192.0.2.1:7946", ID: strings.Replace(info.ID, info.ID[:1], "0", 1)},
		"there are auto, quic and tcp": {Name: "south", Address: "192.0.2.1:7946", ID: info.ID, Transport: "udp"},
		"own ID":                       {Name: "south", Address: "192.0.2.1:7946", ID: self.ID},
	} {
		if err := client.PutSite(t.Context(), site); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("site %+v: %v, want an error with %q", site, err, want)
		}
	}
	if err := client.PutSite(t.Context(), Site{Name: "south", Address: "[2001:db8::1]:7946", ID: strings.ToLower(info.ID)}); err != nil {
		t.Fatal(err)
	}
	if err := client.PutSite(t.Context(), Site{Name: "west", Address: "192.0.2.1:7946", ID: info.ID}); err == nil || !strings.Contains(err.Error(), "south") {
		t.Errorf("two sites with one ID: %v", err)
	}
	if _, err := client.StartMove(t.Context(), migrate.Request{VM: "web", To: "sooth"}); err == nil || !strings.Contains(err.Error(), "there are south") {
		t.Errorf("a move to an unknown site: %v", err)
	}
	if err := client.DeleteSite(t.Context(), "west"); err == nil {
		t.Error("an unknown site can be removed")
	}
	if kept, err := openSites(filepath.Join(c.State, "sites.json")); err != nil || len(kept.all()) != 1 || kept.all()[0].ID != info.ID {
		t.Errorf("the file holds %+v, %v", kept, err)
	}
	if err := client.DeleteSite(t.Context(), "south"); err != nil {
		t.Error(err)
	}
}

func TestHostileRequests(t *testing.T) {
	_, c := start(t, "north")
	plain := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.API)
	}}}
	defer plain.CloseIdleConnections()
	for _, r := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/v1/moves", "", 400},
		{"POST", "/v1/moves", "{", 400},
		{"POST", "/v1/moves", `{"vm":"web","to":"south","surprise":1}`, 400},
		{"POST", "/v1/moves", `{"vm":"` + strings.Repeat("x", maxBody) + `"}`, 400},
		{"POST", "/v1/moves", `{"vm":"web","to":""}`, 400},
		{"GET", "/v1/moves/mv-../../etc", "", 404},
		{"GET", "/v1/moves/mv-aaaaaaaa/watch", "", 404},
		{"POST", "/v1/moves/mv-aaaaaaaa/cancel", "", 404},
		{"POST", "/v1/moves/mv-aaaaaaaa/recover", `{"word":"run-here"}`, 404},
		{"POST", "/v1/moves/mv-aaaaaaaa/recover", `{"word":"run"}`, 409},
		{"POST", "/v1/moves/mv-aaaaaaaa/recover", ``, 400},
		{"POST", "/v1/moves/mv-aaaaaaaa/rollback", ``, 404},
		{"GET", "/v1/moves/mv-aaaaaaaa/copy", ``, 404},
		{"POST", "/v1/moves/mv-aaaaaaaa/copy/start", ``, 404},
		{"POST", "/v1/moves", `{"vm":"web","to":"south","rate":"fast"}`, 400},
		{"POST", "/v1/moves", `{"vm":"web","to":"south","priority":"urgent"}`, 400},
		{"POST", "/v1/moves", `{"vm":"web","to":"south","max_outage_ns":9000000000}`, 400},
		{"POST", "/v1/moves", `{"vm":"web","to":"south","max_outage_ns":-1}`, 400},
		{"PUT", "/v1/moves/mv-aaaaaaaa/limit", `{"rate":"400mbit"}`, 404},
		{"PUT", "/v1/moves/mv-aaaaaaaa/limit", `{"rate":"400"}`, 400},
		{"PUT", "/v1/moves/mv-aaaaaaaa/limit", ``, 400},
		{"PUT", "/v1/sites/a", `{"name":"b","address":"192.0.2.1:1","id":"x"}`, 400},
		{"GET", "/v1/sites/nowhere/check", "", 404},
		{"GET", "/v1/redirects/mv-aaaaaaaa", "", 404},
		{"POST", "/v1/redirects/mv-aaaaaaaa/drain", "", 404},
		{"POST", "/v1/redirects/mv-aaaaaaaa/cut", "{}", 404},
		{"POST", "/v1/redirects/mv-aaaaaaaa/cut", "", 400},
		{"POST", "/v1/redirects/mv-aaaaaaaa/cut", `{"force":"yes"}`, 400},
		{"POST", "/v1/redirects/mv-aaaaaaaa/cut", `{"force":true,"now":true}`, 400},
		{"GET", "/v2/moves", "", 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://agent"+r.path, strings.NewReader(r.body))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := plain.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		if answer.StatusCode != r.status || !strings.Contains(string(text), `"error"`) {
			t.Errorf("%s %s %.40s: status %d, %.200s", r.method, r.path, r.body, answer.StatusCode, text)
		}
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	_, c := start(t, "north")
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	if err := Run(t.Context(), c, log); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent with the same state: %v", err)
	}
	c.State = t.TempDir()
	if err := os.Chmod(c.State, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), c, log); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent with the same socket: %v", err)
	}
}

func TestConfigErrorsAreOneLine(t *testing.T) {
	dir := t.TempDir()
	for want, text := range map[string]string{
		"sites is unknown": "sites: []\n",
		"memry is unknown": "outbox: {memry: 1MiB}\n",
		"is not a size":    "outbox: {memory: lots}\n",
		"pages is unknown": "reduction: {pages: 1MiB}\n",
		"line 2":           "site: a\nreduction: {memory: -1MiB}\n",
		"at least 1MiB":    "outbox: {memory: 4KiB}\n",
		"not host:port":    "listen: 7946\n",
		"\"golden\" must":  "seeds: [/var/lib, golden]\n",
		"line 1: cannot":   "seeds: {dir: /golden}\n",
		"must begin with":  "state: var/lib\n",
		"is not a name":    "site: two words\n",
		"line":             "site: [\n",
	} {
		path := filepath.Join(dir, "agent.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadConfig(path)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want one line with %q", text, err, want)
		}
	}
	if _, err := LoadConfig(filepath.Join(dir, "missing.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file that was asked for: %v", err)
	}
}
