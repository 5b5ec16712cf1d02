#!/bin/sh
# Runs the moves of the lab in their long form: hundreds of faults, real kills and cuts. It needs root, and hours.
# RUN, if set, names the only tests to run.
set -eu
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "make soak: the lab makes network namespaces and so needs root: run it as root" >&2
	exit 1
fi
export WANLAB_CACHE="${WANLAB_CACHE:-/var/cache/wanlab}"
export WANLAB_GUEST="$PWD/bin/wanlab-guest"
bin/wanlab image
exec go test -tags lab,soak -count=1 -parallel 3 -timeout 4h -run "${RUN:-.}" -v ./lab/e2e
