package compress

import (
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Encoder encodes the blocks of one stream, as hard as link and CPU allow. Its
// methods may be called concurrently.
type Encoder struct {
	mu      sync.Mutex
	control control
	hurry   bool
	zstd    *zstd.Encoder // of level
	level   level
	since   time.Time // when window began
	window  window
}

// NewEncoder returns an encoder for a stream that may keep so many cores busy. A
// stream whose blocks are encoded and sent in turn should say how large a part
// of the time may go into encoding: the link has to wait for it.
func NewEncoder(cores float64) *Encoder {
	e := &Encoder{control: newControl(runtime.GOMAXPROCS(0), cores), since: time.Now()}
	e.choose()
	return e
}

// choose takes the encoder of the level that is due. e.mu must be held.
func (e *Encoder) choose() {
	due := e.control.level
	if e.hurry {
		due = min(due, normal)
	}
	if e.zstd == nil || due != e.level {
		e.level, e.zstd = due, due.encoder(e.control.cores)
	}
}

// Hurry, while on, has no block take longer than at zstd's default level: a guest
// is stopped, or about to be.
func (e *Encoder) Hurry(on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.hurry = on
	e.choose()
}

// Sent tells that the link took so long to take what was encoded.
func (e *Encoder) Sent(took time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.window.sending += took
	if e.window.elapsed = time.Since(e.since); e.window.elapsed >= period {
		e.control.follow(e.window)
		e.since, e.window = time.Now(), window{}
		e.choose()
	}
}

// Awaited tells that the link, which could have taken more, was kept waiting for
// so long by what was being encoded, or waited to be. It may be called before
// Sent.
func (e *Encoder) Awaited(took time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.window.awaited += max(took, 0)
}

// Encode appends the encoded form of src to dst and returns it with its method.
// A block that would not shrink by at least 1/32, or is larger than MaxSize, is
// appended as it is.
func (e *Encoder) Encode(dst, src []byte) ([]byte, Method) {
	if len(src) == 0 || len(src) > MaxSize {
		return append(dst, src...), Raw
	}
	e.mu.Lock()
	z := e.zstd
	e.mu.Unlock()
	begun := time.Now()
	start := len(dst)
	dst = slices.Grow(dst, len(src)+64) // zstd adds at most 3 bytes per 128 KiB and its header
	dst = z.EncodeAll(src, dst)
	e.mu.Lock()
	e.window.encoding += time.Since(begun)
	e.mu.Unlock()
	if len(dst)-start > len(src)-len(src)/32 {
		return append(dst[:start], src...), Raw
	}
	return dst, Zstd
}
