package blocksync

import "github.com/wanmig/wanmig/compress"

// Reduction tells what became of a disk's content: where the destination had it,
// or how it was sent. What offers take is counted with the content that they were
// made of.
type Reduction struct {
	Zero       Count `json:"zero"`
	Disk       Count `json:"disk"`       // stood on a disk of the move
	Seed       Count `json:"seed"`       // stood in an image that the destination's operator has listed
	Old        Count `json:"old"`        // stood at the same place of an older copy
	Compressed Count `json:"compressed"` //
	Raw        Count `json:"raw"`        // does not compress
}

// Count is how much of the guest's content crossed in so many bytes.
type Count struct {
	Bytes     int64 `json:"bytes"`
	WireBytes int64 `json:"wire"`
}

func (r *Reduction) of(o compress.Origin) *Count {
	switch o {
	case compress.OnDisk:
		return &r.Disk
	case compress.OnSeed:
		return &r.Seed
	}
	return &r.Old
}

func (r *Reduction) all() [6]*Count {
	return [...]*Count{&r.Zero, &r.Disk, &r.Seed, &r.Old, &r.Compressed, &r.Raw}
}

// Add adds what another disk or another part of this one took.
func (r *Reduction) Add(s Reduction) {
	from := s.all()
	for i, c := range r.all() {
		c.Bytes += from[i].Bytes
		c.WireBytes += from[i].WireBytes
	}
}

// share counts what offers took with all content but zeros.
func (r *Reduction) share(offers int64) {
	all := r.all()
	content := all[1:]
	var whole int64
	for _, c := range content {
		whole += c.Bytes
	}
	for _, c := range content {
		if whole > 0 {
			part := offers * c.Bytes / whole
			c.WireBytes += part
			offers, whole = offers-part, whole-c.Bytes
		}
	}
}
