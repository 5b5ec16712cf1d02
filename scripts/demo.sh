#!/bin/sh
# A VM crosses an emulated WAN, memory and disks, while a client's connections to it go on; then it is proved that nothing
# was lost.
set -eu
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "make demo: the lab makes network namespaces and so needs root: run it as root" >&2
	exit 1
fi
PATH="$PWD/bin:$PATH"
WANLAB_DIR=$(mktemp -d /var/tmp/wanlab-demo-XXXXXX)
export PATH WANLAB_DIR
background=""
clean_up() {
	trap '' HUP INT TERM
	for pid in $background; do
		kill "$pid" 2>/dev/null || true
	done
	wanlab down
	rm -f "$WANLAB_DIR.client" "$WANLAB_DIR.probe"
	rmdir "$WANLAB_DIR" 2>/dev/null || true
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

# until_gone SITE waits until no tunnel stands at a site.
until_gone() {
	for _ in $(seq 60); do
		wanlab exec "$1" -- wanmig redirect | grep -q standing || return 0
		sleep 1
	done
	wanlab exec "$1" -- wanmig redirect show web
	echo "make demo: the tunnel still stands at $1 after a minute" >&2
	return 1
}

step "Two data centres, 100 Mbit/s and 50 ms apart, and users of both; their routers talk BGP"
run wanlab up --services --rate 100mbit --rtt 50ms

step "A guest with two disks, that writes memory and disks and verifies what it wrote"
run wanlab vm web --memory 384MiB --disk 512MiB,format=raw --disk 256MiB,format=qcow2 --dirty 4MiB/s --write 1MiB/s

step "Move it, while a client in users keeps a TCP stream, a record every 10 ms, and a download"
run wanlab exec users -- ip route get 10.10.0.10
echo '$ wanlab client web --stream 10ms --download 1024,2MiB/s &'
echo '$ wanlab probe web --interval 5ms &'
wanlab client web --stream 10ms --download 1024,2MiB/s >"$WANLAB_DIR.client" 2>&1 &
client=$!
wanlab probe web --interval 5ms >"$WANLAB_DIR.probe" 2>&1 &
probe=$!
background="$client $probe"
run wanlab exec local-dc -- wanmig move web --to remote-dc

step "The tunnel that its connections take, until users' router knows the way to the other data centre"
run wanlab exec local-dc -- wanmig redirect show web
until_gone local-dc
run wanlab exec local-dc -- wanmig redirect
run wanlab exec users -- ip route get 10.10.0.10

step "What the client has seen, and the hosts of both data centres, which ask the guest for an echo every 5 ms"
kill -INT "$client" "$probe"
status=0
wait "$client" || status=$?
wait "$probe" || true
background=""
cat "$WANLAB_DIR.client" "$WANLAB_DIR.probe"
echo "(A gap at local-dc is QEMU's TCG, which stands still when a migration first asks which pages are dirty; KVM does not.)"
[ "$status" = 0 ] || { echo "make demo: a connection did not live through the move" >&2; exit 1; }

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
