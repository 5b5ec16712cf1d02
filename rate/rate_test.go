package rate

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]Rate{
		"400mbit": 400e6, "400Mbit/s": 400e6, "1.5gbit": 1.5e9, "1tbit": 1e12, "1000bit": 1000,
		"2kbit": 2e3, "50MB/s": 400e6, "50MB": 400e6, "50MiB/s": 50 * 8 << 20, "1GiB": 8 << 30, "1GB": 8e9, "1kB/s": 8e3, "1KB": 8e3,
		"10GBIT": 10e9, "1KiB/s": 8192,
	} {
		if got, err := Parse(text); err != nil || got != want {
			t.Errorf("%q is %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "mbit", "400", "400m", "400 mbit", "400M", "400mb", "400Mb/s", "400mbps", "-1mbit", "1e3mbit", "0x1mbit", "1..2mbit",
		"0mbit", "999bit", "1001gbit", "NaNmbit", "infmbit", "1mbit/h", "1 mbit s", " 1mbit", "1  mbit", "none", strings.Repeat("9", 400) + "bit"} {
		if got, err := Parse(text); err == nil {
			t.Errorf("%.40q is taken as %d", text, got)
		} else if len(err.Error()) > 200 {
			t.Errorf("a long error: %v", err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"400mbit", "1.5gbit", "50MB/s", "8191bit", "1KiB/s", "0.001mbit", "bit", "/s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Parse(s)
		if err != nil {
			return
		}
		if r < Least || r > Most {
			t.Errorf("%q is %d: out of bounds", s, r)
		}
		if again, err := Parse(r.String()); err != nil || again != r {
			t.Errorf("%d is written %s, which reads as %d, %v", r, r, again, err)
		}
	})
}
