//go:build lab && !race

package routes

// parallel is how many tests run at once: they wait more than they work.
const parallel = "8"
