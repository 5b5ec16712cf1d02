//go:build !race

package handoff

const randomRuns = 1_000_000
