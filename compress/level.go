package compress

import (
	"sync"
	"time"
	"weak"

	"github.com/klauspost/compress/zstd"
)

// level is how hard zstd tries.
type level int

const (
	fastest level = iota
	normal
	better
	best
	levels
)

func (l level) String() string { return settings[l].zstd.String() }

// settings are chosen by BenchmarkImage: blocks of 1 MiB of a Debian system with
// a web server and a database, one core of a 2-core virtual machine, MB/s of
// input by CPU time, size of the output, and memory of an encoder:
//
//	          speed   size    memory
//	fastest     390   27.9 %   3 MB
//	default     230   26.7 %   4 MB
//	better      110   26.3 %   7 MB
//	best         21   24.9 %  38 MB
//
// None is not among them: QUIC takes about 400 MB/s from a core that does nothing
// else, and fastest makes the content of three times as much from that core. Nor is content
// that does not compress looked for beforehand: zstd gives up on noise after a look
// at each 128 KiB, at best as well 13 times faster than it compresses code.
var settings = [levels]struct {
	zstd zstd.EncoderLevel
	cost float64 // times the CPU of the level below
	most int     // encoders of all streams together, no more than half of the cores; 0 is one per core
}{
	fastest: {zstd.SpeedFastest, 1, 0},
	normal:  {zstd.SpeedDefault, 1.7, 0},
	better:  {zstd.SpeedBetterCompression, 2.1, 4},
	best:    {zstd.SpeedBestCompression, 5.2, 2},
}

// encoders is how many a process with so many cores has of a level. The guests
// need the CPU as well.
func (l level) encoders(cores int) int {
	if most := settings[l].most; most != 0 {
		return min(most, max(cores/2, 1))
	}
	return cores
}

// shared are the encoders of each level. They are made when a stream first needs
// them, and their memory is freed when no stream has them any more.
var shared struct {
	mu sync.Mutex
	of [levels]weak.Pointer[zstd.Encoder]
}

func (l level) encoder(cores int) *zstd.Encoder {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if e := shared.of[l].Value(); e != nil {
		return e
	}
	e := newEncoder(settings[l].zstd, l.encoders(cores))
	shared.of[l] = weak.Make(e)
	return e
}

func newEncoder(l zstd.EncoderLevel, most int) *zstd.Encoder {
	e, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(l),
		zstd.WithEncoderConcurrency(most),
		zstd.WithWindowSize(1<<20),
		zstd.WithSingleSegment(true), // states the content size also of the smallest blocks
		// Without it, content with a skewed alphabet and no matches (base64) is
		// sent raw. zstd gives up on noise after its first look either way.
		zstd.WithAllLitEntropyCompression(true),
		zstd.WithEncoderCRC(false))
	if err != nil {
		panic(err) // constant options
	}
	return e
}

// window is how a stream of blocks went for a while.
type window struct {
	elapsed  time.Duration
	encoding time.Duration // of all encoders together
	sending  time.Duration // that encoded blocks waited for the link to take them
	awaited  time.Duration // that the link waited for blocks to be encoded
}

const (
	// period is how long a window is, at least.
	period = 500 * time.Millisecond
	// firstRest is for how many windows a level is kept after one that took too
	// long. It doubles each time, so that a stream between two levels settles.
	firstRest = 8
	lastRest  = 128
)

// control chooses a stream's level. It has no clock.
//
//	fastest <──> default <──> better <──> best
//	   ──> the link is waited for, and the encoders have the time
//	   <── the encoders have no time left, or other work takes the CPU, and the
//	       link waits for them; above default also: the link is hardly used
type control struct {
	level level
	cores int     // of this machine
	room  float64 // of them, that the stream may keep busy
	rest  int     // windows until it may be stronger
	next  int     // rest after the next level that takes too long
}

func newControl(cores int, room float64) control {
	return control{level: normal, cores: cores, room: room, next: firstRest}
}

// may is how many encoders may be busy at a level.
func (c *control) may(l level) float64 { return min(c.room, float64(l.encoders(c.cores))) }

// follow takes what came of the level. Encoders that are busy while the link is as
// well are filling the queue to it. What a stronger level would take is known beforehand, so that
// it is not tried in vain: the CPU is the guests'.
func (c *control) follow(w window) {
	busy := w.encoding.Seconds() / w.elapsed.Seconds()
	link := w.sending.Seconds() / w.elapsed.Seconds()
	idle := w.awaited.Seconds() / w.elapsed.Seconds()
	c.rest = max(c.rest-1, 0)
	stronger := c.level + 1
	switch {
	case c.level > fastest && link < 0.9 && (busy >= 0.95*c.may(c.level) || idle >= 0.1):
		c.level--
		c.rest, c.next = c.next, min(2*c.next, lastRest)
	case c.level > normal && link < 0.1:
		c.level--
	case stronger < levels && c.rest == 0 && link >= 0.5 && busy*settings[stronger].cost <= 0.7*c.may(stronger):
		c.level = stronger
	}
}
