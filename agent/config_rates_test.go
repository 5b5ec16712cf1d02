package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"go.yaml.in/yaml/v3"

	"github.com/wanmig/wanmig/rate"
)

// TestRates plays testdata/rates.txt.
func TestRates(t *testing.T) {
	script, err := os.ReadFile("testdata/rates.txt")
	if err != nil {
		t.Fatal(err)
	}
	config, times, _ := strings.Cut(string(script), "\n---\n")
	var c struct{ Rates RatesConfig }
	if err := yaml.Unmarshal([]byte(config), &c); err != nil {
		t.Fatal(err)
	}
	if err := c.Rates.check(); err != nil {
		t.Fatal(err)
	}
	lines := 0
	for line := range strings.SplitSeq(times, "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		lines++
		zone, err := time.LoadLocation(words[1])
		if err != nil {
			t.Fatal(err)
		}
		at, err := time.Parse("2006-01-02T15:04:05Z07:00", words[2])
		if err != nil {
			t.Fatal(err)
		}
		local := at.In(zone)
		if day := local.Format("Mon"); day != words[3] {
			t.Fatalf("%s: it is %s", line, day)
		}
		got := c.Rates.at(strings.TrimPrefix(words[0], "all"), local)
		if is := strings.Replace(fmt.Sprint(got.Rate), "0bit", "none", 1); is != words[5] {
			t.Errorf("%s: it is %s", line, is)
		}
	}
	if lines < 20 {
		t.Errorf("only %d lines in the script", lines)
	}
}

func TestRatesOfSites(t *testing.T) {
	c := RatesConfig{{Site: "south", Rate: 400e6}, {Rate: 600e6}, {Site: "sooth", Rate: 1e6}}
	now := time.Now()
	if got := c.at("south", now); got.Rate != 400e6 || got.What != "site south" {
		t.Errorf("of south: %+v", got)
	}
	if got := c.at("", now); got.Rate != 600e6 || got.What != "all sites" {
		t.Errorf("of all: %+v", got)
	}
	if got := c.at("north", now); got.Rate != 0 {
		t.Errorf("of a site without one: %+v", got)
	}
	if got := c.unknown([]Site{{Name: "south"}}); len(got) != 1 || got[0] != "sooth" {
		t.Errorf("of no site that is known: %v", got)
	}
}

func TestRatesErrors(t *testing.T) {
	for want, text := range map[string]string{
		"line 2: bad rate":        "rates:\n- {rate: 400mbps}\n",
		"or none":                 "rates: [{rate: fast}]\n",
		"is no day":               "rates: [{windows: [{days: [someday]}]}]\n",
		`"8:00" is no time`:       "rates: [{windows: [{from: '8:00', to: '18:00'}]}]\n",
		`"24:01" is no time`:      "rates: [{windows: [{from: '08:00', to: '24:01'}]}]\n",
		`"08:60" is no time`:      "rates: [{windows: [{from: '08:60', to: '18:00'}]}]\n",
		`"-1:00" is no time`:      "rates: [{windows: [{from: '-1:00', to: '18:00'}]}]\n",
		"no time in it":           "rates: [{windows: [{from: '08:00', to: '08:00'}]}]\n",
		"all sites has no time":   "rates: [{windows: [{from: '24:00', to: '08:00'}]}]\n",
		"two entries for site a":  "rates: [{site: a}, {site: a}]\n",
		"two entries for all":     "rates: [{rate: 1mbit}, {rate: 2mbit}]\n",
		"is not a site's name":    "rates: [{site: a b}]\n",
		"there are days, from":    "rates: [{windows: [{until: '08:00'}]}]\n",
		"there are site, rate, w": "rates: [{limit: 1mbit}]\n",
	} {
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadConfig(path)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want one line with %q", text, err, want)
		}
	}
}

// FuzzRates gives the configuration anything: what is taken has a limit at any time.
func FuzzRates(f *testing.F) {
	f.Add("[{site: a, rate: 1mbit, windows: [{days: [mon, Sunday], from: '22:00', to: '06:00', rate: none}]}]", int64(1e9))
	f.Add("[{windows: [{from: 08:00, to: 24:00, rate: 50MB/s}]}]", int64(0))
	f.Fuzz(func(t *testing.T, text string, at int64) {
		var c RatesConfig
		if yaml.Unmarshal([]byte(text), &c) != nil || c.check() != nil {
			return
		}
		for _, r := range c {
			if got := c.at(r.Site, time.Unix(at, 0)).Rate; got != 0 && (got < rate.Least || got > rate.Most) {
				t.Errorf("%q: %v", text, got)
			}
		}
	})
}
