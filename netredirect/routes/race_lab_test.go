//go:build lab && race

package routes

// parallel is one, since the library sets its own global variables whenever a
// server starts.
const parallel = "1"

// mayRestart is empty, since the library marks routes as stale without the lock
// under which it reads the mark.
const mayRestart = ""
