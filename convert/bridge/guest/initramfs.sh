#!/bin/sh
# PID 1 of the initial ramdisk: loads the drivers that the machine asks for, finds the root by its UUID, enlarges its
# partition and file system where the disk has become larger, and hands over to the root's init.
export PATH=/bin
UUID='@UUID@'
INIT='@INIT@'

say() { echo "diskmorph: $*" > /dev/console; }

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev || mdev -s

root='' mode='@MODE@' init=''
read -r words < /proc/cmdline
for word in $words; do
	case $word in
	root=*) root=${word#root=} ;;
	ro | rw) mode=$word ;;
	init=*) init=${word#init=} ;;
	diskmorph.break) exec sh < /dev/console > /dev/console 2>&1 ;;
	esac
done

# Loads what devices ask for; false where none has come since.
seen=''
load() {
	# in this order: xen, vmbus, virtio, scsi, pci, acpi, so that buttons come behind disks
	wanted=$(cat /sys/bus/*/devices/*/modalias 2> /dev/null | grep -vE '^(cpu|dmi|input|platform):' | sort -ru)
	[ "$wanted" != "$seen" ] || return 1
	seen=$wanted
	echo "$wanted" | xargs modprobe -a -q > /dev/null 2>&1
	return 0
}

# Prints the root's device: as the command line says it, else by the UUID that this ramdisk was made for.
find_root() {
	case $root in
	UUID=* | LABEL=*) findfs "$root" 2> /dev/null && return ;;
	/dev/*) [ "$1" -lt 40 ] && [ -b "$root" ] && echo "$root" && return ;;
	esac
	[ -z "$root" ] || [ "$1" -gt 30 ] || return 1
	findfs "UUID=$UUID" 2> /dev/null
}

pause() { usleep 50000 2> /dev/null || sleep 1; }

# Drivers for the network are loaded while the root is mounted.
{ while load; do :; done; modprobe -q evdev 2> /dev/null; } &  # evdev tells of the power button
loader=$!
tries=0 device=''
until device=$(find_root $tries); do
	tries=$((tries + 1))
	[ $((tries % 20)) != 0 ] || load
	if [ $tries = 60 ]; then
		for module in $(cut -d: -f1 /lib/modules/*/modules.dep 2> /dev/null); do
			insmod "$(echo /lib/modules/*/"$module")" 2> /dev/null
		done
	fi
	if [ $tries -gt 400 ]; then
		say "no root file system: neither ${root:-root=} nor UUID $UUID is on any disk"
		exec sh < /dev/console > /dev/console 2>&1
	fi
	pause
done

sh /grow.sh partition "$device"
if ! mount -t ext4 -o "$mode" "$device" /newroot; then
	say "the root file system on $device cannot be mounted"
	exec sh < /dev/console > /dev/console 2>&1
fi
sh /grow.sh filesystem "$device" "$mode"

wait $loader
for folder in dev proc sys; do
	mount -o move /$folder /newroot/$folder 2> /dev/null || umount -l /$folder
done
exec switch_root /newroot "${init:-$INIT}"
say "the root has no ${init:-$INIT}"
exec sh
