// Package rate has rates of links, as an operator writes them.
package rate

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Rate is in bits per second.
type Rate int64

// The bounds of what Parse takes.
const (
	Least Rate = 1e3
	Most  Rate = 1e12
)

// units are those of tc (powers of 1000), and bytes, whose B is always a capital:
// a b alone may be meant as either.
var units = []struct {
	name   string
	anyway bool // in either case
	factor float64
}{
	{"kbit", true, 1e3}, {"mbit", true, 1e6}, {"gbit", true, 1e9}, {"tbit", true, 1e12}, {"bit", true, 1},
	{"KiB", false, 8 << 10}, {"MiB", false, 8 << 20}, {"GiB", false, 8 << 30},
	{"kB", false, 8e3}, {"KB", false, 8e3}, {"MB", false, 8e6}, {"GB", false, 8e9},
}

// Parse reads a number with a unit: bit, kbit, mbit, gbit or tbit in either case,
// or kB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024) for bytes; with or
// without "/s".
func Parse(s string) (Rate, error) {
	text := strings.TrimSuffix(s, "/s")
	for _, u := range units {
		if len(text) <= len(u.name) {
			continue
		}
		number, unit := text[:len(text)-len(u.name)], text[len(text)-len(u.name):]
		if unit != u.name && !(u.anyway && strings.EqualFold(unit, u.name)) {
			continue
		}
		if n, err := Decimal(number); err == nil && n*u.factor >= float64(Least) && n*u.factor <= float64(Most) {
			return Rate(n * u.factor), nil
		}
		break
	}
	return 0, fmt.Errorf("bad rate %.40q: want a number and a unit from 1kbit to 1000gbit, such as 400mbit or 50MB/s", s)
}

// Decimal reads plain decimals only: strconv.ParseFloat alone would also take
// signs, exponents, hexadecimals, infinities and NaN.
func Decimal(s string) (float64, error) {
	if strings.Trim(s, "0123456789.") != "" {
		return 0, strconv.ErrSyntax
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsInf(n, 0) {
		return 0, strconv.ErrSyntax
	}
	return n, nil
}

// Bytes is the rate in bytes per second.
func (r Rate) Bytes() int64 { return int64(r) / 8 }

// String writes a rate so that Parse reads it.
func (r Rate) String() string {
	for _, u := range []struct {
		name   string
		factor Rate
	}{{"gbit", 1e9}, {"mbit", 1e6}, {"kbit", 1e3}} {
		if r != 0 && r%u.factor == 0 {
			return fmt.Sprintf("%d%s", r/u.factor, u.name)
		}
	}
	return fmt.Sprintf("%dbit", int64(r))
}
