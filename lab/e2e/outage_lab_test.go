//go:build lab && !bench

package e2e

import "time"

// cutFor is longer than QUIC keeps a connection of whose peer it hears nothing, and
// briefCut longer than a session takes the link for up.
const (
	cutFor   = 35 * time.Second
	briefCut = 12 * time.Second
)

// everyPart says whether the link is cut in each part of a move, or in one of them:
// TestFaults cuts it in the others, for a second.
const everyPart = soaking
