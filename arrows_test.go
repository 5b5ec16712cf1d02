// Package wanmig has no code of its own: this test holds the arrows between
// the packages of the house, as docs/ARCHITECTURE.md draws them.
package wanmig

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/wanmig/wanmig/"

// arrows lists which packages of this module a package may import.
var arrows = map[string][]string{
	"rate":                  {},
	"faults":                {},
	"compress":              {},
	"tunnel":                {},
	"handoff":               {"faults"},
	"hypervisor":            {},
	"memsync":               {"compress"},
	"blocksync/nbd":         {},
	"blocksync/seed":        {"compress"},
	"blocksync":             {"blocksync/nbd", "compress", "faults"},
	"netredirect":           {"netredirect/hostnet", "netredirect/encap", "netredirect/neighbour", "netredirect/names", "netredirect/routes"},
	"netredirect/hostnet":   {},
	"netredirect/encap":     {},
	"netredirect/neighbour": {},
	"netredirect/names":     {},
	"netredirect/routes":    {},
	"migrate":               {"faults", "netredirect", "handoff", "hypervisor", "memsync", "blocksync", "blocksync/nbd", "blocksync/seed", "compress", "tunnel", "rate"},
	"agent":                 {"rate", "netredirect", "netredirect/names", "netredirect/routes", "migrate", "blocksync/seed", "handoff", "hypervisor", "tunnel"},
	"cmd/wanmig":            {"agent", "migrate", "blocksync", "blocksync/seed", "netredirect", "rate"},
	"lab":                   {"rate", "lab/guest/api"},
	"lab/guest":             {"lab/guest/api"},
	"lab/guest/api":         {},
	"cmd/wanlab":            {"lab", "lab/guest/api"},

	// Of tests alone.
	"netredirect/internal/kerneltest": {"lab"},
	"netredirect/internal/testnet":    {},
}

// owners are the packages that alone may import a library.
var owners = map[string][]string{
	"github.com/digitalocean/go-libvirt": {"hypervisor"},
	"github.com/quic-go/quic-go":         {"tunnel"},
}

func TestImportsFollowTheArrows(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		pkg := filepath.ToSlash(filepath.Dir(path))
		allowed, known := arrows[pkg]
		if !known {
			t.Errorf("%s: package %s has no place in the house: add its arrows", path, pkg)
			return nil
		}
		seen[pkg] = true
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			to, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if inside, ok := strings.CutPrefix(to, module); ok && !slices.Contains(allowed, inside) {
				t.Errorf("%s imports %s: the arrows from %s go to %v", path, inside, pkg, allowed)
			}
			for lib, who := range owners {
				if (to == lib || strings.HasPrefix(to, lib+"/")) && !slices.Contains(who, pkg) {
					t.Errorf("%s imports %s: only %v may", path, to, who)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range arrows {
		if !seen[pkg] {
			t.Errorf("package %s has arrows and no code", pkg)
		}
	}
}
