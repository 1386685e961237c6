# Enlarges a mounted ext4 while it is in use: grow MOUNTPOINT BLOCKS. amd64.
	.intel_syntax noprefix
	.text
	mov rdi, [rsp + 16]     # argv[1]: the mount point
	xor esi, esi
	mov eax, 2              # open
	syscall
	test eax, eax
	js leave
	mov ebx, eax
	mov rsi, [rsp + 24]     # argv[2]: the number of blocks, in decimal
	xor eax, eax
digit:
	movzx ecx, byte ptr [rsi]
	sub ecx, 0x30
	jb found
	imul rax, rax, 10
	add rax, rcx
	inc rsi
	jmp digit
found:
	push rax
	mov edi, ebx
	mov esi, 0x40086610     # EXT4_IOC_RESIZE_FS
	mov rdx, rsp
	mov eax, 16             # ioctl
	syscall
leave:
	mov edi, eax
	neg edi
	mov eax, 60             # exit
	syscall
