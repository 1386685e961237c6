# Becomes the user that the table names, enters the directory and runs the first program found. amd64.
# The table: see launcher.py.
	.intel_syntax noprefix
	.text
	lea r12, [rip + table]
	mov edi, [r12]
	mov rsi, [r12 + 8]
	mov eax, 116            # setgroups
	syscall
	test eax, eax
	js fail
	mov edi, [r12 + 16]
	mov eax, 106            # setgid
	syscall
	test eax, eax
	js fail
	mov rdi, [r12 + 32]
	mov eax, 80             # chdir
	syscall
	test eax, eax
	js fail
	mov edi, [r12 + 24]
	mov eax, 105            # setuid
	syscall
	test eax, eax
	js fail
	lea rbx, [r12 + 72]
next:
	mov rdi, [rbx]
	test rdi, rdi
	jz fail
	add rbx, 8
	mov rsi, [r12 + 40]
	mov rdx, [r12 + 48]
	mov eax, 59             # execve; it returns only where it failed
	syscall
	jmp next
fail:
	mov edi, 2
	mov rsi, [r12 + 56]
	mov edx, [r12 + 64]
	mov eax, 1              # write
	syscall
	mov edi, 127
	mov eax, 60             # exit
	syscall
	.balign 8, 0xcc
table:
