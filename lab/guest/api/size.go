package api

import (
	"fmt"
	"strconv"
	"strings"
)

// ParseSize reads a size such as 20MiB, 1GiB, 512KiB or 4096 (bytes); "/s" may follow, for rates.
func ParseSize(s string) (int64, error) {
	number := strings.TrimSuffix(s, "/s")
	shift := 0
	for unit, n := range map[string]int{"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40} {
		if strings.HasSuffix(number, unit) {
			number, shift = strings.TrimSuffix(number, unit), n
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || n > uint64(1<<62)>>shift {
		return 0, fmt.Errorf("size %q: want a number with KiB, MiB, GiB or TiB, such as 20MiB", s)
	}
	return int64(n) << shift, nil
}
