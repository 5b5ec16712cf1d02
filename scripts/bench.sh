#!/bin/sh
# Measures: the data paths by themselves, tunnels with and without an emulated link, the gap that a client sees, and whole
# moves beside virsh, on the same link in the same run.
set -eu
cd "$(dirname "$0")/.."
go test -run '^$' -bench . -benchtime 1s ./compress ./memsync ./blocksync/... ./tunnel
if [ "$(id -u)" != 0 ]; then
	echo "make bench: tunnels and moves need the lab, and so root: run it as root" >&2
	exit 1
fi
bin/wanlab image
bin/wanlab image --debian
go test -tags bench -run '^$' -bench 'Image|Link' -benchtime 1x ./compress
go test -tags bench -run '^$' -bench Image -benchtime 2x -cpu 1 ./blocksync
go test -tags lab -run '^$' -bench Captured -benchtime 3x -cpu 1 ./memsync
go test -tags bench -count=1 -v -run Throughput ./netredirect/encap
go test -tags bench -count=1 -v -timeout 45m -run 'TunnelKinds|LongestGap|SideBySide|Debian|Deltas' ./lab/e2e
