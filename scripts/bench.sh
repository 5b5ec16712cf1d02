#!/bin/sh
# Measures: the data paths by themselves, sessions and tunnels with and without an emulated link, the gap that a client
# sees, and whole moves beside virsh, on the same link in the same run. RUN, if set, names the only tests to run, and
# BENCH_FLAGS are for ./bench: make bench RUN=TestLink/loss=1% BENCH_FLAGS='-window 20s -profile /tmp/profiles'.
set -eu
cd "$(dirname "$0")/.."
if [ -n "${RUN:-}" ]; then
	# shellcheck disable=SC2086
	go test -tags bench -count=1 -v -timeout 45m -run "$RUN" ./bench ${BENCH_FLAGS:-}
	exec go test -tags bench -count=1 -v -timeout 60m -run "$RUN" ./netredirect/encap ./lab/e2e
fi
go test -run '^$' -bench . -benchtime 1s ./compress ./memsync ./blocksync/... ./tunnel
if [ "$(id -u)" != 0 ]; then
	echo "make bench: tunnels and moves need the lab, and so root: run it as root" >&2
	exit 1
fi
bin/wanlab image
bin/wanlab image --debian
# shellcheck disable=SC2086
go test -tags bench -count=1 -v -timeout 45m ./bench ${BENCH_FLAGS:-}
go test -tags bench -run '^$' -bench 'Image|Link' -benchtime 1x ./compress
go test -tags bench -run '^$' -bench Image -benchtime 2x -cpu 1 ./blocksync
go test -tags lab -run '^$' -bench Captured -benchtime 3x -cpu 1 ./memsync
go test -tags bench -count=1 -v -run Throughput ./netredirect/encap
go test -tags bench -count=1 -v -timeout 60m -run 'TunnelKinds|Outage|LongestGap|Downtime|SideBySide|Debian|Deltas' ./lab/e2e
