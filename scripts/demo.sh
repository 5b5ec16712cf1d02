#!/bin/sh
# A VM crosses an emulated WAN, memory and disks, while a client talks to it; then it is proved that nothing was lost.
set -eu
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "make demo: the lab makes network namespaces and so needs root: run it as root" >&2
	exit 1
fi
PATH="$PWD/bin:$PATH"
WANLAB_DIR=$(mktemp -d /var/tmp/wanlab-demo-XXXXXX)
export PATH WANLAB_DIR
trap 'wanlab down; rmdir "$WANLAB_DIR" 2>/dev/null || true' EXIT
trap 'exit 1' INT TERM

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

step "Two data centres, 100 Mbit/s and 50 ms apart"
run wanlab up --rate 100mbit --rtt 50ms

step "A guest with two disks, that writes memory and disks and verifies what it wrote"
run wanlab vm web --memory 384MiB --disk 512MiB,format=raw --disk 256MiB,format=qcow2 --dirty 4MiB/s --write 1MiB/s

step "Move it, while a client asks it for an echo every 2 ms"
wanlab probe web --interval 2ms >"$WANLAB_DIR.probe" &
probe=$!
run wanlab exec local-dc -- wanmig move web --to remote-dc
sleep 2
kill -INT "$probe"
wait "$probe" || true
cat "$WANLAB_DIR.probe"
# QEMU's TCG stands still at the source when it first looks which pages are dirty; a KVM guest does not.
rm -f "$WANLAB_DIR.probe"

step "Where is it, and what does it say of its memory and disks?"
run wanlab exec local-dc -- virsh -q list --all
run wanlab exec remote-dc -- virsh -q list --all
run wanlab verify web

step "Move it back under the same load, landing paused, and compare both sites' images"
run wanlab exec remote-dc -- wanmig move web --to local-dc --paused --keep-source
images=var/lib/libvirt/images
for disk in web.disk0.raw web.disk1.qcow2; do
	run qemu-img compare -U "$WANLAB_DIR/sites/remote-dc/$images/$disk" "$WANLAB_DIR/sites/local-dc/$images/$disk"
done
run wanlab exec local-dc -- virsh -q resume web
sleep 1
run wanlab verify web

step "What crossed the WAN, and clean up"
run wanlab link --counters
