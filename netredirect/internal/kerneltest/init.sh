#!/bin/busybox sh
# The init of a Guest: the kernel panics, and QEMU ends, if a command fails.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/applets
set -e
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /applets
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
	insmod $module
done
/bin/sh -ex /script
reboot -f
