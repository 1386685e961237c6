#!/bin/sh
# grow.sh partition DEVICE: the last partition of a GPT is extended to the end of a disk that has become larger.
# grow.sh filesystem DEVICE MODE: the ext4 mounted at /newroot is enlarged to its partition.
# Nothing happens where there is nothing to gain. UEFI 2.10, 5.3: header at LBA 1 and in the last LBA, 128 entries of
# 128 bytes behind the first and before the second; CRC-32 of the entries, and of the header with its own field zero.

device=$2 mode=$3
name=${2##*/}
system=/sys/class/block/$name

hex() { hexdump -v -e '1/1 "%02x"' "$@"; }

# A number as N little-endian bytes of hex digits.
little() {
	rest=$1 left=$2 out=''
	while [ "$left" -gt 0 ]; do
		out=$out$(printf %02x $((rest & 255)))
		rest=$((rest >> 8)) left=$((left - 1))
	done
	echo "$out"
}

# Hex digits of a little-endian number, as a decimal.
number() {
	digits=$1 out=''
	while [ -n "$digits" ]; do
		out=${digits%"${digits#??}"}$out
		digits=${digits#??}
	done
	echo $((0x$out))
}

# The digits $2 (from 1) to $3 of $1; digits are counted, not bytes.
piece() { echo "$1" | cut -c"$2-$3"; }

bytes() { echo "$1" | sed 's/../\\x&/g' | while read -r line; do printf "$line"; done; }

# gzip ends with the CRC-32 of what it packed, little-endian, and the length.
crc() { gzip -c | tail -c 8 | head -c 4 | hex; }

# header MY_LBA OTHER_LBA ENTRIES_LBA: the old header's other fields with these.
header() {
	start=$(piece "$old" 1 32) guid=$(piece "$old" 113 144) shape=$(piece "$old" 161 176)
	places=$(little "$1" 8)$(little "$2" 8)$(piece "$old" 81 96)$(little $((total - 34)) 8)
	rest=00000000$places$guid$(little "$3" 8)$shape$table
	sum=$(bytes "$start"00000000"$rest" | crc)
	bytes "$start$sum$rest"
}

put() { dd of="/dev/$disk" bs=512 seek="$1" conv=notrunc 2> /dev/null; }

partition() {
	[ -e "$system/partition" ] || return 0
	index=$(cat "$system/partition") first=$(cat "$system/start") length=$(cat "$system/size")
	parent=$(readlink -f "$system/..") disk=${parent##*/}
	total=$(cat "$parent/size")
	last=$(((total - 33) / 2048 * 2048 - 1))
	[ "$(cat "$parent/queue/logical_block_size")" = 512 ] || return 0
	[ $last -gt $((first + length + 2047)) ] || return 0
	for other in "$parent"/"$disk"*/start; do
		[ "$(cat "$other")" -le "$first" ] || return 0
	done
	old=$(dd if="/dev/$disk" bs=512 skip=1 count=1 2> /dev/null | hex | cut -c1-184)
	[ "$(piece "$old" 1 32)$(piece "$old" 161 176)" = 4546492050415254000001005c0000008000000080000000 ] || return 0
	[ "$(number "$(piece "$old" 145 160)")" = 2 ] || return 0
	dd if="/dev/$disk" of=/entries bs=512 skip=2 count=32 2> /dev/null
	at=$(((index - 1) * 128 + 40))
	bytes "$(little $last 8)" | dd of=/entries bs=1 seek=$at conv=notrunc 2> /dev/null
	table=$(crc < /entries)
	put $((total - 33)) < /entries
	header $((total - 1)) 1 $((total - 33)) | put $((total - 1))
	put 2 < /entries
	header 1 $((total - 1)) 2 | put 1
	# the protective MBR says the disk's size, as far as it can
	size=$((total - 1))
	[ $size -le 4294967295 ] || size=4294967295
	bytes "$(little $size 4)" | dd of="/dev/$disk" bs=1 seek=458 conv=notrunc 2> /dev/null
	sync
	blockdev --rereadpt "/dev/$disk" || partprobe "/dev/$disk"
	tries=0
	until [ -b "$device" ] || [ $tries = 100 ]; do usleep 50000; tries=$((tries + 1)); done
	echo "diskmorph: partition $index of $disk grown to $(cat "$system/size") sectors" > /dev/console
}

filesystem() {
	super=$(dd if="$device" bs=512 skip=2 count=1 2> /dev/null | hex)
	[ "$(piece "$super" 49 56)$(piece "$super" 113 116)" = 0200000053ef ] || return 0 # blocks of 4096 bytes, ext4
	have=$(number "$(piece "$super" 9 16)$(piece "$super" 673 680)")
	room=$(($(cat "$system/size") / 8))
	[ $room -gt $((have + 256)) ] || return 0
	mount -o remount,rw /newroot || return 0
	/bin/grow /newroot $room || echo "diskmorph: the root file system cannot be grown: error $?" > /dev/console
	[ "$mode" = rw ] || mount -o remount,ro /newroot
}

"$@"
