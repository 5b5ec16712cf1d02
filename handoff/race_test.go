//go:build race

package handoff

// The race detector makes a run twenty times as slow, and there is nothing in it
// for it to find but the counters.
const randomRuns = 20_000
