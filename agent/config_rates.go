package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/rate"
)

// RatesConfig limits what all moves of this host send together, by site.
type RatesConfig []RateConfig

// RateConfig is the limit to one site, or to all of them together. The first of its
// windows that holds counts, and without one its rate.
type RateConfig struct {
	Site    string         `yaml:"site"` // "": all together
	Rate    Rate           `yaml:"rate"`
	Windows []WindowConfig `yaml:"windows"`
}

// WindowConfig is a limit at some times of the day: while the host's clock, in its
// time zone, shows From or later and not yet To. A To that is not after From is
// that of the next day. Days are those on which the window begins.
//
// So the clock alone decides: when it is set forward at the begin of summer time, a
// window within the hour that is left out does not come, and when it is set back a
// window within the hour that comes twice does too.
type WindowConfig struct {
	Days []Day `yaml:"days"` // none: every day
	From Clock `yaml:"from"`
	To   Clock `yaml:"to"`
	Rate Rate  `yaml:"rate"`
}

// Rate is a rate as package rate reads it, or "none", which is 0.
type Rate rate.Rate

// UnmarshalYAML reads a rate with its unit.
func (r *Rate) UnmarshalYAML(n *yaml.Node) error {
	if n.Value == "none" {
		*r = 0
		return nil
	}
	v, err := rate.Parse(n.Value)
	if err != nil {
		return fmt.Errorf("line %d: %w, or none", n.Line, err)
	}
	*r = Rate(v)
	return nil
}

// Day is a day of the week.
type Day time.Weekday

// UnmarshalYAML reads a day's name, or its first three letters.
func (d *Day) UnmarshalYAML(n *yaml.Node) error {
	for w := time.Sunday; w <= time.Saturday; w++ {
		if strings.EqualFold(n.Value, w.String()) || strings.EqualFold(n.Value, w.String()[:3]) {
			*d = Day(w)
			return nil
		}
	}
	return fmt.Errorf("line %d: %q is no day: there are mon, tue, wed, thu, fri, sat, sun", n.Line, n.Value)
}

// Clock is a time of the day, in minutes.
type Clock int

const wholeDay Clock = 24 * 60

// UnmarshalYAML reads HH:MM, up to 24:00.
func (c *Clock) UnmarshalYAML(n *yaml.Node) error {
	var h, m int
	if len(n.Value) == len("08:00") && n.Value[2] == ':' && strings.Trim(n.Value, "0123456789:") == "" {
		if _, err := fmt.Sscanf(n.Value, "%d:%d", &h, &m); err == nil && m < 60 && Clock(h*60+m) <= wholeDay {
			*c = Clock(h*60 + m)
			return nil
		}
	}
	return fmt.Errorf("line %d: %q is no time of the day: write it as 08:00", n.Line, n.Value)
}

func (c RatesConfig) check() error {
	seen := map[string]bool{}
	for _, r := range c {
		if r.Site != "" && !siteName.MatchString(r.Site) {
			return fmt.Errorf("rates: %q is not a site's name: use letters, digits, dots and dashes", r.Site)
		}
		if seen[r.Site] {
			return fmt.Errorf("rates: two entries for %s: use windows for several rates", r.what())
		}
		seen[r.Site] = true
		for _, w := range r.Windows {
			if w.From == w.To || w.From == wholeDay {
				return fmt.Errorf("rates: a window for %s has no time in it: from and to are the same, or from is 24:00", r.what())
			}
		}
	}
	return nil
}

func (r RateConfig) what() string {
	if r.Site == "" {
		return "all sites"
	}
	return "site " + r.Site
}

// at is the limit that holds at a time for a site, or for all (site "").
func (c RatesConfig) at(site string, now time.Time) migrate.Cap {
	for _, r := range c {
		if r.Site == site {
			return migrate.Cap{Rate: rate.Rate(r.at(now)), What: r.what()}
		}
	}
	return migrate.Cap{}
}

func (r RateConfig) at(now time.Time) Rate {
	for _, w := range r.Windows {
		if w.holds(now) {
			return w.Rate
		}
	}
	return r.Rate
}

func (w WindowConfig) holds(now time.Time) bool {
	clock := Clock(now.Hour()*60 + now.Minute())
	if w.From < w.To {
		return w.begins(now.Weekday()) && w.From <= clock && clock < w.To
	}
	yesterday := (now.Weekday() + 6) % 7
	return w.begins(now.Weekday()) && w.From <= clock || w.begins(yesterday) && clock < w.To
}

func (w WindowConfig) begins(on time.Weekday) bool {
	return len(w.Days) == 0 || slices.Contains(w.Days, Day(on))
}

// unknown are the sites with a limit that are not among known.
func (c RatesConfig) unknown(known []Site) (names []string) {
	for _, r := range c {
		if r.Site != "" && !slices.ContainsFunc(known, func(s Site) bool { return s.Name == r.Site }) {
			names = append(names, r.Site)
		}
	}
	return names
}
