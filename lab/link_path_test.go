package lab

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// arrival is a packet as it comes out of a path.
type arrival struct {
	number uint32
	at     time.Duration
}

// numbered makes a packet that says which one it is.
func numbered(n, size int) []byte {
	b := make([]byte, size)
	binary.BigEndian.PutUint32(b, uint32(n))
	return b
}

// drain takes everything from a path, at the times that it asks for.
func drain(p *path) []arrival {
	var got []arrival
	for {
		next, busy := p.next()
		if !busy {
			return got
		}
		for data, ok := p.pop(next); ok; data, ok = p.pop(next) {
			got = append(got, arrival{binary.BigEndian.Uint32(data), next})
			p.recycle(data)
		}
	}
}

func TestPathSendsAtTheRateAfterTheDelay(t *testing.T) {
	p := newPath(LinkSettings{Rate: 8e6, RTT: 40 * time.Millisecond}, false, 0) // 1000 bytes take 1 ms
	for i := range 10 {
		p.push(5*time.Millisecond, numbered(i, 1000))
	}
	got := drain(p)
	if len(got) != 10 {
		t.Fatalf("%d packets arrived, want 10", len(got))
	}
	for i, a := range got {
		want := time.Duration(5+i+1+20) * time.Millisecond
		if a.number != uint32(i) || a.at != want {
			t.Errorf("packet %d arrived as number %d at %v, want %v", a.number, i, a.at, want)
		}
	}
	if want := (LinkCounters{Bytes: 10000, Packets: 10}); p.counters != want {
		t.Errorf("counters %+v, want %+v", p.counters, want)
	}
}

func TestPathWithoutRateOnlyDelays(t *testing.T) {
	p := newPath(LinkSettings{RTT: 10 * time.Millisecond, Queue: linkMTU}, false, 0)
	for i := range 100 {
		p.push(0, numbered(i, linkMTU))
	}
	for i, a := range drain(p) {
		if a.number != uint32(i) || a.at != 5*time.Millisecond {
			t.Errorf("packet %d arrived as number %d at %v", a.number, i, a.at)
		}
	}
	if p.counters.Packets != 100 || p.counters.Dropped != 0 {
		t.Errorf("counters %+v, want all packets sent", p.counters)
	}
}

func TestPathDropsTheTailOfAFullQueue(t *testing.T) {
	p := newPath(LinkSettings{Rate: 8e6, Queue: 3000}, false, 0)
	for i := range 10 {
		p.push(0, numbered(i, 1000)) // one is sent, three wait
	}
	p.push(time.Millisecond, numbered(10, 1000)) // the second is being sent: one place is free
	p.push(time.Millisecond, numbered(11, 1000))
	var numbers []uint32
	for _, a := range drain(p) {
		numbers = append(numbers, a.number)
	}
	if want := []uint32{0, 1, 2, 3, 10}; !slices.Equal(numbers, want) {
		t.Errorf("packets %v arrived, want %v", numbers, want)
	}
	if want := (LinkCounters{Bytes: 5000, Packets: 5, Dropped: 7}); p.counters != want {
		t.Errorf("counters %+v, want %+v", p.counters, want)
	}
}

func TestPathQueueHoldsOnePacketOfAnySizeWhenIdle(t *testing.T) {
	p := newPath(LinkSettings{Rate: 8e6, Queue: linkMTU}, false, 0)
	p.push(0, numbered(0, 9000))
	if got := drain(p); len(got) != 1 {
		t.Errorf("%d packets arrived, want 1", len(got))
	}
}

// TestPathDoesNotDependOnWhenItIsCalled lets one path be called at every
// microsecond and another only when packets come.
func TestPathDoesNotDependOnWhenItIsCalled(t *testing.T) {
	settings := LinkSettings{Rate: 15e6, RTT: 3 * time.Millisecond, Loss: 0.05, Burst: 3, Queue: 20000, Seed: 7, Reorder: 0.1, Duplicate: 0.1}
	late, prompt := newPath(settings, false, 0), newPath(settings, false, 0)
	random := rand.New(rand.NewPCG(1, 2))
	var got, want []arrival
	now := time.Duration(0)
	for i := range 3000 {
		for gap := random.IntN(700); gap > 0; gap-- {
			now += time.Microsecond
			for data, ok := prompt.pop(now); ok; data, ok = prompt.pop(now) {
				want = append(want, arrival{number: binary.BigEndian.Uint32(data)})
			}
		}
		size := 100 + random.IntN(1400)
		prompt.push(now, numbered(i, size))
		late.push(now, numbered(i, size))
	}
	for _, a := range drain(prompt) {
		want = append(want, arrival{number: a.number})
	}
	for _, a := range drain(late) {
		got = append(got, arrival{number: a.number})
	}
	if !slices.Equal(got, want) || late.counters != prompt.counters {
		t.Errorf("a path called late let %d packets through, %+v, a prompt one %d, %+v", len(got), late.counters, len(want), prompt.counters)
	}
	if late.counters.Lost == 0 || late.counters.Dropped == 0 {
		t.Errorf("counters %+v: the test needs losses and drops", late.counters)
	}
}

func TestPathChangesWhileItRuns(t *testing.T) {
	slow := LinkSettings{Rate: 8e6, RTT: 100 * time.Millisecond}
	p := newPath(slow, false, 0)
	for i := range 3 {
		p.push(0, numbered(i, 1000))
	}
	// Two packets have begun by now, which no change reaches; the third goes at
	// ten times the rate, and does not overtake them though its delay is less.
	p.configure(1500*time.Microsecond, LinkSettings{Rate: 80e6, RTT: 20 * time.Millisecond}, false)
	p.push(60*time.Millisecond, numbered(3, 1000))
	want := []arrival{
		{0, 51 * time.Millisecond},
		{1, 52 * time.Millisecond},
		{2, 52 * time.Millisecond},
		{3, 70*time.Millisecond + 100*time.Microsecond},
	}
	if got := drain(p); !slices.Equal(got, want) {
		t.Errorf("packets arrived %v, want %v", got, want)
	}
}

func TestPathCut(t *testing.T) {
	s := LinkSettings{Rate: 8e6, RTT: 20 * time.Millisecond}
	p := newPath(s, false, 0)
	p.push(0, numbered(0, 1000))
	p.configure(time.Millisecond, s, true) // the first is under way and arrives
	p.push(2*time.Millisecond, numbered(1, 1000))
	p.push(2*time.Millisecond, numbered(2, 1000))
	p.configure(10*time.Millisecond, s, false)
	p.push(10*time.Millisecond, numbered(3, 1000))
	want := []arrival{{0, 11 * time.Millisecond}, {3, 21 * time.Millisecond}}
	if got := drain(p); !slices.Equal(got, want) {
		t.Errorf("packets arrived %v, want %v", got, want)
	}
	if c := p.counters; c.Cut != 2 || c.Lost != 0 || c.Packets != 4 {
		t.Errorf("counters %+v, want 2 of 4 packets cut", c)
	}
}

func TestPathReordersAndDuplicates(t *testing.T) {
	const n, share = 20000, 0.05
	p := newPath(LinkSettings{RTT: 20 * time.Millisecond, Reorder: share, Duplicate: share, Seed: 3}, false, 0)
	for i := range n {
		p.push(time.Duration(i)*100*time.Microsecond, numbered(i, 100))
	}
	copies := map[uint32]int{}
	highest, late := uint32(0), 0
	for _, a := range drain(p) {
		copies[a.number]++
		sent := time.Duration(a.number) * 100 * time.Microsecond
		if delay := a.at - sent; delay < 10*time.Millisecond || delay > 10*time.Millisecond+maxHold {
			t.Fatalf("packet %d took %v", a.number, delay)
		}
		if a.number < highest {
			late++
		}
		highest = max(highest, a.number)
	}
	twice := 0
	for i := range uint32(n) {
		switch copies[i] {
		case 1:
		case 2:
			twice++
		default:
			t.Fatalf("packet %d arrived %d times", i, copies[i])
		}
	}
	tolerance := 5 * math.Sqrt(share*n)
	if math.Abs(float64(twice)-share*n) > tolerance || uint64(twice) != p.counters.Duplicated {
		t.Errorf("%d packets of %d came twice, the counter says %d", twice, n, p.counters.Duplicated)
	}
	// Of those that are held a few are so for less than the next packet takes.
	if held := p.counters.Reordered; math.Abs(float64(held)-share*n) > tolerance || late < int(held)*9/10 || late > int(held) {
		t.Errorf("%d packets of %d were overtaken, the counter says %d", late, n, held)
	}
}

func TestReorderingLosesTheSamePackets(t *testing.T) {
	lost := func(s LinkSettings) []bool {
		p := newPath(s, false, 0)
		arrived := make([]bool, 5000)
		for i := range arrived {
			p.push(time.Duration(i)*time.Millisecond, numbered(i, 100))
		}
		for _, a := range drain(p) {
			arrived[a.number] = true
		}
		return arrived
	}
	plain, mixed := LinkSettings{Loss: 0.1, Seed: 4}, LinkSettings{Loss: 0.1, Seed: 4, Reorder: 0.2, Duplicate: 0.1}
	if !slices.Equal(lost(plain), lost(mixed)) {
		t.Error("other packets are lost when some are reordered")
	}
}

func TestPathBlocks(t *testing.T) {
	p := newPath(LinkSettings{Block: []string{"udp"}}, false, 0)
	for _, packet := range samplePackets(t) {
		answer, ok := p.admit(packet.bytes)
		if want := packet.headers.protocol != unix.IPPROTO_UDP; ok != want || answer != nil {
			t.Errorf("%s: admitted %v, answered %x", packet.name, ok, answer)
		}
	}
	if p.counters.Blocked == 0 || p.counters.TooBig != 0 {
		t.Errorf("counters %+v", p.counters)
	}
	p.configure(0, LinkSettings{}, false)
	for _, packet := range samplePackets(t) {
		if _, ok := p.admit(packet.bytes); !ok {
			t.Errorf("%s: blocked though nothing is any more", packet.name)
		}
	}
}

func TestPathMTU(t *testing.T) {
	p := newPath(LinkSettings{MTU: 1280}, false, 0)
	for _, packet := range samplePackets(t) {
		fits := len(packet.bytes) <= 1280
		answer, ok := p.admit(packet.bytes)
		if ok != fits || (answer != nil) == fits {
			t.Errorf("%s of %d bytes: admitted %v, answer of %d bytes", packet.name, len(packet.bytes), ok, len(answer))
		}
	}
	if p.counters.TooBig == 0 || p.counters.Blocked != 0 {
		t.Errorf("counters %+v", p.counters)
	}
	p.configure(0, LinkSettings{MTU: 1280, NoICMP: true}, false)
	for _, packet := range samplePackets(t) {
		if answer, ok := p.admit(packet.bytes); ok != (len(packet.bytes) <= 1280) || answer != nil {
			t.Errorf("black hole, %s: admitted %v, answer %x", packet.name, ok, answer)
		}
	}
}

// losses runs a loss model and returns its share of losses and their mean run.
func losses(settings LinkSettings, n int) (share, run float64, pattern []bool) {
	m := newPath(settings, false, 0).loss
	lost, runs := 0, 0
	for i := range n {
		pattern = append(pattern, m.lose())
		if pattern[i] {
			lost++
			if i == 0 || !pattern[i-1] {
				runs++
			}
		}
	}
	return float64(lost) / float64(n), float64(lost) / float64(max(runs, 1)), pattern
}

func TestLossModel(t *testing.T) {
	const n = 1_000_000
	for _, c := range []struct{ loss, burst, run float64 }{
		{0, 0, 0},
		{0.001, 0, 1 / 0.999},
		{0.01, 0, 1 / 0.99},
		{0.3, 0, 1 / 0.7},
		{0, 10, 0},
		{0.01, 1, 1},
		{0.01, 8, 8},
		{0.01, 20, 20},
		{0.1, 20, 20},
		{0.5, 1, 1},
	} {
		share, run, _ := losses(LinkSettings{Loss: c.loss, Burst: c.burst, Seed: 3}, n)
		// Losses in bursts are fewer independent events.
		tolerance := 5 * math.Sqrt(c.loss/n*max(1, 2*c.burst))
		if math.Abs(share-c.loss) > tolerance {
			t.Errorf("loss %g in bursts of %g: lost %g, want within %.2g", c.loss, c.burst, share, tolerance)
		}
		if c.run > 0 && math.Abs(run-c.run)/c.run > 0.06 {
			t.Errorf("loss %g in bursts of %g: mean run %g, want %g", c.loss, c.burst, run, c.run)
		}
	}
}

func TestLossFollowsItsSeed(t *testing.T) {
	_, _, one := losses(LinkSettings{Loss: 0.1, Burst: 4, Seed: 1}, 10000)
	_, _, same := losses(LinkSettings{Loss: 0.1, Burst: 4, Seed: 1}, 10000)
	_, _, other := losses(LinkSettings{Loss: 0.1, Burst: 4, Seed: 2}, 10000)
	if !slices.Equal(one, same) {
		t.Error("the same seed lost other packets")
	}
	if slices.Equal(one, other) {
		t.Error("another seed lost the same packets")
	}
}

func TestLinkSettingsAreChecked(t *testing.T) {
	good := DefaultLink()
	if err := good.validate(DataCentres); err != nil {
		t.Errorf("default link: %v", err)
	}
	if err := (LinkSettings{}).validate(DataCentres); err != nil {
		t.Errorf("link without limits: %v", err)
	}
	for name, spoil := range map[string]func(*LinkSettings){
		"negative rate":      func(s *LinkSettings) { s.Rate = -1 },
		"negative rtt":       func(s *LinkSettings) { s.RTT = -1 },
		"long rtt":           func(s *LinkSettings) { s.RTT = maxRTT + 1 },
		"too much under way": func(s *LinkSettings) { s.Rate, s.RTT = 1e12, time.Minute },
		"loss of all":        func(s *LinkSettings) { s.Loss = 1 },
		"negative loss":      func(s *LinkSettings) { s.Loss = -0.1 },
		"loss not a number":  func(s *LinkSettings) { s.Loss = math.NaN() },
		"burst below one":    func(s *LinkSettings) { s.Burst = 0.5 },
		"burst not a number": func(s *LinkSettings) { s.Burst = math.NaN() },
		"too dense bursts":   func(s *LinkSettings) { s.Loss, s.Burst = 0.6, 1 },
		"tiny queue":         func(s *LinkSettings) { s.Queue = 100 },
		"huge queue":         func(s *LinkSettings) { s.Queue = 1 << 40 },
		"unknown site":       func(s *LinkSettings) { s.Cut = []string{Users} },
		"NAT nowhere":        func(s *LinkSettings) { s.NAT = []string{Users} },
		"all reordered":      func(s *LinkSettings) { s.Reorder = 1 },
		"reorder no number":  func(s *LinkSettings) { s.Reorder = math.NaN() },
		"negative duplicate": func(s *LinkSettings) { s.Duplicate = -0.1 },
		"tiny MTU":           func(s *LinkSettings) { s.MTU = 575 },
		"negative MTU":       func(s *LinkSettings) { s.MTU = -1 },
		"jumbo MTU":          func(s *LinkSettings) { s.MTU = 1501 },
		"odd protocol":       func(s *LinkSettings) { s.Block = []string{"udp", "icmp"} },
	} {
		s := DefaultLink()
		spoil(&s)
		if s.validate(DataCentres) == nil {
			t.Errorf("%s: no error for %+v", name, s)
		}
	}
	if q := (LinkSettings{Rate: 100e6, RTT: 50 * time.Millisecond}).DefaultQueue(); q != 625000 {
		t.Errorf("default queue %d, want the bandwidth-delay product 625000", q)
	}
	if q := (LinkSettings{Rate: 1e6, RTT: time.Millisecond}).DefaultQueue(); q != 65536 {
		t.Errorf("default queue %d, want 64 KiB", q)
	}
}
