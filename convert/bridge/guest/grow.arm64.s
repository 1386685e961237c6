// Enlarges a mounted ext4 while it is in use: grow MOUNTPOINT BLOCKS. arm64.
	.text
	mov x0, -100            // AT_FDCWD
	ldr x1, [sp, 16]        // argv[1]: the mount point
	mov x2, 0
	mov x8, 56              // openat
	svc 0
	tbnz x0, 63, leave
	ldr x1, [sp, 24]        // argv[2]: the number of blocks, in decimal
	mov x3, 0
	mov x5, 10
digit:
	ldrb w4, [x1], 1
	subs w4, w4, 0x30
	b.lo found
	madd x3, x3, x5, x4
	b digit
found:
	str x3, [sp, -16]!
	movz w1, 0x6610         // EXT4_IOC_RESIZE_FS
	movk w1, 0x4008, lsl 16
	mov x2, sp
	mov x8, 29              // ioctl
	svc 0
leave:
	neg x0, x0
	mov x8, 93              // exit
	svc 0
