package migrate

import (
	"fmt"
	"math"
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
			FirstPassLeft: int64(left * mib), RoundLeft: int64(round * mib), RAM: int64(ram * mib), Silent: strings.Contains(line, " silent: "), Released: strings.Contains(line, " released: ")})
		if got != (want == "read") || want != "read" && want != "hold" {
			t.Errorf("line %d: memory may be read: %v\n%s", i+1, got, line)
		}
	}
	if lines < 10 {
		t.Errorf("only %d lines in the script", lines)
	}
}

// pass is a first pass of memory beside a backlog of disks, in MiB and seconds.
type pass struct{ link, backlog, writes, ram, wire float64 }

// run plays it, and tells when the disks had caught up for the first time and when
// all of memory had been read.
func (p pass) run(t *testing.T) (disks, memory float64) {
	const step, mib = 0.05, 1 << 20
	pending, left, sent, rate := p.backlog, p.ram, 0.0, 0.0
	now, caught := 0.0, -1.0
	for ; left > 0; now += step {
		if now > 3600 {
			t.Fatalf("%+v: no end in sight: %g MiB of memory left, %g of disks", p, left, pending)
		}
		read := memoryMayRead(load{DiskPending: int64(pending * mib), DiskPeak: int64(p.backlog * mib), DiskSent: int64(sent * mib), DiskRate: rate * mib,
			FirstPassLeft: int64(left * mib), RAM: int64(p.ram * mib)})
		room := p.link * step
		pending += p.writes * step
		disk := min(pending, room)
		if read {
			disk = min(pending, max(room/2, room-left*p.wire))
			left -= min(left, (room-disk)/p.wire)
		}
		pending, sent = pending-disk, sent+disk
		rate += step / 2 * (disk/step - rate) // as gauge does
		if caught < 0 && pending == 0 {
			caught = now
		}
	}
	return caught, now
}

// TestFirstPass plays testdata/firstpass.txt.
func TestFirstPass(t *testing.T) {
	script, err := os.ReadFile("testdata/firstpass.txt")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for i, line := range strings.Split(string(script), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		lines++
		var p pass
		var disks, memory float64
		if _, err := fmt.Sscan(strings.Replace(line, "=", "", 1), &p.link, &p.backlog, &p.writes, &p.ram, &p.wire, &disks, &memory); err != nil {
			t.Fatalf("line %d: %v", i+1, err)
		}
		d, m := p.run(t)
		if math.Abs(d-disks) > 1 || math.Abs(m-memory) > 1 {
			t.Errorf("line %d: %s: disks at %.0f s, memory at %.0f s", i+1, line, d, m)
		}
		// Whatever the order, the link is never idle while it is needed, and what
		// stands on the disks is there before memory ends.
		if least := (p.backlog + p.ram*p.wire) / (p.link - p.writes); m > 1.05*least+1 {
			t.Errorf("line %d: %s: %.0f s, the link needs %.0f", i+1, line, m, least)
		}
		if m < d {
			t.Errorf("line %d: %s: memory's first pass ends before the disks", i+1, line)
		}
	}
	if lines < 9 {
		t.Errorf("only %d lines in the script", lines)
	}
}
