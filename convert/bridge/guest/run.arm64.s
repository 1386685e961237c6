// Becomes the user that the table names, enters the directory and runs the first program found. arm64.
// The table: see launcher.py.
	.text
	adr x19, table
	ldr x0, [x19]
	ldr x1, [x19, 8]
	mov x8, 159             // setgroups
	svc 0
	tbnz x0, 63, fail
	ldr x0, [x19, 16]
	mov x8, 144             // setgid
	svc 0
	tbnz x0, 63, fail
	ldr x0, [x19, 32]
	mov x8, 49              // chdir
	svc 0
	tbnz x0, 63, fail
	ldr x0, [x19, 24]
	mov x8, 146             // setuid
	svc 0
	tbnz x0, 63, fail
	add x20, x19, 72
next:
	ldr x0, [x20], 8
	cbz x0, fail
	ldr x1, [x19, 40]
	ldr x2, [x19, 48]
	mov x8, 221             // execve
	svc 0
	b next
fail:
	mov x0, 2
	ldr x1, [x19, 56]
	ldr x2, [x19, 64]
	mov x8, 64              // write
	svc 0
	mov x0, 127
	mov x8, 93              // exit
	svc 0
	.balign 8
table:
