//go:build lab && !bench

package e2e

import "time"

// cutFor is longer than QUIC keeps a connection of whose peer it hears nothing.
const cutFor = 35 * time.Second
