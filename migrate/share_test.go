package migrate

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestMemoryMayRead(t *testing.T) {
	script, err := os.ReadFile("testdata/share.txt")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for i, line := range strings.Split(string(script), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		lines++
		var pending, peak, sent, rate, left, round, ram float64
		var want string
		if _, err := fmt.Sscan(line, &pending, &peak, &sent, &rate, &left, &round, &ram, &want); err != nil {
			t.Fatalf("line %d: %v", i+1, err)
		}
		const mib = 1 << 20
		got := memoryMayRead(load{DiskPending: int64(pending * mib), DiskPeak: int64(peak * mib),
			DiskSent: int64(sent * mib), DiskRate: rate * mib,
			FirstPassLeft: int64(left * mib), RoundLeft: int64(round * mib), RAM: int64(ram * mib), Silent: strings.Contains(line, " silent: ")})
		if got != (want == "read") || want != "read" && want != "hold" {
			t.Errorf("line %d: memory may be read: %v\n%s", i+1, got, line)
		}
	}
	if lines < 10 {
		t.Errorf("only %d lines in the script", lines)
	}
}
