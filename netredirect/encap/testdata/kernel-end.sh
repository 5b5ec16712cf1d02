#!/bin/busybox sh
# The init of a guest that is the far end of two tunnels, made by its kernel:
#
#   wm4, wm6  outer IPv4 (ipip, sit)   the VM 10.2.0.2, fd02::2; the client 10.1.0.2, fd01::2
#   wmx       outer IPv6 (ip6tnl)      the VM 10.2.0.3, fd02::3; the client 10.1.0.3, fd01::3
export PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

set -ex
for module in /modules/*.ko; do
	insmod $module
done
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad

/sbin/ip link set lo up
/sbin/ip link set eth0 up
/sbin/ip addr add 10.9.0.2/24 dev eth0
/sbin/ip addr add fd09::2/64 dev eth0 nodad
for vm in 10.2.0.2/32 10.2.0.3/32 fd02::2/128 fd02::3/128; do
	/sbin/ip addr add $vm dev lo
done

/sbin/ip link add wm4 type ipip local 10.9.0.2 remote 10.9.0.1 ttl 64 tos inherit pmtudisc
/sbin/ip link add wm6 type sit local 10.9.0.2 remote 10.9.0.1 ttl 64 tos inherit pmtudisc
/sbin/ip link add wmx type ip6tnl mode any local fd09::2 remote fd09::1 hoplimit 64 tclass inherit $(cat /encaplimit)
for tunnel in wm4 wm6 wmx; do
	/sbin/ip link set $tunnel addrgenmode none # it would solicit routers
	/sbin/ip link set $tunnel up
done
/sbin/ip route add 10.1.0.2/32 dev wm4 src 10.2.0.2
/sbin/ip route add fd01::2/128 dev wm6 src fd02::2
/sbin/ip route add 10.1.0.3/32 dev wmx src 10.2.0.3
/sbin/ip route add fd01::3/128 dev wmx src fd02::3
/sbin/ip -d link

exec nc -ll -p 7 -e /bin/cat
