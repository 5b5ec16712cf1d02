//go:build lab && !soak

package e2e

// soaking says whether tests take the hours of `make soak`, or the minutes of `make test`.
const soaking = false
