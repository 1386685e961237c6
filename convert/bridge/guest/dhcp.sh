#!/.diskmorph/busybox sh
# What udhcpc calls: an address, routes and name servers of a lease become the machine's.
b=/.diskmorph/busybox
case $1 in
deconfig)
	$b ip -4 addr flush dev "$interface"
	$b ip link set "$interface" up
	;;
bound | renew)
	[ "$1" = bound ] || $b ip -4 addr show dev "$interface" | $b grep -q " $ip/" || $b ip -4 addr flush dev "$interface"
	$b ip addr add "$ip/${mask:-24}" ${broadcast:+broadcast "$broadcast"} dev "$interface" 2> /dev/null
	[ -z "$mtu" ] || $b ip link set "$interface" mtu "$mtu"
	for gateway in $router; do
		[ "$mask" != 32 ] || $b ip route add "$gateway" dev "$interface" 2> /dev/null
		$b ip route replace default via "$gateway" dev "$interface"
		break
	done
	set -- $staticroutes
	while [ $# -ge 2 ]; do
		if [ "$2" = 0.0.0.0 ]; then
			$b ip route add "$1" dev "$interface" 2> /dev/null
		else
			$b ip route replace "$1" via "$2" dev "$interface"
		fi
		shift 2
	done
	if [ -n "$dns" ]; then
		{
			[ -z "$search$domain" ] || echo "search ${search:-$domain}"
			for server in $dns; do echo "nameserver $server"; done
		} > /etc/resolv.conf
	fi
	;;
esac
exit 0
