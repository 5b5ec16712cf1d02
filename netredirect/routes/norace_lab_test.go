//go:build lab && !race

package routes

// parallel is how many tests run at once: they wait more than they work.
const parallel = "8"

// mayRestart is the option of a BIRD session that has peers keep its routes.
const mayRestart = "graceful restart;"
