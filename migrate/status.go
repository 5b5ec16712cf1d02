package migrate

import (
	"net/netip"
	"time"

	"github.com/wanmig/wanmig/blocksync"
	"github.com/wanmig/wanmig/netredirect"
)

// Phase is where a move stands. The order is check, prepare, sync, handoff,
// settle and then one of the final phases.
type Phase string

const (
	PhaseWait    Phase = "wait"    // another attempt, for the destination to be there again
	PhaseCheck   Phase = "check"   // finding what would fail; nothing has moved
	PhasePrepare Phase = "prepare" // the destination makes disks and an incoming domain
	PhaseSync    Phase = "sync"    // disk mirror and memory pre-copy run concurrently
	PhaseHandoff Phase = "handoff" // the guest is stopped: drain, load, resume
	PhaseSettle  Phase = "settle"  // the guest runs at the destination; the source is cleared

	PhaseDone       Phase = "done"        // final: the guest runs at the destination only
	PhaseRolledBack Phase = "rolled-back" // final: the guest runs at the source only
	PhaseInDoubt    Phase = "in-doubt"    // who has the guest is not known here yet
	PhaseAbandoned  Phase = "abandoned"   // final: given up at the source, as an operator said; its disks stay
	PhaseSplit      Phase = "split"       // final: it runs here as an operator said, and the destination has run it as well
)

// Final reports whether a move in this phase changes no more by itself.
func (p Phase) Final() bool {
	return p == PhaseDone || p == PhaseRolledBack || p == PhaseAbandoned || p == PhaseSplit
}

// Request is what an operator asks of a move.
type Request struct {
	VM         string            `json:"vm"`                 // name or UUID of the domain
	To         string            `json:"to"`                 // name of the site
	Networks   map[string]string `json:"networks,omitempty"` // bridge or network here = there
	Storage    map[string]string `json:"storage,omitempty"`  // disk target, path or folder here = path or folder there
	KeepSource bool              `json:"keep_source,omitempty"`
	KeepMemory bool              `json:"keep_memory,omitempty"` // of the guest, at the source
	Paused     bool              `json:"paused,omitempty"`      // land paused
	CopyCDROM  bool              `json:"copy_cdrom,omitempty"`
	DryRun     bool              `json:"dry_run,omitempty"`
	Verify     bool              `json:"verify,omitempty"` // compare the disks of both sides before the guest runs there
	Fresh      bool              `json:"fresh,omitempty"`  // older copies of the disks at the destination don't count

	// Downtime is the goal of the predicted downtime; 0: DefaultDowntime.
	Downtime time.Duration `json:"downtime_ns,omitempty"`
	OnStall  OnStall       `json:"on_stall,omitempty"`

	Rate      Limit         `json:"rate,omitzero"`
	Priority  Priority      `json:"priority,omitempty"`
	MaxOutage time.Duration `json:"max_outage_ns,omitempty"` // how long the link may be gone; 0: tunnel.DefaultOutage
	Retries   int           `json:"retries,omitempty"`       // how often it is tried again by itself

	// How connections go on; what is not set is the agent's configuration's.
	Redirect    netredirect.Kind        `json:"redirect,omitempty"`
	RedirectMax time.Duration           `json:"redirect_max_ns,omitempty"`
	Addresses   netredirect.Mode        `json:"addresses,omitempty"`
	Egress      netredirect.Egress      `json:"egress,omitempty"`
	VMAddresses map[string][]netip.Addr `json:"vm_addresses,omitempty"` // of an interface by its MAC, tap or bridge
	LowerTTL    bool                    `json:"lower_ttl,omitempty"`
	DNSNames    []string                `json:"dns_names,omitempty"`
}

// Status is a move as an observer sees it, complete in itself at any moment.
type Status struct {
	Move     string     `json:"move"`
	Role     string     `json:"role"` // "source" or "destination"
	VM       string     `json:"vm"`
	UUID     string     `json:"uuid,omitempty"`
	Peer     string     `json:"peer"` // site name of the other side
	Phase    Phase      `json:"phase"`
	Started  time.Time  `json:"started"`
	Ended    *time.Time `json:"ended,omitempty"`
	Priority Priority   `json:"priority,omitempty"`
	Attempt  int        `json:"attempt,omitempty"` // from 1, at the source
	Disks    []Disk     `json:"disks,omitempty"`
	Memory   Memory     `json:"memory"`
	Link     Link       `json:"link"`
	ETAMS    int64      `json:"eta_ms,omitempty"` // 0: not known yet
	Findings []Finding  `json:"findings,omitempty"`
	Result   *Result    `json:"result,omitempty"` // set when the phase is final or in-doubt
}

// Disk is the progress of one disk, in bytes.
type Disk struct {
	Target  string `json:"target"`
	Size    int64  `json:"size"`    // virtual size
	Read    int64  `json:"read"`    // taken from the guest's disk by the mirror, holes included
	Pending int64  `json:"pending"` // in the outbox
	Spooled int64  `json:"spooled"` // the part of pending that lies in the spool file
	Done    int64  `json:"done"`    // written at the destination, holes included
	Sent    int64  `json:"sent"`    // content sent, before reduction, without holes
	Held    int64  `json:"held"`    // of Sent, what the destination had already
	Wire    int64  `json:"wire"`    // sent, after reduction
	Rate    int64  `json:"rate"`    // done per second
	Problem string `json:"problem,omitempty"`

	Verified  int64               `json:"verified,omitempty"` // found the same at both sides
	Reduction blocksync.Reduction `json:"reduction"`
}

// Memory is the progress of the memory pre-copy, in bytes unless said otherwise.
type Memory struct {
	Size      int64 `json:"size"`
	Remaining int64 `json:"remaining"`
	Stream    int64 `json:"stream"` // of QEMU's stream, before reduction
	Wire      int64 `json:"wire"`
	Rate      int64 `json:"rate"`       // of the stream, per second
	DirtyRate int64 `json:"dirty_rate"` // per second, as QEMU last measured it
	Round     int   `json:"round"`      // pre-copy passes begun
	Held      bool  `json:"held"`       // waiting for the disk backlog
	Opaque    bool  `json:"opaque,omitempty"`

	// Of rounds after the first pass, as they were judged last.
	LinkTakes   int64 `json:"link_takes,omitempty"`            // per second: what the link takes of this guest's memory
	PredictedMS int64 `json:"predicted_downtime_ms,omitempty"` // if the guest were stopped then
	Stalled     bool  `json:"stalled,omitempty"`               // what remains no longer falls
	Throttled   int   `json:"throttled,omitempty"`             // percent of CPU time that QEMU takes from the guest

	Reduction *MemoryReduction `json:"reduction,omitempty"` // nil until memory is sent
}

// MemoryReduction says as what the pages of a guest's memory were sent.
type MemoryReduction struct {
	Zero      Reduced `json:"zero"`      // pages of zeros
	Reference Reduced `json:"reference"` // pages equal to one sent before
	Disk      Reduced `json:"disk"`      // pages that the destination found on a disk of the move
	Seed      Reduced `json:"seed"`      // pages that it found in an image of its operator
	Old       Reduced `json:"old"`       // pages that it found in an older copy of a disk
	Delta     Reduced `json:"delta"`     // changes to a page sent before
	Data      Reduced `json:"data"`      // pages, compressed where that helps
}

// Reduced is what was sent in one way.
type Reduced struct {
	Pages int64 `json:"pages"`
	Bytes int64 `json:"bytes"` // of the guest's memory
	Wire  int64 `json:"wire"`  // sent for them
}

// Reduction says as what the content of a guest was sent.
type Reduction struct {
	Memory MemoryReduction     `json:"memory"`
	Disks  blocksync.Reduction `json:"disks"`
}

// Kept is what the destination keeps of the disks for a next attempt.
type Kept struct {
	Bytes int64     `json:"bytes"` // of its storage
	Until time.Time `json:"until"`
}

// Verified is how much of the disks was compared, in bytes.
type Verified struct {
	Same int64 `json:"same"` // at both sides: all of them
	Last int64 `json:"last"` // compared again while the guest was stopped
}

// Finding is something the check phase found.
type Finding struct {
	Check   string `json:"check"`
	Problem string `json:"problem"`
	Remedy  string `json:"remedy"`
	Fatal   bool   `json:"fatal"` // false: a notice, the move goes on
}

// Downtime splits the time that the guest did not run by what it was spent on.
// The parts add up to the whole. All in milliseconds.
type Downtime struct {
	LastPages   float64 `json:"last_pages_ms"`   // source: libvirt ends the disks' mirrors, QEMU sends the last dirty pages
	DeviceState float64 `json:"device_state_ms"` // source: QEMU sends the devices' state
	Perform     float64 `json:"perform_ms"`      // source: libvirt's Perform, from there to its return
	Offer       float64 `json:"offer_ms"`        // source: the decision is made durable and sent
	Transfer    float64 `json:"transfer_ms"`     // half a round trip
	DrainDisks  float64 `json:"drain_disks_ms"`  // destination: last blocks made durable
	Tail        float64 `json:"tail_ms"`         // destination: the end of the stream arrives
	LoadState   float64 `json:"load_state_ms"`   // destination: QEMU loads the device state
	Journal     float64 `json:"journal_ms"`      // destination: ownership made durable
	FinishGuest float64 `json:"finish_ms"`       // destination: libvirt's Finish, until the guest runs
}

// total is the whole downtime in milliseconds.
func (d Downtime) total() int64 {
	return int64(d.LastPages + d.DeviceState + d.Perform + d.Offer + d.Transfer +
		d.DrainDisks + d.Tail + d.LoadState + d.Journal + d.FinishGuest + 0.5)
}

// Result is how a move ended: the one JSON object of `wanmig move --json`.
type Result struct {
	Result            string   `json:"result"` // done, rolled-back, refused, checked, in-doubt, abandoned or split; of the command: detached or unknown
	Move              string   `json:"move"`
	VM                string   `json:"vm"`
	To                string   `json:"to"`
	TotalMS           int64    `json:"total_ms"`
	DowntimeMS        int64    `json:"downtime_ms"`
	Downtime          Downtime `json:"downtime"`
	WireBytesSent     uint64   `json:"wire_bytes_sent"`
	WireBytesReceived uint64   `json:"wire_bytes_received"`
	Resent            uint64   `json:"resent"`                 // of those sent: a second time, after a carrier was lost
	LinkLostMS        int64    `json:"link_lost_ms,omitempty"` // for how long nothing carried the session
	// Carriers tells how many connections of each transport the session had at one time.
	Carriers     []CarriersUsed `json:"carriers,omitempty"`
	DiskBytes    int64          `json:"disk_bytes"`   // disk content sent, before reduction
	MemoryBytes  int64          `json:"memory_bytes"` // RAM stream sent, before reduction
	MemoryRounds int            `json:"memory_rounds"`
	Throttled    int            `json:"throttled,omitempty"` // percent of CPU time that was taken from the guest at the end
	// Reduction tells as what memory was sent; nil when none was.
	Reduction *Reduction `json:"reduction,omitempty"`
	Verified  *Verified  `json:"verified,omitempty"` // of a move with --verify
	Kept      *Kept      `json:"kept,omitempty"`     // of a move that did not end
	// Unconfirmed tells that the destination has not said that it has cleaned up: it
	// does so when it is told, or after the longest outage.
	Unconfirmed bool      `json:"unconfirmed,omitempty"`
	Notices     []string  `json:"notices,omitempty"`
	Findings    []Finding `json:"findings,omitempty"`
	// Redirect tells what a redirect would change, of a move that was only checked.
	Redirect *RedirectPlan `json:"redirect,omitempty"`
	// Redirected tells how connections go on after the move; nil where they do not.
	Redirected *Redirected `json:"redirected,omitempty"`
	// Next is the move that tries the same again, by itself; this one was the Attempt.
	Next    string `json:"next,omitempty"`
	Attempt int    `json:"attempt,omitempty"`
	// Ways are how an operator can end a move that is in doubt.
	Ways  []Way  `json:"ways,omitempty"`
	Error string `json:"error"` // empty when the move did what was asked
}

// Way is a command that ends a move in doubt.
type Way struct {
	Command string `json:"command"`
	Does    string `json:"does"` // and what it risks
}

// Redirected is the tunnel that a guest's packets take after its move.
type Redirected struct {
	Kind   netredirect.Kind          `json:"kind"`
	Device string                    `json:"device"`
	Mode   netredirect.Mode          `json:"mode"`
	Mapped map[netip.Addr]netip.Addr `json:"mapped,omitempty"` // the guest's addresses and its new ones
	Until  *time.Time                `json:"until,omitempty"`  // it stays no longer than that
}
