#!/bin/sh
# Installs from Debian what building and the lab need, and nothing that starts a service on the host.
set -eu
cd "$(dirname "$0")/.."

packages="qemu-system-x86 qemu-utils libvirt-daemon libvirt-clients busybox-static libnbd-bin ovmf iproute2 e2fsprogs util-linux mount procps iputils-ping openssh-client mmdebstrap bind9 bind9-dnsutils bird2 nftables iperf3 conntrack git ca-certificates spin gcc libc6-dev"

# Packages of daemons start them at once unless policy-rc.d forbids it (invoke-rc.d(8)). The lab runs its daemons by
# itself, in network namespaces.
policy=/usr/sbin/policy-rc.d
marker="for the time of wanmig's make deps"
forbid_starts() {
	[ ! -e "$policy" ] || mv "$policy" "$policy.before"
	trap restore_policy EXIT
	trap 'exit 1' HUP INT TERM
	printf '#!/bin/sh\n# %s\nexit 101\n' "$marker" >"$policy"
	chmod 755 "$policy"
}
restore_policy() {
	if grep -qsF "$marker" "$policy"; then
		rm -f "$policy"
		[ ! -e "$policy.before" ] || mv "$policy.before" "$policy"
	fi
}

missing=""
for p in $packages; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "make deps: these packages are missing, install them as root: apt-get install --no-install-recommends$missing" >&2
		exit 1
	fi
	echo "installing:$missing"
	restore_policy # should it have been left behind
	apt-get update -q >/dev/null
	forbid_starts
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null
	# libvirt-daemon has no service of its own (that is libvirt-daemon-system), but these have, for the next boot.
	case "$missing " in *" bind9 "*) update-rc.d named disable ;; esac
	case "$missing " in *" bird2 "*) update-rc.d bird disable ;; esac
	restore_policy
fi

# The lab's guest boots a kernel that is downloaded, not installed: apt has to know of it.
if [ "$(id -u)" = 0 ] && ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
	apt-get update -q >/dev/null
fi

# Any Go from 1.21 on fetches the toolchain that go.mod names.
if ! go version >/dev/null 2>&1; then
	if ! apt-cache policy | grep -q bookworm-backports; then
		echo "make deps: Go 1.21 or newer is needed: add bookworm-backports to apt's sources, or install Go from its own site" >&2
		exit 1
	fi
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends -t bookworm-backports golang-go >/dev/null
fi
go mod download
