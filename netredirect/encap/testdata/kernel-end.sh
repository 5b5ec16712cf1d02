# A guest that is the far end of two tunnels, made by its kernel:
#
#   wm4, wm6  outer IPv4 (ipip, sit)   the VM 10.2.0.2, fd02::2; the client 10.1.0.2, fd01::2
#   wmx       outer IPv6 (ip6tnl)      the VM 10.2.0.3, fd02::3; the client 10.1.0.3, fd01::3
#
# $encaplimit is more to say of ip6tnl.
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad

ip link set lo up
ip link set eth0 up
ip addr add 10.9.0.2/24 dev eth0
ip addr add fd09::2/64 dev eth0 nodad
for vm in 10.2.0.2/32 10.2.0.3/32 fd02::2/128 fd02::3/128; do
	ip addr add $vm dev lo
done

ip link add wm4 type ipip local 10.9.0.2 remote 10.9.0.1 ttl 64 tos inherit pmtudisc
ip link add wm6 type sit local 10.9.0.2 remote 10.9.0.1 ttl 64 tos inherit pmtudisc
ip link add wmx type ip6tnl mode any local fd09::2 remote fd09::1 hoplimit 64 tclass inherit $encaplimit
for tunnel in wm4 wm6 wmx; do
	ip link set $tunnel addrgenmode none # it would solicit routers
	ip link set $tunnel up
done
ip route add 10.1.0.2/32 dev wm4 src 10.2.0.2
ip route add fd01::2/128 dev wm6 src fd02::2
ip route add 10.1.0.3/32 dev wmx src 10.2.0.3
ip route add fd01::3/128 dev wmx src fd02::3
ip -d link

nc -ll -p 7 -e /bin/busybox cat
