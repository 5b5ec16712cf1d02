package compress

import "crypto/sha256"

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
