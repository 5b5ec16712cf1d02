#!/bin/sh
# Runs every test, the lab's included: real guests, real libvirtd, network namespaces. They need root.
# A test that is skipped, or a package without the tests it should have, fails the run.
set -eu
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "make lab: the lab makes network namespaces and so needs root: run it as root" >&2
	exit 1
fi
export WANLAB_CACHE="${WANLAB_CACHE:-/var/cache/wanlab}"
export WANLAB_GUEST="$PWD/bin/wanlab-guest"
bin/wanlab image # once, before tests wait for it

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
# Moves want the machine for themselves; the other parts mostly wait.
tests() { # JOBS PACKAGES...
	jobs=$1
	shift
	go test -tags lab -count=1 -p "$jobs" -parallel 3 -timeout 14m -run "${RUN:-.}" -v "$@" >>"$log" 2>&1 || status=$?
}
go test -tags faults -count=1 -v ./faults >>"$log" 2>&1 || status=$?
# shellcheck disable=SC2046
tests 4 ./lab $(go list ./... | grep -vE '/lab(/e2e)?$') # the longest first
tests 1 ./lab/e2e
grep -E '^(=== RUN|\? )|no tests to run' -v "$log" || true
if grep -q -- '--- SKIP' "$log"; then
	echo "make lab: a test was skipped: that counts as failed" >&2
	exit 1
fi
exit "$status"
