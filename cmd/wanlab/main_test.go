package main

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestMain lets the tests start this program as wanlab.
func TestMain(m *testing.M) {
	if os.Getenv("WANLAB_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestBadInputIsOneLine checks what is found before anything is touched.
func TestBadInputIsOneLine(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ args, want string }{
		{"up --rate fast", `bad rate "fast": want a number and a unit from 1kbit to 1000gbit, such as 400mbit or 50MB/s, or unlimited`},
		{"up --rtt 50", `bad rtt "50": want a duration from 0s to 1m0s, such as 50ms`},
		{"up --loss 0.1", `bad loss "0.1": want a percentage from 0% to below 100%, such as 0.1%`},
		{"up --queue much", `bad size "much": want a number and a unit, such as 64KiB or 1MB`},
		{"up paris", `unknown command "paris" for "wanlab up"`},
		{"link --rate 1", `bad rate "1"`},
		{"link --reorder some", `--reorder: bad loss "some": want a percentage from 0% to below 100%, such as 0.1%`},
		{"up --duplicate 100%", `--duplicate: bad loss "100%": want`},
		{"link --mtu large", "--mtu"},
		{"link --cut --restore", "none of the others can be"},
		{"link --from local-dc", "--from says whose packets --cut or --restore means"},
		{"link", dir + ": no lab there: make one with wanlab up"},
		{"exec local-dc", "no command: want wanlab exec SITE -- COMMAND"},
		{"exec local-dc --", "no command: want wanlab exec SITE -- COMMAND"},
		{"exec local-dc -- true", "no lab there"},
		{"client web", "nothing to do: want --stream, --udp, --download or --ssh"},
		{"client web --download fast", "--download: \"fast\": want a number of MiB"},
		{"client web --ssh --address web", "--address: ParseAddr"},
		{"client web --ssh --for -1s", "--for -1s: want a duration from now"},
		{"client web --ssh", "no lab there"},
		{"status", "no lab there"},
		{"image ubuntu", `unknown command "ubuntu" for "wanlab image"`},
		{"nonsense", `unknown command "nonsense" for "wanlab"`},
	} {
		root := rootCommand()
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(append([]string{"--dir", dir}, strings.Fields(c.args)...))
		err := root.Execute()
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("wanlab %s: %v, want %q in one line", c.args, err, c.want)
		}
		if out.Len() > 0 {
			t.Errorf("wanlab %s printed %q besides", c.args, out.String())
		}
	}
}

func TestCutFrom(t *testing.T) {
	both := []string{"local-dc", "remote-dc"}
	for _, c := range []struct {
		before []string
		from   string
		cut    bool
		want   []string
	}{
		{nil, "", true, both},
		{nil, "local-dc", true, []string{"local-dc"}},
		{[]string{"local-dc"}, "remote-dc", true, both},
		{[]string{"local-dc"}, "local-dc", true, []string{"local-dc"}},
		{both, "remote-dc", false, []string{"local-dc"}},
		{both, "", false, nil},
		{nil, "", false, nil},
	} {
		if got := cutFrom(c.before, both, c.from, c.cut); !slices.Equal(got, c.want) {
			t.Errorf("cutFrom(%v, %q, %v) = %v, want %v", c.before, c.from, c.cut, got, c.want)
		}
	}
}
