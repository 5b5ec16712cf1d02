package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mattn/go-runewidth"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/wanmig/wanmig/migrate"
)

// The widths of a bar; where not even the least fits there is none.
const (
	leastBar = 10
	mostBar  = 40
)

// style is what a terminal can show.
type style struct {
	unicode bool
	colour  bool
}

// styleOf judges a terminal by its environment.
func styleOf(env func(string) string) style {
	locale := env("LC_ALL")
	if locale == "" {
		locale = env("LC_CTYPE")
	}
	if locale == "" {
		locale = env("LANG")
	}
	locale = strings.ToLower(locale)
	return style{
		unicode: strings.Contains(locale, "utf-8") || strings.Contains(locale, "utf8"),
		colour:  env("NO_COLOR") == "",
	}
}

// canDraw reports whether bars can be drawn on f. A serial console may be a
// terminal without a size.
func canDraw(f *os.File) bool {
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width >= 20 && height >= 5 && os.Getenv("TERM") != "dumb"
}

// bars shows a move on a terminal: a headline, a bar for each disk and one for
// the memory. mpb redraws them in place, as one bar of several rows so that a
// frame shows one status.
type bars struct {
	out   *os.File
	style style
	now   func() time.Time

	mu     sync.Mutex // of status, which mpb's goroutine reads
	status migrate.Status

	progress *mpb.Progress // nil while nothing is drawn
	bar      *mpb.Bar
	paused   bool
}

func (b *bars) show(m migrate.Status) {
	b.mu.Lock()
	b.status = m
	b.mu.Unlock()
	if b.progress == nil && !b.paused {
		b.draw()
	}
}

func (b *bars) draw() {
	frame := func(width int) (string, []string) {
		b.mu.Lock()
		defer b.mu.Unlock()
		return drawFrame(b.status, width-1, b.style, b.now())
	}
	head := func(w io.Writer, s decor.Statistics) error {
		line, _ := frame(s.AvailableWidth)
		_, err := io.WriteString(w, line)
		return err
	}
	rows := func(w io.Writer, s decor.Statistics) error {
		_, lines := frame(s.AvailableWidth)
		for _, line := range lines {
			if _, err := fmt.Fprintln(w, line); err != nil {
				return err
			}
		}
		return nil
	}
	b.progress = mpb.New(mpb.WithOutput(b.out), mpb.WithRefreshRate(200*time.Millisecond))
	b.bar = b.progress.MustAdd(0, mpb.BarFillerFunc(head), mpb.BarFillerTrim(),
		mpb.BarExtender(mpb.BarFillerFunc(rows), false))
}

// say prints a line above the bars.
func (b *bars) say(message string) {
	if b.progress == nil {
		fmt.Fprintln(b.out, message)
		return
	}
	fmt.Fprintln(b.progress, message)
}

// close leaves the last frame on the terminal.
func (b *bars) close() {
	if b.progress != nil {
		b.bar.Abort(false)
		b.progress.Wait()
		b.progress = nil
	}
}

func (b *bars) pause() {
	b.paused = true
	b.close()
}

func (b *bars) resume() {
	b.paused = false
	b.draw()
}

// row is a line of a frame before it is laid out.
type row struct {
	name, amount, rate string
	facts              []string
	part, whole        int64 // of the bar
}

// drawFrame lays a move's progress out in lines of at most width columns.
func drawFrame(m migrate.Status, width int, st style, now time.Time) (head string, lines []string) {
	arrow, tail := "->", "~"
	if st.unicode {
		arrow, tail = "→", "…"
	}
	if m.Role == "destination" {
		head = join(" ", name(m.Peer), arrow, "here:", name(m.VM))
	} else {
		head = join(" ", name(m.VM), arrow, name(m.Peer))
	}
	away, waits := lost(m, now)
	head = fit(width, "  ", tail, head, state(m), clock(elapsed(m, now)), away, waits, left(m),
		unless(m.Link.Rate == 0 || away != "", "link "+rateOf(m.Link.Rate)), limited(m.Link), unless(away != "", roundTrip(m.Link)), unless(m.Link.Sent == 0, "sent "+size(int64(m.Link.Sent))))

	var rows []row
	for _, d := range m.Disks {
		rows = append(rows, row{
			name: runewidth.Truncate(printable(d.Target), 12, tail), amount: sizeOf(d.Done, d.Size), rate: unless(d.Rate == 0, rateOf(d.Rate)),
			facts: []string{unless(d.Pending == 0, size(d.Pending)+" pending"), unless(d.Spooled == 0, size(d.Spooled)+" spooled"), found(d)},
			part:  d.Done, whole: d.Size,
		})
	}
	if mem := m.Memory; mem.Size > 0 {
		rows = append(rows, row{
			name: "memory", amount: memoryLeft(mem), rate: unless(mem.Rate == 0, rateOf(mem.Rate)),
			facts: []string{memoryRound(mem), held(mem), dirtying(mem)},
			part:  mem.Size - mem.Remaining, whole: mem.Size,
		})
	}
	lines = layOut(rows, width, st, tail)
	if line := stalled(m.Memory); line != "" {
		lines = append(lines, runewidth.Truncate("  "+line, width, tail))
	}
	for _, d := range m.Disks {
		if d.Problem != "" {
			lines = append(lines, runewidth.Truncate("  "+printable(d.Target)+": "+oneLine(d.Problem), width, tail))
		}
	}
	return head, lines
}

// layOut aligns rows: name, bar, amount, rate, facts. As it gets narrow, facts
// go first, then the bar, then the rate. The columns have least widths so that
// the bars don't jump as digits come and go.
func layOut(rows []row, width int, st style, tail string) []string {
	const leastAmount, leastRate, roomForFacts = 15, 10, 40
	nameWidth, amountWidth, rateWidth := 0, leastAmount, leastRate
	for _, r := range rows {
		nameWidth = max(nameWidth, runewidth.StringWidth(r.name))
		amountWidth = max(amountWidth, len(r.amount))
		rateWidth = max(rateWidth, len(r.rate))
	}
	room := width - nameWidth - 2 - amountWidth - 2 - rateWidth
	barWidth := min(max(room-2-2-roomForFacts, leastBar), mostBar)
	if room < 2+barWidth {
		barWidth = 0
	} else {
		room -= 2 + barWidth
	}

	var lines []string
	for _, r := range rows {
		var line strings.Builder
		line.WriteString(runewidth.FillRight(r.name, nameWidth))
		if barWidth > 0 {
			line.WriteString("  " + drawBar(r.part, r.whole, barWidth, st))
		}
		fmt.Fprintf(&line, "  %-*s", amountWidth, r.amount)
		if room >= 0 {
			fmt.Fprintf(&line, "  %*s", rateWidth, r.rate)
		}
		if facts := fit(room-2, ", ", "", r.facts...); facts != "" {
			line.WriteString("  " + facts)
		}
		text := strings.TrimRight(line.String(), " ")
		if barWidth == 0 {
			text = runewidth.Truncate(text, width, tail)
		}
		lines = append(lines, text)
	}
	return lines
}

func drawBar(part, whole int64, width int, st style) string {
	bar := mpb.BarStyle()
	if st.unicode {
		bar = bar.Lbound("").Rbound("").Filler("█").Tip("█").Padding("░")
	}
	if st.colour {
		cyan := func(s string) string { return "\x1b[36m" + s + "\x1b[0m" }
		bar = bar.FillerMeta(cyan).TipMeta(cyan)
	}
	var out strings.Builder
	part = min(max(part, 0), whole)
	// A strings.Builder doesn't fail.
	_ = bar.Build().Fill(&out, decor.Statistics{AvailableWidth: width, Total: whole, Current: part})
	return out.String()
}

// fit joins the facts that are there and fit into width, most important first.
// Where not even the first fits, it is cut and ends in tail; without a tail
// nothing is left.
func fit(width int, separator, tail string, facts ...string) string {
	line := ""
	for _, f := range facts {
		longer := join(separator, line, f)
		if runewidth.StringWidth(longer) > width {
			if line == "" && tail != "" {
				return runewidth.Truncate(f, width, tail)
			}
			break
		}
		line = longer
	}
	return line
}
