// Package api is what the lab's guest answers over the network: the JSON of its HTTP requests, the records of its
// echo services, and the pattern that its memory, its disk blocks and its files are made of.
//
// HTTP on port 80:
//
//	GET  /report                                        Report
//	GET  /file?mib=N                                    N MiB of pattern cells; CRC-32C of the body in the trailer X-Wanlab-Crc32c
//	POST /load?dirty=RATE&edit=RATE&write=RATE&working-set=SIZE   changes what is named, answers Report
//	POST /verify                                        checks all memory and all disks now, answers Verification
//	POST /sync                                          writes dirty file data to the disks, answers Report
//	POST /poweroff                                      writes everything out, unmounts and powers off
//
// RATE and SIZE are written 20MiB or 512KiB, a rate optionally with /s. An echo on port 7, TCP and UDP, speaks EchoRecord.
package api

// The guest's ports and limits.
const (
	HTTPPort = 80
	EchoPort = 7

	// MaxFileMiB bounds GET /file.
	MaxFileMiB = 1024

	// ChecksumTrailer carries eight hexadecimal digits of CRC-32C (Castagnoli) over the body of GET /file, after it (RFC
	// 9110, section 6.5).
	ChecksumTrailer = "X-Wanlab-Crc32c"
)

// Manifest is the name, in the root of each disk, of the list of the files that were put there when the disk was made.
// A line holds the file's CRC-32C in hexadecimal, its size in bytes and its path, separated by single spaces.
const Manifest = ".wanlab-manifest"

// Report is the state of a guest as it knows it.
type Report struct {
	Name     string `json:"name"`
	BootID   string `json:"boot_id"`
	UptimeMS int64  `json:"uptime_ms"`

	Load   Load         `json:"load"`
	Memory MemoryReport `json:"memory"`
	Disks  []DiskReport `json:"disks"`
	Pause  PauseReport  `json:"pause"`
	Echo   EchoReport   `json:"echo"`
}

// Errors is the number of all verification errors of memory, disks and echo connections since boot.
func (r *Report) Errors() int64 {
	n := r.Memory.Errors + r.Echo.Breaks
	for _, d := range r.Disks {
		n += d.Errors
	}
	return n
}

// Load is the work that a guest does, in bytes and bytes per second.
type Load struct {
	Dirty      int64 `json:"dirty_bytes_per_second"` // pages that change as a whole
	Edit       int64 `json:"edit_bytes_per_second"`  // pages that change in a few words
	Write      int64 `json:"write_bytes_per_second"` // to each disk
	WorkingSet int64 `json:"working_set_bytes"`
}

// MemoryReport tells of the pages of the guest program's buffer.
type MemoryReport struct {
	BufferBytes   int64    `json:"buffer_bytes"`
	DirtiedPages  int64    `json:"dirtied_pages"`
	VerifiedPages int64    `json:"verified_pages"`
	Errors        int64    `json:"errors"`
	FirstErrors   []string `json:"first_errors,omitempty"`
}

// DiskReport tells of one disk. Acknowledged is the highest sequence number that fsync has confirmed; every block up to it
// must survive anything; Found is how far the blocks were all there that the boot before had written, when this one began.
// WaitingMS is how long the longest operation under way has taken so far, LongestWaitMS how long the
// longest of all that ended took, by the guest's monotonic clock.
type DiskReport struct {
	Device         string   `json:"device"`
	Bytes          int64    `json:"bytes"`
	WrittenBlocks  int64    `json:"written_blocks"`
	Acknowledged   int64    `json:"acknowledged"`
	Found          int64    `json:"found"`
	VerifiedBlocks int64    `json:"verified_blocks"`
	Files          int64    `json:"files"` // listed in its manifest
	WaitingMS      int64    `json:"waiting_ms"`
	WaitingFor     string   `json:"waiting_for,omitempty"` // read, write or fsync
	LongestWaitMS  int64    `json:"longest_wait_ms"`
	Errors         int64    `json:"errors"`
	FirstErrors    []string `json:"first_errors,omitempty"`
}

// PauseReport tells when the guest did not run. LongestMS is the longest gap between two ticks of a 100 ms ticker by the
// guest's monotonic clock, which stands still while the VM is stopped. LongestStopMS is the longest such stop: what the
// real-time clock, which keeps counting, has gained on the monotonic clock from one second to the next; its error is a few
// milliseconds, and stops below 5 ms are not counted. Stops are measured from StopsSinceMS, a few seconds after boot, on; it
// is 0 before that. AtMS values are uptimes.
type PauseReport struct {
	LongestMS       float64 `json:"longest_ms"`
	LongestAtMS     int64   `json:"longest_at_ms"`
	StopsSinceMS    int64   `json:"stops_since_ms"`
	Stops           int64   `json:"stops"`
	LongestStopMS   float64 `json:"longest_stop_ms"`
	LongestStopAtMS int64   `json:"longest_stop_at_ms"`
}

// EchoReport counts echo traffic. A break is a TCP record whose number does not follow the one before it.
type EchoReport struct {
	TCPConnections int64 `json:"tcp_connections"`
	TCPRecords     int64 `json:"tcp_records"`
	UDPRecords     int64 `json:"udp_records"`
	Breaks         int64 `json:"breaks"`
}

// Verification is the outcome of one POST /verify: what was checked in this pass, how much of it was bad, and the report
// after it.
type Verification struct {
	Pages     int64  `json:"pages"`
	BadPages  int64  `json:"bad_pages"`
	Blocks    int64  `json:"blocks"`
	BadBlocks int64  `json:"bad_blocks"`
	Files     int64  `json:"files"`
	BadFiles  int64  `json:"bad_files"`
	Report    Report `json:"report"`
}

// Bad is the number of everything found wrong in the pass.
func (v *Verification) Bad() int64 { return v.BadPages + v.BadBlocks + v.BadFiles }
