package main

import (
	"bufio"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// disk writes numbered blocks round and round a file on one file system, and verifies them, and the files that were on
// the disk from the start, past the page cache.
type disk struct {
	root   string
	seed   uint64
	ring   *os.File // buffered, for writing
	direct *os.File // O_DIRECT, for reading back
	write  []byte   // a block; only the writer's
	slots  int64

	mu       sync.Mutex // held for the fields below and for each block written or read
	read     []byte     // a block, aligned for O_DIRECT
	sequence int64      // of the last block written; the first is 1
	acked    int64      // all blocks up to this one were confirmed by fsync
	cursor   int64
	bad      map[int64]bool // sequence numbers already counted as errors
	badFile  map[string]bool

	// What is reported has a lock that no input or output is done under, so that a disk that hangs can be reported.
	told   sync.Mutex
	counts api.DiskReport
	faults faults
	busy   map[string]time.Duration // kinds of input and output under way, and when they began
}

const (
	ringName    = ".wanlab-ring"
	maxRing     = 64 << 20
	readChunk   = 1 << 20
	maxManifest = 16 << 20
)

func newDisk(device string, bytes int64) *disk {
	return &disk{
		bad:     make(map[int64]bool),
		badFile: make(map[string]bool),
		counts:  api.DiskReport{Device: device, Bytes: bytes},
		busy:    make(map[string]time.Duration),
	}
}

// openDisk makes the ring of a disk mounted at root: an eighth of its size, at most 64 MiB.
func openDisk(device, root string, bytes int64, seed uint64) (*disk, error) {
	d := newDisk(device, bytes)
	d.root, d.seed = root, seed
	d.slots = max(min(bytes/8, maxRing)/api.BlockSize, 2)
	path := filepath.Join(root, ringName)
	var err error
	if d.counts.Found, err = d.survey(path); err != nil {
		return nil, err
	}
	if d.ring, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Fallocate(int(d.ring.Fd()), 0, 0, d.slots*api.BlockSize); err != nil {
		return nil, fmt.Errorf("allocate %s: %w", path, err)
	}
	if d.direct, err = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0); err != nil {
		return nil, err
	}
	if d.read, err = aligned(readChunk); err != nil {
		return nil, err
	}
	d.write = make([]byte, api.BlockSize)
	lines, err := d.manifest()
	if err != nil {
		return nil, err
	}
	d.counts.Files = int64(len(lines))
	return d, nil
}

// survey tells how far a ring that an earlier boot left is whole: every block up to
// that number is there that has not been overwritten by a later one.
func (d *disk) survey(path string) (found int64, err error) {
	ring, err := os.ReadFile(path)
	if os.IsNotExist(err) || err == nil && int64(len(ring)) != d.slots*api.BlockSize {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	found = math.MaxInt64
	for slot := range d.slots {
		missing := slot + 1 // the first number that this slot does not have
		w := api.Words(ring[slot*api.BlockSize:][:api.BlockSize])
		if n := int64(w[2]); n > 0 && (n-1)%d.slots == slot && d.cell(n).Matches(w) {
			missing = n + d.slots
		}
		found = min(found, missing-1)
	}
	return found, nil
}

// aligned returns memory that O_DIRECT takes.
func aligned(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("allocate a buffer: %w", err)
	}
	return b, nil
}

func (d *disk) cell(sequence int64) api.Cell {
	return api.Cell{Kind: api.BlockCell, Index: uint64((sequence - 1) % d.slots), Generation: uint64(sequence), Seed: d.seed}
}

// put writes the next n blocks and confirms them with one fsync.
func (d *disk) put(n int64) error {
	for range n {
		d.mu.Lock()
		c := d.cell(d.sequence + 1)
		c.Fill(api.Words(d.write))
		done := d.begin("write")
		_, err := d.ring.WriteAt(d.write, int64(c.Index)*api.BlockSize)
		done()
		if err == nil {
			d.sequence++
			d.tell(func(r *api.DiskReport) { r.WrittenBlocks++ })
		}
		d.mu.Unlock()
		if err != nil {
			return fmt.Errorf("write block %d: %w", c.Generation, err)
		}
	}
	d.mu.Lock()
	upTo := d.sequence
	d.mu.Unlock()
	done := d.begin("fsync")
	err := d.ring.Sync()
	done()
	if err != nil {
		return fmt.Errorf("fsync: %w", err)
	}
	d.mu.Lock()
	d.acked = max(d.acked, upTo)
	d.tell(func(r *api.DiskReport) { r.Acknowledged = d.acked })
	d.mu.Unlock()
	return nil
}

// check reads block sequence back from the disk; a block found bad is counted once.
func (d *disk) check(sequence int64) bool {
	c := d.cell(sequence)
	b := d.read[:api.BlockSize]
	done := d.begin("read")
	_, err := d.direct.ReadAt(b, int64(c.Index)*api.BlockSize)
	done()
	d.tell(func(r *api.DiskReport) { r.VerifiedBlocks++ })
	if err == nil && c.Matches(api.Words(b)) {
		return true
	}
	if !d.bad[sequence] {
		d.bad[sequence] = true
		if err != nil {
			d.fault("block %d: read: %v", sequence, err)
		} else {
			d.fault("block %s", c.Diagnose(api.Words(b)))
		}
	}
	return false
}

// oldest is the first block that has not been overwritten.
func (d *disk) oldest() int64 { return max(d.sequence-d.slots+1, 1) }

// verifyNext checks the next of the acknowledged blocks, in a walk without end.
func (d *disk) verifyNext() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cursor < d.oldest() || d.cursor > d.acked {
		d.cursor = d.oldest()
	}
	if d.cursor <= d.acked {
		d.check(d.cursor)
		d.cursor++
	}
}

// verifyBlocks checks every acknowledged block and returns how many there were and how many were bad.
func (d *disk) verifyBlocks() (blocks, bad int64) {
	for s := int64(1); ; s++ {
		d.mu.Lock()
		s = max(s, d.oldest())
		if s > d.acked {
			d.mu.Unlock()
			return blocks, bad
		}
		blocks++
		if !d.check(s) {
			bad++
		}
		d.mu.Unlock()
	}
}

// manifest reads the lines of the disk's list of files; a disk without one has no files to verify.
func (d *disk) manifest() ([]string, error) {
	f, err := os.Open(filepath.Join(d.root, api.Manifest))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	s := bufio.NewScanner(io.LimitReader(f, maxManifest))
	for s.Scan() {
		lines = append(lines, s.Text())
	}
	return lines, s.Err()
}

// verifyFiles checks every file of the manifest and returns how many there were and how many were bad.
func (d *disk) verifyFiles() (files, bad int64) {
	lines, err := d.manifest()
	if err != nil {
		d.fault("manifest: %v", err)
		return 0, 1
	}
	if missing := d.counts.Files - int64(len(lines)); missing != 0 {
		d.fault("manifest: %d lines are missing", missing)
		bad++
	}
	buf, err := aligned(readChunk)
	if err != nil {
		d.fault("%v", err)
		return 0, 1
	}
	defer unix.Munmap(buf)
	for _, line := range lines {
		files++
		if err := checkFile(d.root, line, buf); err != nil {
			bad++
			d.mu.Lock()
			if !d.badFile[line] {
				d.badFile[line] = true
				d.fault("file %v", err)
			}
			d.mu.Unlock()
		}
	}
	return files, bad
}

func (d *disk) fault(format string, args ...any) {
	d.told.Lock()
	d.faults.add(format, args...)
	d.told.Unlock()
}

func (d *disk) tell(change func(r *api.DiskReport)) {
	d.told.Lock()
	change(&d.counts)
	d.told.Unlock()
}

// begin notes that an operation has begun, until done is called.
func (d *disk) begin(operation string) (done func()) {
	d.told.Lock()
	d.busy[operation] = monotonic()
	d.told.Unlock()
	return func() {
		d.told.Lock()
		d.counts.LongestWaitMS = max(d.counts.LongestWaitMS, (monotonic() - d.busy[operation]).Milliseconds())
		delete(d.busy, operation)
		d.told.Unlock()
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkFile compares a file with its line of the manifest, reading it past the page cache.
func checkFile(root, line string, buf []byte) error {
	var want uint32
	var size int64
	head, path, ok := cutFields(line)
	if n, _ := fmt.Sscanf(head, "%x %d", &want, &size); !ok || n != 2 {
		return fmt.Errorf("manifest line %q is damaged", line)
	}
	f, err := os.OpenFile(filepath.Join(root, path), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var crc uint32
	var got int64
	for {
		n, err := f.Read(buf)
		crc = crc32.Update(crc, castagnoli, buf[:n])
		got += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if got != size || crc != want {
		return fmt.Errorf("%s: %d bytes with checksum %08x instead of %d with %08x", path, got, crc, size, want)
	}
	return nil
}

// cutFields splits a line after its second space.
func cutFields(line string) (head, rest string, ok bool) {
	first := strings.IndexByte(line, ' ')
	if first < 0 {
		return "", "", false
	}
	second := strings.IndexByte(line[first+1:], ' ')
	if second < 0 {
		return "", "", false
	}
	at := first + 1 + second
	return line[:at], line[at+1:], true
}

func (d *disk) report() api.DiskReport {
	d.told.Lock()
	defer d.told.Unlock()
	r := d.counts
	r.Errors, r.FirstErrors = d.faults.count, d.faults.list()
	for operation, began := range d.busy {
		if waited := (monotonic() - began).Milliseconds(); waited > r.WaitingMS {
			r.WaitingMS, r.WaitingFor = waited, operation
		}
	}
	return r
}
