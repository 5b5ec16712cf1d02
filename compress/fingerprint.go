package compress

import (
	"crypto/sha256"
	"fmt"
)

// PageSize is the unit in which content is found again: a page of memory, and
// what file systems align their files to.
const PageSize = 4 << 10

// Fingerprint identifies a page: the first half of its SHA-256. To find another
// page of the same fingerprint takes 2^128 attempts; a guest that makes two of
// its own, in 2^64, could exchange one for the other in its own disk.
//
// SHA-256 and BLAKE3 are equally fast on 4 KiB (1733 and 1757 MB/s on a core with
// SHA-NI and AVX-512), and SHA-256 is in the standard library.
type Fingerprint [16]byte

// Sum returns the fingerprint of a page.
func Sum(page []byte) (f Fingerprint) {
	sum := sha256.Sum256(page)
	copy(f[:], sum[:])
	return f
}

// SumOf returns the fingerprint of pages by theirs: that of what these say, one
// after the other.
func SumOf(pages []Fingerprint) Fingerprint {
	h := sha256.New()
	for i := range pages {
		h.Write(pages[i][:])
	}
	var f Fingerprint
	copy(f[:], h.Sum(nil))
	return f
}

// Origin tells where the destination of a move has the content of a fingerprint.
type Origin uint8

const (
	Nowhere Origin = iota // it has to be sent
	OnDisk                // on a disk of the move, as far as that has come
	OnSeed                // in an image that the destination's operator has listed
	OnOld                 // in what the guest left here: an older copy of the disk, at the same place, or its memory
)

func (o Origin) String() string {
	switch o {
	case Nowhere:
		return "nowhere"
	case OnDisk:
		return "disk"
	case OnSeed:
		return "seed"
	case OnOld:
		return "old copy"
	}
	return fmt.Sprintf("origin %d", uint8(o))
}
