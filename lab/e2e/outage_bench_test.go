//go:build bench

package e2e

import "time"

// cutFor is the outage that docs/GUARANTEES.md states.
const cutFor = time.Minute
