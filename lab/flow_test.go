package lab

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

var flowStart = time.Unix(1000, 0)

// at is a moment of a flow, in milliseconds from its start.
func at(ms int) time.Time { return flowStart.Add(time.Duration(ms) * time.Millisecond) }

func wantSilence(t *testing.T, got Silence, from, ms int) {
	t.Helper()
	if want := (Silence{Length: time.Duration(ms) * time.Millisecond, Start: at(from)}); got != want {
		t.Errorf("longest gap %+v, want %+v", got, want)
	}
}

func TestSilenceMeter(t *testing.T) {
	m := silenceMeter{began: flowStart}
	m.heard(at(80)) // the way to the first answer is no gap
	if m.longest != (Silence{}) {
		t.Errorf("a gap of %+v before the first answer", m.longest)
	}
	for _, ms := range []int{90, 100, 130, 140, 170} {
		m.heard(at(ms))
	}
	wantSilence(t, m.longest, 100, 30) // the first of two that are as long
	m.lost(at(190))
	wantSilence(t, m.longest, 100, 30)
	m.lost(at(270))
	wantSilence(t, m.longest, 170, 100)

	never := silenceMeter{began: flowStart}
	never.lost(at(500))
	wantSilence(t, never.longest, 0, 500)
}

// answered is the guest's answer to a question.
func answered(q api.EchoRecord, breaks uint32) api.EchoRecord {
	q.Count, q.Breaks = q.Sequence, breaks
	return q
}

func TestStreamMeter(t *testing.T) {
	m := newStreamMeter(flowStart)
	var questions []api.EchoRecord
	for i := range 4 {
		questions = append(questions, m.question(at(10*i)))
	}
	for i, ms := range []int{5, 15, 325, 326} {
		m.answer(answered(questions[i], 0), at(ms))
	}
	want := StreamResult{Sent: 4, Answered: 4, LongestAge: 305 * time.Millisecond, LongestGap: Silence{310 * time.Millisecond, at(15)}}
	if got := m.total(); got != want || got.Err() != nil {
		t.Errorf("%+v, %v, want %+v", got, got.Err(), want)
	}
}

func TestStreamMeterFindsBreaks(t *testing.T) {
	for name, change := range map[string]func(a []api.EchoRecord) []api.EchoRecord{
		"an answer is missing":     func(a []api.EchoRecord) []api.EchoRecord { return append(a[:1], a[2:]...) },
		"an answer comes twice":    func(a []api.EchoRecord) []api.EchoRecord { return append(a, a[2]) },
		"the last answer is early": func(a []api.EchoRecord) []api.EchoRecord { return []api.EchoRecord{a[0], a[2], a[1]} },
		"the guest saw a break":    func(a []api.EchoRecord) []api.EchoRecord { a[2].Breaks = 1; return a },
		"an answer to no question": func(a []api.EchoRecord) []api.EchoRecord {
			return append(a, api.EchoRecord{Sequence: 4, Count: 4, Stamp: 1 << 63})
		},
	} {
		m := newStreamMeter(flowStart)
		var answers []api.EchoRecord
		for range 3 {
			answers = append(answers, answered(m.question(at(0)), 0))
		}
		for _, a := range change(answers) {
			m.answer(a, at(10))
		}
		r := m.total()
		if r.Breaks == 0 || r.Err() == nil {
			t.Errorf("%s: %+v, %v", name, r, r.Err())
		}
		if r.LongestAge != 10*time.Millisecond {
			t.Errorf("%s: an answer of age %v", name, r.LongestAge)
		}
	}
}

func TestStreamMeterTellsHowItBroke(t *testing.T) {
	m := newStreamMeter(flowStart)
	m.answer(answered(m.question(at(0)), 0), at(5))
	m.question(at(10))
	m.broke(&net.OpError{Op: "read", Err: unix.ECONNRESET}, at(1005))
	r := m.total()
	if r.Resets != 1 || r.Err() == nil || !strings.Contains(r.Err().Error(), "1 of 2 records answered: read: connection reset by peer") {
		t.Errorf("%+v: %v", r, r.Err())
	}
	wantSilence(t, r.LongestGap, 5, 1000)
	if text := r.String(); !strings.Contains(text, "1 resets, BROKEN: read: connection reset by peer; longest gap 1000 ms") {
		t.Errorf("described as %q", text)
	}
}

func TestUDPMeter(t *testing.T) {
	m := newUDPMeter(flowStart)
	var a []api.EchoRecord
	for i := range 200 { // several words of numbers
		a = append(a, answered(m.question(at(10*i)), 0))
	}
	order := append(append([]api.EchoRecord{a[1], a[0], a[2], a[2]}, a[3:60]...), a[70:]...)
	for i, r := range order {
		m.answer(r, at(2000+i))
	}
	want := UDPResult{
		Sent: 200, Answered: 190, Lost: 10, Duplicated: 1, Reordered: 1,
		LongestAge: 2001 * time.Millisecond, LongestGap: Silence{time.Millisecond, at(2000)},
	}
	if got := m.total(at(2500)); got != want || got.Err() != nil {
		t.Errorf("%+v, %v, want %+v", got, got.Err(), want)
	}
	for _, r := range []api.EchoRecord{{}, {Sequence: 201}, {Sequence: 1 << 63}, {Sequence: 1, Stamp: 1 << 63}} {
		m := newUDPMeter(flowStart)
		for range 200 {
			m.question(at(0))
		}
		m.answer(r, at(1))
		if got := m.total(at(1)); got.Wrong != 1 || got.Answered != 0 || got.Err() == nil {
			t.Errorf("answer %+v: %+v", r, got)
		}
	}
}

func TestUDPMeterTellsOfSilence(t *testing.T) {
	m := newUDPMeter(flowStart)
	m.answer(answered(m.question(at(0)), 0), at(1))
	m.question(at(10))
	if r := m.total(at(1001)); r.Unanswered != 0 || r.Err() != nil {
		t.Errorf("after a second: %+v, %v", r, r.Err())
	}
	r := m.total(at(1101))
	if r.Unanswered != 1100*time.Millisecond || r.Err() == nil {
		t.Errorf("after more than a second: %+v, %v", r, r.Err())
	}
	wantSilence(t, r.LongestGap, 1, 1100)
	never := newUDPMeter(flowStart)
	never.question(at(0))
	if r := never.total(at(20)); r.Err() == nil || r.Lost != 1 {
		t.Errorf("without any answer: %+v, %v", r, r.Err())
	}
}

// guestFile is what a guest of the seed sends.
func guestFile(seed uint64, mib int64) []byte {
	b := make([]byte, mib<<20)
	for i := int64(0); i < int64(len(b)); i += api.BlockSize {
		api.Cell{Kind: api.FileCell, Index: uint64(i / api.BlockSize), Seed: seed}.Fill(api.Words(b[i:][:api.BlockSize]))
	}
	return b
}

func TestFileChecker(t *testing.T) {
	file := guestFile(7, 1)
	for _, test := range []struct {
		name         string
		change       func(b []byte) []byte
		wrong, first int64
	}{
		{"right", func(b []byte) []byte { return b }, 0, 0},
		{"two bytes", func(b []byte) []byte { b[70000] ^= 1; b[999999] ^= 0x80; return b }, 2, 70000},
		{"the last byte", func(b []byte) []byte { b[len(b)-1]++; return b }, 1, int64(len(file) - 1)},
	} {
		got := test.change(bytes.Clone(file))
		for _, size := range []int{1000, 65536, 65537, len(got)} {
			f := newFileChecker(7, int64(len(file)))
			for rest := got; len(rest) > 0; rest = rest[min(size, len(rest)):] {
				f.check(rest[:min(size, len(rest))])
			}
			if f.wrong != test.wrong || f.firstWrong != test.first || f.at != int64(len(file)) || f.crc.Sum32() != crc32.Checksum(got, castagnoli) {
				t.Errorf("%s in pieces of %d: %d wrong of %d, the first at %d; want %d, the first at %d",
					test.name, size, f.wrong, f.at, f.firstWrong, test.wrong, test.first)
			}
		}
	}
	// A byte that is missing shifts all that follow.
	f := newFileChecker(7, int64(len(file)))
	f.check(append(bytes.Clone(file[:100]), file[101:]...))
	if f.wrong < int64(len(file))/2 || f.firstWrong < 100 {
		t.Errorf("a byte is missing at 100, and %d are wrong from %d on", f.wrong, f.firstWrong)
	}
	other := newFileChecker(8, int64(len(file)))
	other.check(file)
	if other.wrong == 0 {
		t.Error("a file of another guest is right")
	}
}

// serveOnce answers one connection with a response and closes it.
func serveOnce(t *testing.T, response []byte) net.Conn {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer server.Close()
		if _, err := server.Read(make([]byte, 4096)); err == nil {
			// The client may have had enough.
			_, _ = server.Write(response)
		}
	}()
	t.Cleanup(func() { client.Close(); <-done })
	return client
}

// chunked is a body in two chunks, with a checksum after it.
func chunked(body []byte, sum string) string {
	half := len(body) / 2
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: %s\r\n\r\n%x\r\n%s\r\n%x\r\n%s\r\n0\r\n%s: %s\r\n\r\n",
		api.ChecksumTrailer, half, body[:half], len(body)-half, body[half:], api.ChecksumTrailer, sum)
}

func checksum(b []byte) string { return fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli)) }

func TestDownloadComparesEverything(t *testing.T) {
	file := guestFile(7, 1)
	sum := checksum(file)
	damaged := bytes.Clone(file)
	damaged[12345] ^= 4
	whole := chunked(file, sum)
	for _, test := range []struct {
		name, response string
		want           string // in the error
	}{
		{"right", whole, ""},
		{"a byte is wrong", chunked(damaged, sum), "1 of 1048576 bytes are wrong, the first at 12345"},
		{"a byte is wrong for the guest, too", chunked(damaged, checksum(damaged)), "1 of 1048576 bytes are wrong, the first at 12345"},
		{"the checksum is wrong", chunked(file, "00000000"), `the guest sends "00000000"`},
		{"there is no checksum", "HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n" + string(file), `the guest sends ""`},
		{"it ends in the first half", whole[:70000], "unexpected EOF"},
		{"it ends in the second half", whole[:600000], "unexpected EOF"},
		{"it ends before the checksum", whole[:len(whole)-20], "broke after 1048576 of 1048576 bytes"},
		{"it is too short", chunked(file[:65536], checksum(file[:65536])), "broke after 65536 of 1048576 bytes: the guest's file has another size"},
		{"it is too long", chunked(append(bytes.Clone(file), 1), sum), "bytes are wrong, the first at 1048576"},
		{"nothing comes", "", "broke after 0 of 1048576 bytes"},
		{"refused", "HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nhello", "400 Bad Request"},
		{"not HTTP", "SSH-2.0", "broke after 0"},
	} {
		r := download(t.Context(), serveOnce(t, []byte(test.response)), newFileChecker(7, 1<<20), 0)
		err := r.Err()
		if test.want == "" && (err != nil || !r.Complete()) || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || r.Complete() && r.Wrong == 0) {
			t.Errorf("%s: %+v, %v; want %q", test.name, r, err, test.want)
		}
	}
}

func TestDownloadKeepsItsLimit(t *testing.T) {
	file := guestFile(7, 1)
	r := download(t.Context(), serveOnce(t, []byte(chunked(file, checksum(file)))), newFileChecker(7, 1<<20), 4<<20)
	if r.Err() != nil || !r.Complete() || r.Rate() > 4.4*(1<<20) {
		t.Errorf("%v, %v", r, r.Err())
	}
}

func TestSSHMeter(t *testing.T) {
	const sent = 3
	for text, want := range map[string]SSHResult{
		"line 1\necho 1\nline 2\nline 3\necho 2\necho 3": {Lines: 3, Echoed: 3},
		"line 1\nline 3":           {Lines: 2, Breaks: 1},
		"line 2":                   {Lines: 1, Breaks: 1},
		"echo 2\necho 1":           {Echoed: 2, Breaks: 2},
		"echo 1\necho 1":           {Echoed: 2, Breaks: 1},
		"line 1\necho 1\necho 4":   {Lines: 1, Echoed: 1, Breaks: 1}, // never sent
		"line 1\nline\nhello\n\nx": {Lines: 1, Breaks: 4},
	} {
		m := sshMeter{gaps: silenceMeter{began: flowStart}, result: SSHResult{Sent: sent}}
		for i, line := range strings.Split(text, "\n") {
			m.line(line, at(100*i))
		}
		want.Sent = sent
		got := m.total()
		got.LongestGap = Silence{}
		if got != want || (got.Err() == nil) != (want.Breaks == 0) {
			t.Errorf("%q: %+v, %v; want %+v", text, got, got.Err(), want)
		}
	}
}

func FuzzSSHLine(f *testing.F) {
	for _, seed := range []string{"line 1", "echo 1", "echo 99", "line -1", "line +1", "line 9223372036854775808", "", " "} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m := sshMeter{result: SSHResult{Sent: 1}}
		m.line(text, flowStart)
		r := m.total()
		if right := text == "line 1" || text == "echo 1"; right != (r.Err() == nil) {
			t.Errorf("%q: %+v", text, r)
		}
	})
}

func TestFirstBytesAreBounded(t *testing.T) {
	var b firstBytes
	for range 100 {
		if n, err := b.Write([]byte("Permission denied\r\n")); n != 19 || err != nil {
			t.Fatalf("wrote %d, %v", n, err)
		}
	}
	if got := b.String(); len(got) > 1024 || !strings.HasPrefix(got, "Permission denied Permission denied") {
		t.Errorf("kept %q", got)
	}
}

func TestFlowsRefuseWhatCannotBe(t *testing.T) {
	v := &VM{Name: "web", lab: newLab(t.TempDir())}
	to := netip.MustParseAddr("10.10.0.10")
	start := map[string]func() error{
		"interval 0s": func() error { _, err := v.StartStream(t.Context(), Users, to, 0); return err },
		"interval 1h": func() error { _, err := v.StartUDP(t.Context(), Users, to, time.Hour); return err },
		"0 MiB":       func() error { _, err := v.StartDownload(t.Context(), Users, to, DownloadOptions{}); return err },
		"1025 MiB": func() error {
			_, err := v.StartDownload(t.Context(), Users, to, DownloadOptions{MiB: 1025})
			return err
		},
		"1 bytes/s": func() error {
			_, err := v.StartDownload(t.Context(), Users, to, DownloadOptions{MiB: 1, Limit: 1})
			return err
		},
		"wanlab vm --ssh": func() error { _, err := v.StartSSH(t.Context(), Users, to); return err },
		"no site":         func() error { _, err := v.StartStream(t.Context(), "paris", to, time.Second); return err },
		"no address":      func() error { _, err := v.StartStream(t.Context(), Users, netip.Addr{}, time.Second); return err },
		"does not run":    func() error { _, err := v.StartStream(t.Context(), Users, to, time.Second); return err },
	}
	for want, f := range start {
		if err := f(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
