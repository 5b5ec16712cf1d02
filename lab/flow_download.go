package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// DownloadOptions say what to download and how fast.
type DownloadOptions struct {
	MiB   int64 // size of the file
	Limit int64 // bytes per second, read slowly so that the sender has to wait; 0 reads what comes
}

// Download is an HTTP download of the guest's file, compared byte by byte with what the guest must send.
type Download struct {
	conn net.Conn
	stop context.CancelFunc
	done chan struct{}

	result DownloadResult // valid when done is closed
}

// DownloadResult is what a Download saw. With a limit, the socket's buffer hides a gap of up to a quarter of a second.
type DownloadResult struct {
	Size       int64         `json:"size"` // of the file, bytes
	Bytes      int64         `json:"bytes"`
	Wrong      int64         `json:"wrong_bytes"`
	FirstWrong int64         `json:"first_wrong"` // offset, if any is wrong
	Elapsed    time.Duration `json:"elapsed_ns"`
	LongestGap Silence       `json:"longest_gap"` // without a byte
	Broken     string        `json:"broken,omitempty"`
	Resets     int           `json:"resets"` // of the connection: 0 or 1
}

// Complete says whether all bytes came before Stop.
func (r DownloadResult) Complete() bool { return r.Bytes == r.Size && r.Broken == "" }

// Rate is in bytes per second.
func (r DownloadResult) Rate() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Bytes) / r.Elapsed.Seconds()
}

// Err is nil if all that came until Stop was right. A whole file must have the checksum that the guest sends after it, too.
func (r DownloadResult) Err() error {
	switch {
	case r.Wrong != 0:
		return fmt.Errorf("%d of %d bytes are wrong, the first at %d", r.Wrong, r.Bytes, r.FirstWrong)
	case r.Broken != "":
		return fmt.Errorf("broke after %d of %d bytes: %s", r.Bytes, r.Size, r.Broken)
	}
	return nil
}

func (r DownloadResult) String() string {
	const mib = 1 << 20
	end := describeBroken(r.Broken)
	if r.Broken == "" && !r.Complete() {
		end = ", stopped"
	}
	return fmt.Sprintf("%.1f of %d MiB at %.1f MiB/s, %d bytes wrong, %d resets%s; %v",
		float64(r.Bytes)/mib, r.Size/mib, r.Rate()/mib, r.Wrong, r.Resets, end, r.LongestGap)
}

// StartDownload begins to download the guest's file from one of its addresses to a client inside a site.
func (v *VM) StartDownload(ctx context.Context, site string, to netip.Addr, o DownloadOptions) (*Download, error) {
	if o.MiB < 1 || o.MiB > api.MaxFileMiB {
		return nil, fmt.Errorf("download of %d MiB: want 1 to %d", o.MiB, api.MaxFileMiB)
	}
	if o.Limit < 0 || o.Limit > 0 && o.Limit < minLimit {
		return nil, fmt.Errorf("download at %d bytes/s: want %d or more", o.Limit, minLimit)
	}
	conn, err := v.dial(ctx, site, "tcp", to, api.HTTPPort)
	if err != nil {
		return nil, fmt.Errorf("download from VM %q: %w", v.Name, err)
	}
	if o.Limit > 0 {
		if err := conn.(*net.TCPConn).SetReadBuffer(int(min(max(o.Limit/8, minBuffer), maxBuffer))); err != nil {
			conn.Close()
			return nil, fmt.Errorf("download from VM %q: receive buffer: %w", v.Name, err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	d := &Download{conn: conn, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		d.result = download(ctx, conn, newFileChecker(v.seed(), o.MiB<<20), o.Limit)
	}()
	return d, nil
}

// Done is closed when the file is complete, the download broke or was stopped.
func (d *Download) Done() <-chan struct{} { return d.done }

// Stop ends the download, complete or not.
func (d *Download) Stop() DownloadResult {
	d.stop()
	<-d.done
	d.conn.Close()
	return d.result
}

const (
	minLimit = 4 << 10
	// A slow reader's receive buffer is asked to hold an eighth of a second, and the kernel doubles that: less, and a long
	// round trip would slow it down further; more, and a gap would not be seen.
	minBuffer = 16 << 10
	maxBuffer = 4 << 20
)

// download reads the file until its end, an error, or the end of ctx, which is none unless nothing came any more.
func download(ctx context.Context, conn net.Conn, file *fileChecker, limit int64) (result DownloadResult) {
	began := time.Now()
	gaps := silenceMeter{began: began}
	defer func() {
		result.Size, result.Bytes, result.Wrong, result.FirstWrong = file.size, file.at, file.wrong, file.firstWrong
		result.Elapsed = time.Since(began)
		result.LongestGap = gaps.longest
	}()
	broke := func(err error) DownloadResult {
		now := time.Now()
		gaps.lost(now)
		switch silent := now.Sub(gaps.lastHeard()); {
		case ctx.Err() == nil:
			result.Broken, result.Resets = err.Error(), countReset(err)
		case silent > maxUnanswered:
			result.Broken = fmt.Sprintf("nothing came in the last %v", silent.Round(time.Millisecond))
		}
		return result
	}

	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	request, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("http://guest/file?mib=%d", file.size>>20), nil)
	if err != nil {
		return broke(err)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return broke(err)
	}
	defer response.Body.Close()
	gaps.heard(time.Now())
	if response.StatusCode != http.StatusOK {
		return broke(fmt.Errorf("the guest answers %s", response.Status))
	}

	chunk, pace := int64(api.BlockSize), rate.Inf
	if limit > 0 {
		chunk, pace = min(chunk, max(limit/100, minLimit/100)), rate.Limit(limit)
	}
	limiter := rate.NewLimiter(pace, int(chunk))
	buffer := make([]byte, chunk)
	for {
		n, err := response.Body.Read(buffer)
		file.check(buffer[:n])
		if err != nil && !errors.Is(err, io.EOF) {
			return broke(err) // bytes beside the error came before it
		}
		gaps.heard(time.Now())
		if err != nil || file.at > file.size {
			break
		}
		if err := limiter.WaitN(ctx, n); err != nil {
			return broke(err)
		}
	}
	if file.at != file.size {
		return broke(errors.New("the guest's file has another size"))
	}
	sum := response.Trailer.Get(api.ChecksumTrailer)
	if got := fmt.Sprintf("%08x", file.crc.Sum32()); got != sum {
		return broke(fmt.Errorf("the file has the CRC-32C %s, the guest sends %q", got, sum))
	}
	return result
}

// fileChecker compares what comes with the guest's file.
type fileChecker struct {
	seed       uint64
	size       int64
	at         int64 // bytes checked
	wrong      int64
	firstWrong int64
	crc        hash.Hash32
	block      []byte // of the file, the one that at is in
}

func newFileChecker(seed uint64, size int64) *fileChecker {
	return &fileChecker{seed: seed, size: size, crc: crc32.New(castagnoli), block: make([]byte, api.BlockSize)}
}

// check compares the next bytes of the file.
func (f *fileChecker) check(p []byte) {
	f.crc.Write(p)
	for len(p) > 0 {
		offset := f.at % api.BlockSize
		if offset == 0 {
			api.Cell{Kind: api.FileCell, Index: uint64(f.at / api.BlockSize), Seed: f.seed}.Fill(api.Words(f.block))
		}
		want := f.block[offset:]
		n := min(len(p), len(want))
		if !bytes.Equal(p[:n], want[:n]) {
			f.compare(p[:n], want)
		}
		f.at += int64(n)
		p = p[n:]
	}
}

func (f *fileChecker) compare(got, want []byte) {
	for i := range got {
		if got[i] == want[i] {
			continue
		}
		if f.wrong == 0 {
			f.firstWrong = f.at + int64(i)
		}
		f.wrong++
	}
}
