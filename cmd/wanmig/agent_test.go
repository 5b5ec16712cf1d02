package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// cannedAgent answers the local API on a unix socket with what a text says.
// The text has blocks: a line "METHOD PATH STATUS", then the body's lines up to
// an empty one. A request is answered by the next block for it, at the end by
// the last again. Lines of a body that begin with "!" are not sent:
//
//	!hold        keeps the answer open until the client leaves or release is called
//	!drop        breaks the connection
//	!fill N      sends N bytes
type cannedAgent struct {
	server   *http.Server
	sentFile string
	held     chan struct{}

	mu     sync.Mutex
	blocks map[string][]block
	asked  map[string]chan struct{} // closed at the first request
}

type block struct {
	status int
	body   []string
}

func startCannedAgent(socket, text, sentFile string) (*cannedAgent, error) {
	a := &cannedAgent{sentFile: sentFile, held: make(chan struct{}), blocks: map[string][]block{}, asked: map[string]chan struct{}{}}
	for b := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		lines := strings.Split(b, "\n")
		var method, path string
		var status int
		if _, err := fmt.Sscan(lines[0], &method, &path, &status); err != nil {
			return nil, fmt.Errorf("canned answer %q: %w", lines[0], err)
		}
		key := method + " " + path
		a.blocks[key] = append(a.blocks[key], block{status, lines[1:]})
		a.asked[key] = make(chan struct{})
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	a.server = &http.Server{Handler: a}
	go a.server.Serve(listener)
	return a, nil
}

func (a *cannedAgent) stop() { a.server.Close() }

// release lets held answers go on.
func (a *cannedAgent) release() { close(a.held) }

func (a *cannedAgent) waitFor(request string) error {
	a.mu.Lock()
	asked := a.asked[request]
	a.mu.Unlock()
	select {
	case <-asked:
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("the agent was not asked %q", request)
	}
}

func (a *cannedAgent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := r.Method + " " + r.URL.EscapedPath()
	body, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	if len(body) > 0 {
		f, err := os.OpenFile(a.sentFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			fmt.Fprintf(f, "%s %s\n", key, body)
			f.Close()
		}
	}
	blocks := a.blocks[key]
	if len(blocks) > 1 {
		a.blocks[key] = blocks[1:]
	}
	if asked := a.asked[key]; asked != nil {
		select {
		case <-asked:
		default:
			close(asked)
		}
	}
	a.mu.Unlock()
	if len(blocks) == 0 {
		http.NotFound(w, r)
		return
	}
	w.WriteHeader(blocks[0].status)
	for _, line := range blocks[0].body {
		switch {
		case line == "!hold":
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-a.held:
			}
		case line == "!drop":
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case strings.HasPrefix(line, "!fill "):
			n, _ := strconv.Atoi(strings.TrimPrefix(line, "!fill "))
			w.Write(bytes.Repeat([]byte("x"), n))
		default:
			fmt.Fprintln(w, line)
		}
	}
}

// serveCanned starts a canned agent for a Go test and returns its socket.
func serveCanned(t *testing.T, text string) (*cannedAgent, string) {
	t.Helper()
	// A unix socket's path is short, and t.TempDir's may not be.
	dir, err := os.MkdirTemp("", "wanmig")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a, err := startCannedAgent(dir+"/agent.sock", text, dir+"/sent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.stop)
	return a, dir + "/agent.sock"
}
