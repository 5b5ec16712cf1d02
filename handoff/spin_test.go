//go:build lab

package handoff

import (
	"context"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

var (
	safety   = []string{"-O1", "-DSAFETY", "-DNOCLAIM"}
	progress = []string{"-O1"}
)

// TestModel has spin visit every state of docs/handoff.pml, which says what is
// bounded in it: three crashes here, and three faults where progress is checked.
func TestModel(t *testing.T) {
	for _, c := range []struct {
		name    string
		defines string
		compile []string
		search  string
		finds   string // "" where nothing is wrong
	}{
		{"never two owners", "", safety, "-E", ""},
		{"never two owners, with operators", "-DOPERATOR", safety, "-E", ""},
		{"never two owners, more crashes", "-DOPERATOR -DCRASHES=6", safety, "-E", ""},
		{"progress", "-DPROGRESS", progress, "-a -f", ""},
		{"progress, with operators", "-DPROGRESS -DOPERATOR", progress, "-a -f", ""},

		{"a source that returns without an answer", "-DRETURNS", safety, "-E", "assertion violated"},
		{"an offer that is not recorded", "-DUNRECORDED", safety, "-E", "assertion violated"},
		{"an acceptance that is not recorded", "-DHIDES", safety, "-E", "assertion violated"},
		{"an abort that is not told", "-DPROGRESS -DMUTE", progress, "-a -f", "acceptance cycle"},

		{"a move that rolls back", "-DGOAL=at_source", safety, "-E", "assertion violated 0"},
		{"a move that is done", "-DGOAL=at_destination", safety, "-E", "assertion violated 0"},
		{"a move that is in doubt", "-DGOAL=in_doubt", safety, "-E", "assertion violated 0"},
		{"an operator who learns of both", "-DOPERATOR -DGOAL=both_told", safety, "-E", "assertion violated 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := verify(t, strings.Fields(c.defines), c.compile, strings.Fields(c.search))
			errors := regexp.MustCompile(`errors: (\d+)`).FindStringSubmatch(out)
			states := regexp.MustCompile(`(\S+) states, stored`).FindStringSubmatch(out)
			switch {
			case errors == nil || states == nil || strings.Contains(out, "max search depth too small"):
				t.Fatalf("spin has not searched all of it:\n%s", out)
			case c.finds == "" && errors[1] != "0":
				t.Fatalf("spin finds an error:\n%s", out)
			case c.finds != "" && !strings.Contains(out, "pan:1: "+c.finds):
				t.Fatalf("spin does not find %q:\n%s", c.finds, out)
			}
			t.Logf("%s states", states[1])
		})
	}
}

// verify makes spin's verifier of the model, and runs it.
func verify(t *testing.T, defines, compile, search []string) string {
	t.Helper()
	model, err := filepath.Abs("../docs/handoff.pml")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dir := t.TempDir()
	do := func(name string, args ...string) string {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: make deps installs spin and gcc\n%s", cmd, err, out)
		}
		return string(out)
	}
	do("spin", append(defines, "-a", model)...)
	do("cc", append(compile, "-o", "pan", "pan.c")...)
	const depth = "-m100000"
	return do("./pan", append(search, depth)...)
}
