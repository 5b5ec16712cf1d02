//go:build lab && race

package routes

// parallel is one, since the library sets its own global variables whenever a
// server starts.
const parallel = "1"
