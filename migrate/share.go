package migrate

import "time"

// load is what competes for the link at one moment.
type load struct {
	DiskPending   int64   // bytes in the outboxes
	DiskPeak      int64   // bytes in them when memory began
	DiskSent      int64   // bytes that have left them since
	DiskRate      float64 // bytes per second leaving them
	FirstPassLeft int64   // bytes of RAM not yet seen in the first pass
	RoundLeft     int64   // bytes of RAM that QEMU has still to send in this pass, by its own account
	RAM           int64   // bytes of RAM
	Silent        bool    // the destination does not answer just now: the link may be gone
	Released      bool    // QEMU may stop the guest, whatever is left
}

const (
	// bulkTime and bulkFloor are a backlog that is not the bulk of the disks any
	// more: what it takes half a second to send, or so many bytes.
	bulkTime  = 500 * time.Millisecond
	bulkFloor = 8 << 20
	// ahead is how much further memory's first pass may be than the disks.
	ahead = 0.10
	// backlogGoal is how long the disk backlog may take to drain when the guest
	// is allowed to stop: it is downtime.
	backlogGoal = 10 * time.Millisecond
	// backlogFloor is a backlog that is never worth waiting for.
	backlogFloor = 64 << 10
	// tailBytes of the first pass are held back until the disks are drained.
	// QEMU may have written that much more than we have read: a socket buffer
	// of 208 KiB holds 23,000 zero pages of 9 bytes.
	tailBytes = 128 << 20
	// roundTail is the same for a later round, whose pages have content. QEMU's
	// account is up to a second old: this much may have been sent since.
	roundTail = 32 << 20
)

// memoryMayRead decides whether QEMU's RAM stream is read now. Not reading is
// how memory is slowed and how the stop is withheld: QEMU stops the guest when
// little memory remains, whatever remains of the disks.
//
// The order in which a link carries disks and memory does not change when it
// has carried both, but it changes what is sent twice: memory that goes early
// is dirtied again, and what of it stands on the disks is found at the destination
// only when they are there. So the first pass begins when the bulk of the disks
// has crossed, and ends after them; a later round ends only while the backlog
// fits the downtime. Where the guest writes its disks all the time, the backlog
// may never be small: when as much has crossed as there was at the beginning, the
// first pass keeps step with the disks.
func memoryMayRead(l load) bool {
	if l.RAM == 0 {
		return true // the stream's header: what memory there is comes with it
	}
	near := l.FirstPassLeft <= min(int64(tailBytes), l.RAM)
	if l.FirstPassLeft == 0 {
		near = l.RoundLeft <= roundTail
	}
	near = near || l.Released
	if near && l.Silent {
		return false // QEMU would stop the guest, to wait for the link
	}
	if l.drained() {
		return true
	}
	if l.FirstPassLeft == 0 || near {
		return !near
	}
	if l.DiskPending <= max(bulkFloor, int64(l.DiskRate*bulkTime.Seconds())) {
		return true
	}
	if l.DiskPeak == 0 || l.DiskSent < l.DiskPeak {
		return false
	}
	disk := 1 - float64(l.DiskPending)/float64(max(l.DiskPeak, l.DiskPending))
	memory := 1 - float64(l.FirstPassLeft)/float64(max(l.RAM, 1))
	return memory <= disk+ahead
}

// drained reports that the disk backlog fits the downtime.
func (l load) drained() bool {
	return l.DiskPending <= backlogFloor || float64(l.DiskPending) <= l.DiskRate*backlogGoal.Seconds()
}

// farFromStop reports that QEMU can't stop the guest yet, whatever it is let do.
func farFromStop(l load) bool {
	return l.RAM == 0 || l.FirstPassLeft > min(int64(tailBytes), l.RAM)
}
