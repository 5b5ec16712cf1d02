package tunnel

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// modelStripes are a session's carriers, that each manage so much.
type modelStripes struct {
	link, quic, tcp float64 // bytes per second: the governor's, and what a carrier of each transport manages
	limit           float64 // what all manage together
	idle            bool
	barred, failed  [2]bool
	trip            time.Duration

	now       time.Duration
	striping  striping
	have      [2]int
	delivered [2]float64
	steps     int // carriers that came or went
	most      int
}

func (m *modelStripes) run(d time.Duration) {
	const tick = 100 * time.Millisecond
	for end := m.now + d; m.now < end; m.now += tick {
		rates := [2]float64{m.quic * float64(m.have[0]), m.tcp * float64(m.have[1])}
		sum := rates[0] + rates[1]
		goodput := min(sum, m.link)
		if m.limit > 0 {
			goodput = min(goodput, m.limit)
		}
		capped := goodput == m.link
		for i := range rates {
			if sum > goodput {
				rates[i] *= goodput / sum
			}
			m.delivered[i] += rates[i] * tick.Seconds()
		}
		action := m.striping.observe(m.now, stripeSample{
			quic: stripeCarriers{m.have[0], uint64(m.delivered[0]), m.failed[0] || m.barred[0]},
			tcp:  stripeCarriers{m.have[1], uint64(m.delivered[1]), m.failed[1] || m.barred[1]},
			busy: !m.idle, capped: capped, rtt: m.trip,
		})
		switch action {
		case addQUIC:
			m.add(0)
		case addTCP:
			m.add(1)
		case dropQUIC:
			m.have[0]--
		case dropTCP:
			m.have[1]--
		}
		if action != stripeNothing {
			m.steps++
		}
		m.most = max(m.most, m.have[0]+m.have[1])
	}
}

func (m *modelStripes) add(transport int) {
	if !m.failed[transport] {
		m.have[transport]++
	}
}

// TestStriping plays testdata/striping.txt.
func TestStriping(t *testing.T) {
	script, err := os.ReadFile("testdata/striping.txt")
	if err != nil {
		t.Fatal(err)
	}
	var m *modelStripes
	checks := 0
	for i, line := range strings.Split(string(script), "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		if err := play(&m, words); err != nil {
			t.Errorf("line %d: %s: %v", i+1, line, err)
		}
		if m.have[0] < 0 || m.have[1] < 0 || m.most > maxCarriers {
			t.Fatalf("line %d: %d carriers, of %d at most", i+1, m.have, m.most)
		}
		if len(words) == 4 {
			checks++
		}
	}
	if checks < 20 {
		t.Errorf("only %d checks in the script", checks)
	}
}

func play(next **modelStripes, words []string) error {
	m := *next
	numbers := make([]float64, len(words))
	for i, w := range words {
		numbers[i], _ = strconv.ParseFloat(w, 64)
	}
	const mbit = 1e6 / 8
	switch words[0] {
	case "session":
		m = &modelStripes{trip: 100 * time.Millisecond, barred: [2]bool{words[1] == "tcp", words[1] == "quic"}}
		m.have = [2]int{int(numbers[2]), int(numbers[3])}
		*next = m
	case "link":
		m.link, m.quic, m.tcp = numbers[1]*mbit, numbers[2]*mbit, numbers[3]*mbit
	case "fails":
		m.failed = [2]bool{strings.Contains(words[1], "quic"), strings.Contains(words[1], "tcp")}
	case "limit":
		m.limit = numbers[1] * mbit
	case "idle":
		m.idle = words[1] == "yes"
	case "lose":
		m.have[0] -= int(numbers[1])
		m.have[1] -= int(numbers[2])
	default:
		d, err := time.ParseDuration(words[0])
		if err != nil {
			return err
		}
		m.steps = 0
		m.run(d)
		if want := [2]int{int(numbers[1]), int(numbers[2])}; m.have != want || m.steps != int(numbers[3]) {
			return fmt.Errorf("has %d after %d steps", m.have, m.steps)
		}
	}
	return nil
}
