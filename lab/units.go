package lab

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/wanmig/wanmig/rate"
)

// ParseRate reads a rate as package rate does, or "unlimited", which is 0. The
// result is in bits per second.
func ParseRate(s string) (int64, error) {
	if strings.EqualFold(strings.TrimSuffix(s, "/s"), "unlimited") {
		return 0, nil
	}
	r, err := rate.Parse(s)
	if err != nil {
		return 0, fmt.Errorf("%w, or unlimited", err)
	}
	return int64(r), nil
}

// ParseLoss reads a share of packets as a percentage, such as "0.1%", or "0".
// The result is a fraction below 1.
func ParseLoss(s string) (float64, error) {
	number, percent := strings.CutSuffix(s, "%")
	n, err := rate.Decimal(number)
	if err != nil || n >= 100 || (!percent && n != 0) {
		return 0, fmt.Errorf("bad loss %q: want a percentage from 0%% to below 100%%, such as 0.1%%", s)
	}
	return n / 100, nil
}

// ParseRTT reads a duration, such as "50ms".
func ParseRTT(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > maxRTT {
		return 0, fmt.Errorf("bad rtt %q: want a duration from 0s to %v, such as 50ms", s, maxRTT)
	}
	return d, nil
}

// ParseSize reads a number of bytes with B, kB, MB or GB (powers of 1000) or
// KiB, MiB or GiB (powers of 1024).
func ParseSize(s string) (int64, error) {
	n, err := scaled(strings.ToLower(s), []unit{
		{"kib", 1 << 10}, {"mib", 1 << 20}, {"gib", 1 << 30},
		{"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9}, {"b", 1},
	})
	if err != nil || n > 1<<50 {
		return 0, fmt.Errorf("bad size %q: want a number and a unit, such as 64KiB or 1MB", s)
	}
	return int64(n), nil
}

// FormatRate writes a rate so that ParseRate reads it.
func FormatRate(bits int64) string {
	if bits == 0 {
		return "unlimited"
	}
	return rate.Rate(bits).String()
}

// FormatLoss writes a fraction so that ParseLoss reads it.
func FormatLoss(loss float64) string {
	return strconv.FormatFloat(loss*100, 'g', 6, 64) + "%"
}

type unit struct {
	name   string
	factor float64
}

func scaled(s string, units []unit) (float64, error) {
	for _, u := range units {
		if number, ok := strings.CutSuffix(s, u.name); ok {
			n, err := rate.Decimal(number)
			return n * u.factor, err
		}
	}
	return 0, strconv.ErrSyntax
}
