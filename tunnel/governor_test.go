package tunnel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// modelLink is a link with a queue, as fluids: a session that obeys its governor,
// and maybe another's flow.
type modelLink struct {
	rate, buffer float64 // bytes per second, bytes
	base         time.Duration
	jitter       time.Duration // that round trips seem longer by, at most
	carriers     float64       // what they manage, bytes per second; 0: all, with two bandwidth-delay products under way, as BBR
	source       float64       // bytes per second that there are to send; 0: always more
	window       float64       // of the other's flow, bytes; 0: there is none

	now       time.Duration
	governor  governor
	cap       int64
	queue     [2]float64 // bytes, the session's and the other's
	served    [2]float64
	delivered series // when served bytes are acknowledged
	trips     series
	acked     uint64
	noise     uint32
	samples   int
	full      int
}

const modelTick = 5 * time.Millisecond

// runModel goes on for a while and returns the shares of the link and the queues in round trips.
func (l *modelLink) run(d time.Duration) (use, other, mean, most float64) {
	from := l.served
	ticks := 0
	for end := l.now + d; l.now < end; ticks++ {
		q := l.tick()
		mean += q
		most = max(most, q)
	}
	all := l.rate * d.Seconds()
	return (l.served[0] - from[0]) / all, (l.served[1] - from[1]) / all, mean / float64(ticks), most
}

func (l *modelLink) tick() (queue float64) {
	dt := modelTick.Seconds()
	waiting := l.queue[0] + l.queue[1]
	trip := l.base + time.Duration(waiting/l.rate*1e9)

	send := 2 * l.rate * l.base.Seconds() / trip.Seconds()
	if l.carriers > 0 {
		send = min(send, l.carriers)
	}
	if l.cap > 0 {
		send = min(send, float64(l.cap))
	}
	busy := l.source == 0 || l.source > send
	if !busy {
		send = l.source
	}
	in := [2]float64{send * dt, l.window / trip.Seconds() * dt}
	if l.window > 0 {
		// CUBIC's plateau is left out: a segment per round trip and 0.7 after a loss.
		l.window += 4 * 1448 * dt / trip.Seconds()
	}
	room := l.buffer + l.rate*dt - waiting
	if sum := in[0] + in[1]; sum > room {
		in[0], in[1] = in[0]*room/sum, in[1]*room/sum
		l.window *= 0.7
	}
	l.queue[0] += in[0]
	l.queue[1] += in[1]
	waiting = l.queue[0] + l.queue[1]
	if waiting > 0 {
		part := min(1, l.rate*dt/waiting)
		for i := range l.queue {
			l.served[i] += l.queue[i] * part
			l.queue[i] -= l.queue[i] * part
		}
	}
	l.now += modelTick
	l.delivered.add(l.now, l.served[0], time.Minute)
	l.trips.add(l.now, float64(trip), time.Minute)
	if l.now%governorInterval == 0 {
		l.observe(busy)
	}
	return (l.queue[0] + l.queue[1]) / l.rate / l.base.Seconds()
}

func (l *modelLink) observe(busy bool) {
	then := l.now - l.base
	var s linkSample
	for _, v := range l.delivered {
		if v.at <= then {
			s.delivered = uint64(v.value)
		}
	}
	for _, v := range l.trips {
		if v.at <= then || s.rtt == 0 {
			s.rtt = time.Duration(v.value)
		}
	}
	l.noise = l.noise*1664525 + 1013904223
	s.rtt += time.Duration(float64(l.jitter) * float64(l.noise) / math.MaxUint32)
	s.minRTT = l.base
	s.busy = busy
	l.cap = l.governor.observe(l.now, s)
	l.samples++
	if l.governor.full() {
		l.full++
	}
}

// TestGovernor plays testdata/governor.txt.
func TestGovernor(t *testing.T) {
	script, err := os.ReadFile("testdata/governor.txt")
	if err != nil {
		t.Fatal(err)
	}
	var l *modelLink
	checks := 0
	for i, line := range strings.Split(string(script), "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		if err := l.play(&l, words, &checks); err != nil {
			t.Errorf("line %d: %s: %v", i+1, line, err)
		}
	}
	if checks < 30 {
		t.Errorf("only %d checks in the script", checks)
	}
}

func (l *modelLink) play(next **modelLink, words []string, checks *int) error {
	number := func(s string) float64 {
		n, err := strconv.ParseFloat(s, 64)
		if err != nil {
			panic(err)
		}
		return n
	}
	const mbit = 1e6 / 8
	switch words[0] {
	case "session":
		*next = &modelLink{governor: governor{polite: len(words) > 1}}
	case "link":
		base, err := time.ParseDuration(words[2])
		if err != nil {
			return err
		}
		l.rate, l.base = number(words[1])*mbit, base
		l.buffer = max(l.rate*base.Seconds(), 64<<10)
	case "jitter":
		d, err := time.ParseDuration(words[1])
		l.jitter = d
		return err
	case "carriers":
		l.carriers = number(words[1]) * mbit
	case "source":
		l.source = number(words[1]) * mbit
	case "other":
		l.window = number(words[1]) * l.rate * l.base.Seconds()
	default:
		d, err := time.ParseDuration(words[0])
		if err != nil {
			return err
		}
		l.samples, l.full = 0, 0
		use, other, mean, most := l.run(d)
		is := map[string]float64{"use": use, "other": other, "queue": mean, "worst": most, "cap": float64(l.cap) / mbit, "full": float64(l.full) / float64(l.samples)}
		for _, w := range words[1:] {
			*checks++
			name, bound, least := strings.Cut(w, ">")
			if !least {
				name, bound, _ = strings.Cut(w, "<")
			}
			v, known := is[name]
			if want := number(bound); !known || least != (v > want) {
				err = fmt.Errorf("use %.2f other %.2f queue %.2f worst %.2f, cap %.0f Mbit/s", use, other, mean, most, float64(l.cap)/mbit)
			}
		}
		return err
	}
	return nil
}

// A link that was away may come back as another one: nothing of it is remembered.
func TestGovernorAfterOutage(t *testing.T) {
	l := &modelLink{}
	if err := l.play(&l, []string{"link", "200", "100ms"}, new(int)); err != nil {
		t.Fatal(err)
	}
	l.run(10 * time.Second)
	if l.cap == 0 {
		t.Fatal("no limit after 10 s")
	}
	s := linkSample{delivered: uint64(l.served[0]), rtt: l.base, minRTT: l.base, busy: true}
	until := l.now + rateSpan + rateMemory + time.Second
	for ; l.now < until; l.now += governorInterval {
		l.cap = l.governor.observe(l.now, s)
	}
	if l.cap != 0 || l.governor.best != 0 {
		t.Errorf("limit %d and best %.0f after nothing was delivered for long", l.cap, l.governor.best)
	}
}

// Whatever carriers and peer say, the rate is none or one that goes on.
func TestGovernorSurvivesNonsense(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	odd := []uint64{0, 1, 1e3, 1e6, 1e9, 1e12, math.MaxInt64, math.MaxUint64}
	pick := func() uint64 {
		if random.IntN(2) == 0 {
			return odd[random.IntN(len(odd))]
		}
		return random.Uint64N(1e9)
	}
	for range 200 {
		g := governor{polite: random.IntN(2) == 0}
		now := time.Duration(0)
		for range 500 {
			now += time.Duration(random.Int64N(int64(300 * time.Millisecond)))
			s := linkSample{delivered: pick(), rtt: time.Duration(pick()), minRTT: time.Duration(pick()), busy: random.IntN(20) > 0}
			if rate := g.observe(now, s); rate != 0 && rate < minRate {
				t.Fatalf("%+v: rate %d", s, rate)
			}
		}
	}
}
