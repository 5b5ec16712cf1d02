package hostnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"strings"
	"time"
)

// Bounds on what nft prints, in bytes.
const (
	maxListing   = 32 << 20
	maxComplaint = 2 << 10
)

// A Counter is a named counter of an nftables table.
type Counter struct {
	Packets uint64
	Bytes   uint64
}

// remake makes the table anew whether or not it stands, in the language of
// nft(8). Its counters begin at 0.
func (t *Table) remake() string { return t.remove() + t.text() }

// remove removes the table, whether or not it stands.
func (t *Table) remove() string {
	return fmt.Sprintf("add table %[1]s %[2]s\ndelete table %[1]s %[2]s\n", t.Family, t.Name)
}

func (t *Table) apply(ctx context.Context, _ *Host) error  { return nft(ctx, t.remake()) }
func (t *Table) revert(ctx context.Context, _ *Host) error { return nft(ctx, t.remove()) }

// Counters returns the named counters of a table. The error of one that does not
// stand wraps fs.ErrNotExist.
func (h *Host) Counters(ctx context.Context, table Table) (map[string]Counter, error) {
	if err := table.validate(); err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	listing, err := nftList(ctx, "counters", "table", table.Family, table.Name)
	if err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	objects, err := parseListing(listing)
	if err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	counters := map[string]Counter{}
	for _, o := range objects {
		if o.Counter != nil {
			counters[o.Counter.Name] = Counter{o.Counter.Packets, o.Counter.Bytes}
		}
	}
	return counters, nil
}

// ForwardPolicyDrops names the nftables chains of others, "family table chain",
// that drop forwarded packets unless a rule accepts them.
func (h *Host) ForwardPolicyDrops(ctx context.Context) ([]string, error) {
	listing, err := nftList(ctx, "chains")
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	objects, err := parseListing(listing)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	var names []string
	for _, o := range objects {
		if c := o.Chain; c != nil && c.Hook == "forward" && c.Policy == "drop" && !strings.HasPrefix(c.Table, tablePrefix) {
			names = append(names, fmt.Sprintf("%s %s %s", c.Family, c.Table, c.Name))
		}
	}
	return names, nil
}

// tables names the nftables tables of wanmig.
func tables(ctx context.Context) ([]string, error) {
	listing, err := nftList(ctx, "tables")
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	objects, err := parseListing(listing)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	var names []string
	for _, o := range objects {
		if t := o.Table; t != nil && strings.HasPrefix(t.Name, tablePrefix) {
			names = append(names, fmt.Sprintf("table %s %s", t.Family, t.Name))
		}
	}
	return names, nil
}

// object is one of a listing of nft, libnftables-json(5).
type object struct {
	Table *struct {
		Family string `json:"family"`
		Name   string `json:"name"`
	} `json:"table"`
	Chain *struct {
		Family string `json:"family"`
		Table  string `json:"table"`
		Name   string `json:"name"`
		Hook   string `json:"hook"`
		Policy string `json:"policy"`
	} `json:"chain"`
	Counter *struct {
		Name    string `json:"name"`
		Packets uint64 `json:"packets"`
		Bytes   uint64 `json:"bytes"`
	} `json:"counter"`
}

func parseListing(listing []byte) ([]object, error) {
	var all struct {
		Objects []object `json:"nftables"`
	}
	if err := json.Unmarshal(listing, &all); err != nil {
		return nil, fmt.Errorf("output of nft -j: %w", err)
	}
	return all.Objects, nil
}

// nft runs a script as one transaction: all of it holds, or nothing.
func nft(ctx context.Context, script string) error {
	_, err := runNFT(ctx, script, "-f", "-")
	return err
}

func nftList(ctx context.Context, what ...string) ([]byte, error) {
	return runNFT(ctx, "", append([]string{"-j", "list"}, what...)...)
}

func runNFT(ctx context.Context, input string, args ...string) ([]byte, error) {
	path, err := exec.LookPath("nft")
	if err != nil {
		// A service's PATH may be without sbin.
		path, err = exec.LookPath("/usr/sbin/nft")
	}
	if err != nil {
		return nil, ErrNoNFT
	}
	out := limited{limit: maxListing}
	complaint := limited{limit: maxComplaint}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C"} // its complaints are read
	cmd.Stdin = strings.NewReader(input)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(complaint.kept.String())
		if strings.Contains(text, "No such file or directory") {
			err = errors.Join(fs.ErrNotExist, err)
		}
		return nil, fmt.Errorf("nft %s: %w: %s", strings.Join(args, " "), err, text)
	}
	if out.cut {
		return nil, fmt.Errorf("nft %s: more than %d bytes of output", strings.Join(args, " "), maxListing)
	}
	return out.kept.Bytes(), nil
}

// limited keeps the first bytes of what is written to it. It is no
// bytes.Buffer, whose ReadFrom would know of no limit.
type limited struct {
	kept  bytes.Buffer
	limit int
	cut   bool
}

func (l *limited) Write(b []byte) (int, error) {
	room := min(l.limit-l.kept.Len(), len(b))
	l.cut = l.cut || room < len(b)
	l.kept.Write(b[:room])
	return len(b), nil
}
