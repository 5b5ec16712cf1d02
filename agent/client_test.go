package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/migrate"
)

// serveUnix serves h on a unix socket and returns a client of it.
func serveUnix(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	socket := filepath.Join(socketDir(t), "agent.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return NewClient(socket)
}

// socketDir returns a folder whose path leaves room for a socket's name.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "wanmig")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestClientRequests(t *testing.T) {
	var got string
	answer := ""
	c := serveUnix(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = fmt.Sprintf("%s %s %s", r.Method, r.URL.EscapedPath(), body)
		io.WriteString(w, answer)
	})
	ctx := context.Background()
	for _, tc := range []struct {
		answer, want string
		call         func() error
	}{
		{`{}`, "GET /v1/agent ", func() error { _, err := c.Info(ctx); return err }},
		{`[]`, "GET /v1/sites ", func() error { _, err := c.Sites(ctx); return err }},
		{``, `PUT /v1/sites/a%2Fb%20c {"name":"a/b c","address":"h:1","id":"I"}`, func() error { return c.PutSite(ctx, Site{Name: "a/b c", Address: "h:1", ID: "I"}) }},
		{``, "DELETE /v1/sites/%3Fx ", func() error { return c.DeleteSite(ctx, "?x") }},
		{`{}`, "GET /v1/sites/s/check ", func() error { _, err := c.CheckSite(ctx, "s"); return err }},
		{`{}`, `POST /v1/moves {"vm":"web","to":"s"}`, func() error { _, err := c.StartMove(ctx, migrate.Request{VM: "web", To: "s"}); return err }},
		{`[]`, "GET /v1/moves ", func() error { _, err := c.Moves(ctx); return err }},
		{`{}`, "GET /v1/moves/m1 ", func() error { _, err := c.Move(ctx, "m1"); return err }},
		{"{}\n", "GET /v1/moves/m1/watch ", func() error { return c.WatchMove(ctx, "m1", func(migrate.Status) error { return nil }) }},
		{`[]`, "GET /v1/seeds ", func() error { _, err := c.Seeds(ctx); return err }},
		{``, "POST /v1/seeds/scan ", func() error { return c.ScanSeeds(ctx) }},
		{`[]`, "GET /v1/redirects ", func() error { _, err := c.Redirects(ctx); return err }},
		{`{}`, "GET /v1/redirects/my%20vm ", func() error { _, err := c.Redirect(ctx, "my vm"); return err }},
		{``, "POST /v1/redirects/m1/drain ", func() error { return c.DrainRedirect(ctx, "m1") }},
		{``, `POST /v1/redirects/m1/cut {"force":false}`, func() error { return c.CutRedirect(ctx, "m1", false) }},
		{``, `POST /v1/redirects/m1/cut {"force":true}`, func() error { return c.CutRedirect(ctx, "m1", true) }},
		{``, `PUT /v1/moves/my%20vm/limit {"rate":"50mbit"}`, func() error { return c.LimitMove(ctx, "my vm", migrate.Limit{Most: 50e6}) }},
		{``, `POST /v1/moves/m1/recover {"word":"run-here"}`, func() error { return c.RecoverMove(ctx, "m1", "run-here") }},
		{`{"move":"m2"}`, "POST /v1/moves/m1/rollback ", func() error { _, err := c.RollbackMove(ctx, "m1"); return err }},
		{`{}`, "GET /v1/moves/m1/copy ", func() error { _, err := c.LeftCopy(ctx, "m1"); return err }},
		{``, "POST /v1/moves/m1/copy/start ", func() error { return c.StartCopy(ctx, "m1") }},
		{``, "POST /v1/moves/m1/cancel ", func() error { return c.CancelMove(ctx, "m1") }},
	} {
		answer = tc.answer
		if err := tc.call(); err != nil {
			t.Errorf("%s: %v", tc.want, err)
		}
		if got != tc.want {
			t.Errorf("asked %q, want %q", got, tc.want)
		}
	}
	got = ""
	for _, name := range []string{"", ".", ".."} {
		var refused *APIError
		if err := c.DeleteSite(ctx, name); !errors.As(err, &refused) || got != "" {
			t.Errorf("DeleteSite(%q) = %v after asking %q", name, err, got)
		}
	}
}

func TestClientErrors(t *testing.T) {
	var serve http.HandlerFunc
	c := serveUnix(t, func(w http.ResponseWriter, r *http.Request) { serve(w, r) })
	ctx := context.Background()

	serve = func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusConflict)
		io.WriteString(w, `{"error":"too late"}`)
	}
	var refused *APIError
	if err := c.CancelMove(ctx, "m1"); !errors.As(err, &refused) || *refused != (APIError{409, "too late"}) {
		t.Errorf("409: %v", err)
	}

	for name, h := range map[string]http.HandlerFunc{
		"an error without its message": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); io.WriteString(w, `{}`) },
		"an endless error": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			io.Copy(w, zeros{})
		},
		"an endless document":   func(w http.ResponseWriter, _ *http.Request) { io.Copy(w, zeros{}) },
		"a redirect":            func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", 302) },
		"another type":          func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `[1]`) },
		"two documents":         func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{} {}`) },
		"half a document":       func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"id":`) },
		"a document of the web": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `<html>`) },
	} {
		serve = h
		if info, err := c.Info(ctx); !errors.Is(err, ErrBadAnswer) || info != (Info{}) {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}

	serve = func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	if _, err := c.Info(ctx); err == nil || errors.Is(err, ErrBadAnswer) || strings.Contains(err.Error(), "http://") {
		t.Errorf("a connection that breaks: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestClientWithoutAgent(t *testing.T) {
	dir := socketDir(t)
	socket := filepath.Join(dir, "agent.sock")
	want := fmt.Sprintf("no agent at %s: is `wanmig agent` running? (systemctl status wanmig-agent)", socket)
	_, err := NewClient(socket).Info(context.Background())
	if !errors.Is(err, ErrNoAgent) || err.Error() != want {
		t.Errorf("no socket: %v", err)
	}

	// A socket that an agent left behind.
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	listener.Close()
	_, err = NewClient(socket).Info(context.Background())
	if !errors.Is(err, ErrNoAgent) || err.Error() != want {
		t.Errorf("a stale socket: %v", err)
	}
}

func TestClientWithoutPermission(t *testing.T) {
	dir := socketDir(t)
	socket := filepath.Join(dir, "agent.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, err := range []error{os.Chmod(dir, 0o755), os.Chmod(socket, 0)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	failed := make(chan error)
	go func() {
		// Root may connect to anything, so this thread takes another user's
		// rights; it is never unlocked and ends with the goroutine.
		runtime.LockOSThread()
		if os.Geteuid() == 0 {
			unix.Setfsuid(65534)
		}
		_, err := NewClient(socket).dial(context.Background(), "", "")
		failed <- err
	}()
	if err := <-failed; !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), socket+": permission denied: run this as root") {
		t.Errorf("dial: %v", err)
	}
}

// threeStatuses is what an agent streams to a watcher.
func threeStatuses(tb testing.TB) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, p := range []migrate.Phase{migrate.PhaseCheck, migrate.PhaseSync, migrate.PhaseDone} {
		if err := enc.Encode(migrate.Status{Move: "m1", VM: "web", Phase: p}); err != nil {
			tb.Fatal(err)
		}
	}
	return b.Bytes()
}

func phases(r io.Reader) (seen []migrate.Phase, err error) {
	err = readStatuses(r, func(m migrate.Status) error {
		seen = append(seen, m.Phase)
		return nil
	})
	return seen, err
}

func TestReadStatuses(t *testing.T) {
	stream := threeStatuses(t)
	seen, err := phases(bytes.NewReader(stream))
	if err != nil || fmt.Sprint(seen) != "[check sync done]" {
		t.Errorf("saw %v, %v", seen, err)
	}

	// Every prefix either ends between lines or says that it was cut.
	for n := range stream {
		seen, err := phases(bytes.NewReader(stream[:n]))
		lines := bytes.Count(stream[:n], []byte("\n"))
		whole := n == 0 || stream[n-1] == '\n'
		if len(seen) != lines || (err == nil) != whole || (!whole && !errors.Is(err, io.ErrUnexpectedEOF)) {
			t.Errorf("the first %d bytes: %v, %v", n, seen, err)
		}
	}

	if _, err := phases(zeros{}); !errors.Is(err, ErrBadAnswer) {
		t.Errorf("an endless line: %v", err)
	}
	if _, err := phases(strings.NewReader("{}\nnonsense\n")); !errors.Is(err, ErrBadAnswer) {
		t.Errorf("a line of nonsense: %v", err)
	}
	stop := errors.New("stop")
	if err := readStatuses(bytes.NewReader(stream), func(migrate.Status) error { return stop }); err != stop {
		t.Errorf("a watcher that stops: %v", err)
	}
}

// TestWatchBroken tells an agent that dies from one that ends its answer.
func TestWatchBroken(t *testing.T) {
	c := serveUnix(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write(threeStatuses(t))
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	n := 0
	err := c.WatchMove(context.Background(), "m1", func(migrate.Status) error { n++; return nil })
	if n != 3 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("saw %d statuses, %v", n, err)
	}
}

func FuzzReadStatuses(f *testing.F) {
	f.Add(threeStatuses(f))
	f.Add([]byte("{}\n\n  \n{\"phase\":\"done\"}\n"))
	f.Add([]byte("{\"phase\":1}\n"))
	f.Add([]byte("null\n[]\n"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		seen, err := phases(bytes.NewReader(b))
		if len(seen) > bytes.Count(b, []byte("\n")) {
			t.Errorf("%d statuses in fewer lines", len(seen))
		}
		if err == nil && len(b) > 0 && b[len(b)-1] != '\n' {
			t.Error("a cut line is accepted")
		}
	})
}
