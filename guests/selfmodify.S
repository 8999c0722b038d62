# Shows that changed code is what runs next: a function whose constant changes between calls, an instruction changed just ahead
# of itself in the same run of instructions, and code changed through a second mapping of its page.
    .include "start.inc"
    .set ROUNDS, 3000
main:
    # 1. A function written anew before each call.
    xor r12d, r12d
1:  lea rbx, [rip + written]
    mov byte ptr [rbx], 0xb8            # mov eax, constant
    mov [rbx + 1], r12d
    mov byte ptr [rbx + 5], 0xc3        # ret
    call rbx
    lea rdi, [rip + stale_function]
    cmp eax, r12d
    jne fail
    inc r12d
    cmp r12d, ROUNDS
    jb 1b
    # 2. An instruction changed two instructions before it runs, without a branch between.
    xor r12d, r12d
2:  mov [rip + ahead + 1], r12d
    nop
ahead:
    mov eax, 0xffffffff
    lea rdi, [rip + stale_ahead]
    cmp eax, r12d
    jne fail
    inc r12d
    cmp r12d, ROUNDS
    jb 2b
    # 3. The same function changed through another linear address: page directory entry 1024 (2 GiB) shows the first 4 MiB again.
    lea rax, [rip + page_directories]
    mov qword ptr [rax + 1024 * 8], 0x83
    mov qword ptr [rax + 1025 * 8], 0x200083
    mov rax, cr3
    mov cr3, rax
    xor r12d, r12d
3:  lea rbx, [rip + written]
    mov eax, 0x80000000
    lea r13, [rbx + rax]
    mov [r13 + 1], r12d
    call rbx
    lea rdi, [rip + stale_alias]
    cmp eax, r12d
    jne fail
    # 4. And run through the second mapping after a change through the first.
    lea r14d, [r12 + 7]
    mov [rbx + 1], r14d
    call r13
    cmp eax, r14d
    jne fail
    inc r12d
    cmp r12d, ROUNDS
    jb 3b
    lea rdi, [rip + good]
    jmp print
    .data
good: .asciz "selfmodify good\n"
stale_function: .asciz "a function ran as it was before the change\n"
stale_ahead: .asciz "an instruction changed ahead of itself ran as it was before\n"
stale_alias: .asciz "a change through a second mapping was not seen\n"
    .bss
    .align 64
written: .skip 64
