package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/wanmig/wanmig/blocksync/seed"
	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
)

// What the client accepts at most, in bytes. The agent runs as root and is
// trusted, but the socket's path is a flag: anything may answer on it.
const (
	maxDocument = 16 << 20
	maxLine     = 1 << 20
	maxFailure  = 64 << 10
)

// answerTimeout is how long the agent may think before it answers. A site's
// check dials the peer, which takes up to some ten seconds.
const answerTimeout = time.Minute

var (
	// ErrNoAgent is returned when nothing listens on the agent's socket.
	ErrNoAgent = errors.New("no agent")

	// ErrBadAnswer is returned when what answers on the socket does not speak
	// the agent's API.
	ErrBadAnswer = errors.New("not the answer of a wanmig agent")
)

// APIError is an error that the agent answered with.
type APIError struct {
	Status  int    // of HTTP
	Message string // for the operator
}

func (e *APIError) Error() string { return e.Message }

// Client calls an agent's local API. It is safe for concurrent use.
//
// Besides the errors named at the methods, each returns an *APIError when the
// agent refuses, ErrNoAgent, fs.ErrPermission or ErrBadAnswer.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client of the agent that listens on a unix socket. It
// connects when it is used.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DialContext:            c.dial,
		ResponseHeaderTimeout:  answerTimeout,
		MaxResponseHeaderBytes: maxFailure,
		DisableCompression:     true,
	}
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c
}

// Info describes the agent.
func (c *Client) Info(ctx context.Context) (Info, error) {
	return get[Info](ctx, c, "agent")
}

// Sites lists the peers that the agent knows.
func (c *Client) Sites(ctx context.Context) ([]Site, error) {
	return get[[]Site](ctx, c, "sites")
}

// PutSite adds a peer, or replaces the one of that name.
func (c *Client) PutSite(ctx context.Context, s Site) error {
	return c.send(ctx, http.MethodPut, s, "sites", s.Name)
}

// DeleteSite makes the agent forget a peer.
func (c *Client) DeleteSite(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodDelete, nil, "sites", name)
}

// CheckSite asks the agent to try a peer.
func (c *Client) CheckSite(ctx context.Context, name string) (SiteCheck, error) {
	return get[SiteCheck](ctx, c, "sites", name, "check")
}

// StartMove begins a move and returns as soon as the agent has taken it over.
// After an error of another kind than those named at Client it is not known
// whether the move began.
func (c *Client) StartMove(ctx context.Context, r migrate.Request) (migrate.Status, error) {
	return document[migrate.Status](c.call(ctx, http.MethodPost, r, "moves"))
}

// Moves lists the moves that the agent knows, oldest first.
func (c *Client) Moves(ctx context.Context) ([]migrate.Status, error) {
	return get[[]migrate.Status](ctx, c, "moves")
}

// Move returns a move as it stands.
func (c *Client) Move(ctx context.Context, id string) (migrate.Status, error) {
	return get[migrate.Status](ctx, c, "moves", id)
}

// WatchMove calls see with a move's status now and at each change, until the
// stream ends, see returns an error, or ctx ends. It returns nil when the
// agent ended the stream in order, which it also does when it is stopped: the
// last status tells whether the move has ended.
func (c *Client) WatchMove(ctx context.Context, id string, see func(migrate.Status) error) error {
	body, err := c.call(ctx, http.MethodGet, nil, "moves", id, "watch")
	if err != nil {
		return err
	}
	defer body.Close()
	return readStatuses(body, see)
}

// CancelMove asks the agent to roll a move back. It returns when the agent has
// taken note; the move ends later. An *APIError with status 409 says that it
// is too late.
func (c *Client) CancelMove(ctx context.Context, id string) error {
	return c.send(ctx, http.MethodPost, nil, "moves", id, "cancel")
}

// RecoverMove decides a move that is in doubt, by a word of migrate. An *APIError with
// status 409 says why that word does not fit.
func (c *Client) RecoverMove(ctx context.Context, id, word string) error {
	return c.send(ctx, http.MethodPost, Word{word}, "moves", id, "recover")
}

// RollbackMove has the guest of a move come back, and returns the move by which it
// does. An *APIError with status 502 says that the other site is not reached.
func (c *Client) RollbackMove(ctx context.Context, id string) (Rollback, error) {
	return document[Rollback](c.call(ctx, http.MethodPost, nil, "moves", id, "rollback"))
}

// LeftCopy finds the whole copy that the guest of a move has left.
func (c *Client) LeftCopy(ctx context.Context, id string) (LeftCopy, error) {
	return get[LeftCopy](ctx, c, "moves", id, "copy")
}

// StartCopy starts the guest of a move from the copy that it has left.
func (c *Client) StartCopy(ctx context.Context, id string) error {
	return c.send(ctx, http.MethodPost, nil, "moves", id, "copy", "start")
}

// LimitMove changes how much of the link a move may use, by its ID or the name of
// the VM. An *APIError with status 409 says that the move is over, or that its other
// host limits it.
func (c *Client) LimitMove(ctx context.Context, move string, l migrate.Limit) error {
	return c.send(ctx, http.MethodPut, Limit{l}, "moves", move, "limit")
}

// Redirects lists the redirects that stand at the agent's host, oldest first.
func (c *Client) Redirects(ctx context.Context) ([]netredirect.Status, error) {
	return get[[]netredirect.Status](ctx, c, "redirects")
}

// Redirect returns the redirect of a move, by the move's ID or the VM's name.
func (c *Client) Redirect(ctx context.Context, move string) (netredirect.Status, error) {
	return get[netredirect.Status](ctx, c, "redirects", move)
}

// DrainRedirect tells the agent that nothing more will move: the tunnel goes
// when nothing uses it.
func (c *Client) DrainRedirect(ctx context.Context, move string) error {
	return c.send(ctx, http.MethodPost, nil, "redirects", move, "drain")
}

// CutRedirect removes a tunnel now. An *APIError with status 409 says that
// connections use it, which force overrides, or that there is none to remove;
// one with status 502 that it still stands at the other site.
func (c *Client) CutRedirect(ctx context.Context, move string, force bool) error {
	return c.send(ctx, http.MethodPost, Cut{force}, "redirects", move, "cut")
}

// Copies lists the older copies of disks that the agent's host keeps.
func (c *Client) Copies(ctx context.Context) ([]migrate.Copy, error) {
	return get[[]migrate.Copy](ctx, c, "copies")
}

// RemoveCopies removes those of a VM, by its name or UUID.
func (c *Client) RemoveCopies(ctx context.Context, vm string) error {
	return c.send(ctx, http.MethodDelete, nil, "copies", vm)
}

// Seeds lists the images whose content guests that come to this host need not be sent.
func (c *Client) Seeds(ctx context.Context) ([]seed.Status, error) {
	return get[[]seed.Status](ctx, c, "seeds")
}

// ScanSeeds has the agent look for seeds now.
func (c *Client) ScanSeeds(ctx context.Context) error {
	return c.send(ctx, http.MethodPost, nil, "seeds", "scan")
}

func get[T any](ctx context.Context, c *Client, path ...string) (T, error) {
	return document[T](c.call(ctx, http.MethodGet, nil, path...))
}

func (c *Client) send(ctx context.Context, method string, in any, path ...string) error {
	body, err := c.call(ctx, method, in, path...)
	if err != nil {
		return err
	}
	return body.Close()
}

// call sends a request and returns the body of an answer with a 2xx status.
func (c *Client) call(ctx context.Context, method string, in any, path ...string) (io.ReadCloser, error) {
	target := "http://agent/v1"
	for _, segment := range path {
		if segment == "" || segment == "." || segment == ".." {
			return nil, &APIError{http.StatusNotFound, fmt.Sprintf("%q is no name", segment)}
		}
		target += "/" + url.PathEscape(segment)
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// The URL in net/http's error says nothing to an operator.
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		if errors.Is(err, ErrNoAgent) || errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
		return nil, fmt.Errorf("ask the agent at %s: %w", c.socket, err)
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, readFailure(resp)
	}
	return resp.Body, nil
}

func (c *Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w at %s: is `wanmig agent` running? (systemctl status wanmig-agent)", ErrNoAgent, c.socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("the agent at %s: %w: run this as root%s", c.socket, fs.ErrPermission, orMember(c.socket))
	}
	return conn, err
}

// orMember names the group that may use a socket, as the end of a sentence.
func orMember(socket string) string {
	fi, err := os.Stat(socket)
	if err != nil {
		return " or as a member of the socket's group"
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || st.Gid == 0 || fi.Mode().Perm()&0o020 == 0 {
		return ""
	}
	g, err := user.LookupGroupId(strconv.Itoa(int(st.Gid)))
	if err != nil {
		return fmt.Sprintf(" or as a member of group %d", st.Gid)
	}
	return " or as a member of group " + g.Name
}

// document reads the one JSON value of an answer and closes it.
func document[T any](body io.ReadCloser, err error) (T, error) {
	var v T
	if err != nil {
		return v, err
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, maxDocument+1))
	if err != nil {
		return v, fmt.Errorf("read the agent's answer: %w", err)
	}
	if len(b) > maxDocument {
		return v, fmt.Errorf("%w: longer than %d bytes", ErrBadAnswer, maxDocument)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		var none T
		return none, fmt.Errorf("%w: %w", ErrBadAnswer, err)
	}
	return v, nil
}

// readStatuses decodes a status per line. A last line without its newline is
// what a broken connection leaves: io.ErrUnexpectedEOF.
func readStatuses(r io.Reader, see func(migrate.Status) error) error {
	lines := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("%w: a line longer than %d bytes", ErrBadAnswer, maxLine)
		case errors.Is(err, io.EOF) && len(line) == 0:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("read the agent's answer: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return fmt.Errorf("read the agent's answer: %w", err)
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var s migrate.Status
		if err := json.Unmarshal(line, &s); err != nil {
			return fmt.Errorf("%w: %w", ErrBadAnswer, err)
		}
		if err := see(s); err != nil {
			return err
		}
	}
}

// readFailure decodes an answer with another status than 2xx.
func readFailure(resp *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxFailure))
	if err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	var body struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(b, &body) != nil || body.Error == "" {
		return fmt.Errorf("%w: %s", ErrBadAnswer, http.StatusText(resp.StatusCode))
	}
	return &APIError{resp.StatusCode, body.Error}
}
