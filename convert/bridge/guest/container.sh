#!/.diskmorph/busybox sh
# PID 1 of a machine that runs one program, a container's: mounts, network, then the program; it hands signals on,
# reaps orphans, and powers off when the program ends.
b=/.diskmorph/busybox
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
read -r name < /etc/hostname

$b mount -o remount,rw /
on() { [ -d "$4" ] || $b mkdir -p "$4"; $b mount -t "$1" -o "$2" "$3" "$4"; }
[ -e /proc/1 ] || on proc nosuid,nodev,noexec proc /proc
[ -e /sys/class ] || on sysfs nosuid,nodev,noexec sysfs /sys
[ -e /dev/null ] || on devtmpfs nosuid,mode=0755 devtmpfs /dev
on tmpfs nosuid,nodev,mode=0755 tmpfs /run
[ -z "$name" ] || echo "$name" > /proc/sys/kernel/hostname

# The network comes up while the rest is mounted; the program starts with an address, if there is one to be had.
$b ip link set lo up
jobs=''
for path in /sys/class/net/*; do
	nic=${path##*/}
	[ "$nic" != lo ] && [ -e "$path/device" ] || continue
	$b udhcpc -i "$nic" -s /.diskmorph/dhcp -p "/run/udhcpc.$nic.pid" -x "hostname:$name" \
		-t 6 -T 1 -A 5 -b -S > /dev/null 2>&1 &
	jobs="$jobs $!"
done

on devpts nosuid,noexec,gid=5,mode=0620,ptmxmode=0666 devpts /dev/pts
on tmpfs nosuid,nodev,mode=1777 tmpfs /dev/shm
[ ! -d /sys/fs/cgroup ] || $b mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup 2> /dev/null
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
	[ -e "/dev/${link%%:*}" ] || $b ln -s "${link#*:}" "/dev/${link%%:*}"
done
echo 0 > /proc/sys/kernel/ctrl-alt-del

[ -z "$jobs" ] || wait $jobs
$b acpid -c /.diskmorph/acpi -l /dev/null 2> /dev/null

# Signals: asking to stop stops the program in its own way; others are handed on.
child='' caught='' after=poweroff
pass() { caught=1; [ -z "$child" ] || kill "-$1" "$child" 2> /dev/null; }
trap 'pass @STOP@' TERM PWR
trap 'after=reboot; pass @STOP@' INT
for signal in HUP QUIT USR1 USR2 WINCH; do
	trap "pass $signal" $signal
done

/.diskmorph/run < /dev/console > /dev/console 2>&1 &
child=$!
while :; do
	caught=''
	wait "$child"
	status=$?
	[ -n "$caught" ] || break
done
trap '' TERM INT PWR HUP QUIT USR1 USR2 WINCH
echo "diskmorph: the program exited with status $status" > /dev/console

# What still runs is asked to stop, waited for a little, and killed.
# Kernel threads have no words; the shell itself counts, so that nothing is started for it.
others() {
	for path in /proc/[0-9]*/cmdline; do
		word=''
		read -r word 2> /dev/null < "$path"
		[ -z "$word" ] || [ "$path" = /proc/1/cmdline ] || return 0
	done
	return 1
}
kill -TERM -1 2> /dev/null
tries=0
while [ $tries -lt 30 ] && others; do
	$b usleep 100000
	tries=$((tries + 1))
done
kill -KILL -1 2> /dev/null
$b sync
$b mount -o remount,ro / 2> /dev/null
exec $b $after -f
