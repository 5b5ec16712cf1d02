//go:build bench

package e2e

import "time"

// cutFor and briefCut are the outage that docs/GUARANTEES.md states.
const (
	cutFor   = time.Minute
	briefCut = cutFor
)

const everyPart = true
