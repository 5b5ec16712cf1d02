package lab

import (
	"testing"
	"time"
)

func TestParseRate(t *testing.T) {
	for text, want := range map[string]int64{
		"100mbit": 100e6, "1gbit": 1e9, "1.5Gbit/s": 15e8, "64kbit": 64e3, "1000bit": 1000, "unlimited": 0, "1000gbit": 1e12,
	} {
		if got, err := ParseRate(text); err != nil || got != want {
			t.Errorf("ParseRate(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "100", "mbit", "100 mbit", "-1mbit", "1e3mbit", "0x1mbit", "infmbit", "nanmbit", "1.2.3mbit", "999bit", "0mbit",
		"1001gbit", "100mbyte", "100mbit/h", ".mbit", "1" + string(make([]byte, 400)) + "mbit",
	} {
		if got, err := ParseRate(text); err == nil {
			t.Errorf("ParseRate(%q) = %d without an error", text, got)
		}
	}
}

func TestParseLoss(t *testing.T) {
	for text, want := range map[string]float64{"0": 0, "0%": 0, "0.1%": 0.001, "1%": 0.01, "50%": 0.5} {
		if got, err := ParseLoss(text); err != nil || got != want {
			t.Errorf("ParseLoss(%q) = %g, %v; want %g", text, got, err, want)
		}
	}
	for _, text := range []string{"", "%", "0.1", "1", "100%", "-1%", "1%%", "nan%", "1e-3%"} {
		if got, err := ParseLoss(text); err == nil {
			t.Errorf("ParseLoss(%q) = %g without an error", text, got)
		}
	}
}

func TestParseSizeAndRTT(t *testing.T) {
	for text, want := range map[string]int64{"0B": 0, "1500b": 1500, "64KiB": 65536, "1.5MB": 15e5, "1GiB": 1 << 30, "2kB": 2000} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "64", "B", "-1B", "1e9GB", "99999999999GiB", "1TiB"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q) = %d without an error", text, got)
		}
	}
	if got, err := ParseRTT("50ms"); err != nil || got != 50*time.Millisecond {
		t.Errorf("ParseRTT(50ms) = %v, %v", got, err)
	}
	for _, text := range []string{"", "50", "-1ms", "61s", "fast"} {
		if got, err := ParseRTT(text); err == nil {
			t.Errorf("ParseRTT(%q) = %v without an error", text, got)
		}
	}
}

func FuzzParseUnits(f *testing.F) {
	for _, seed := range []string{"100mbit", "1.5gbit/s", "unlimited", "0.1%", "99.9999999%", "64KiB", "1e9gbit", "50ms"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if rate, err := ParseRate(text); err == nil {
			if again, err := ParseRate(FormatRate(rate)); err != nil || again != rate {
				t.Errorf("rate %q is %d, written %q, read %d, %v", text, rate, FormatRate(rate), again, err)
			}
		}
		if loss, err := ParseLoss(text); err == nil && !(loss >= 0 && loss < 1) {
			t.Errorf("loss %q is %g", text, loss)
		}
		if size, err := ParseSize(text); err == nil && size < 0 {
			t.Errorf("size %q is %d", text, size)
		}
		if rtt, err := ParseRTT(text); err == nil && (rtt < 0 || rtt > maxRTT) {
			t.Errorf("rtt %q is %v", text, rtt)
		}
	})
}
