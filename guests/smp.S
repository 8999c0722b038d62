# Shows that every other vCPU starts by INIT and SIPI and that locked additions from all of them lose nothing. The command line
# says how many vCPUs there are: "cpus=N", N from 1 to 8.
    .include "start.inc"
    .set APIC, 0xfee00000
    .set ROUNDS, 20000
    .set TRAMPOLINE, 0x8000
main:
    mov rdi, [rsi + 24]                 # command line
1:  mov al, [rdi]
    inc rdi
    test al, al
    jz 2f
    cmp al, '='
    jne 1b
    movzx eax, byte ptr [rdi]
    sub eax, '0'
    mov [rip + cpus], eax
2:  lea rsi, [rip + trampoline]
    mov edi, TRAMPOLINE
    mov ecx, offset trampoline_end - trampoline
    rep movsb
    mov ebx, APIC
    mov dword ptr [rbx + 0xf0], 0x1ff
    cmp dword ptr [rip + cpus], 1
    je 3f
    mov dword ptr [rbx + 0x300], 0xc4500                    # INIT to all others
    mov dword ptr [rbx + 0x300], 0xc4600 | TRAMPOLINE >> 12 # SIPI to all others
3:  call work
    lea rdi, [rip + missing]
    mov rcx, 20000000000
4:  mov eax, [rip + finished]
    cmp eax, [rip + cpus]
    je 5f
    pause
    dec rcx
    jnz 4b
    jmp fail
5:  lea rdi, [rip + lost]
    mov eax, [rip + cpus]
    imul eax, eax, ROUNDS
    cmp rax, [rip + sum]
    jne fail
    cmp rax, [rip + sum_by_exchange]
    jne fail
    lea rdi, [rip + good]
    call print
    mov eax, [rip + cpus]
    call print_number
    lea rdi, [rip + newline]
    jmp print

# What each vCPU does: ROUNDS locked additions, and as many by compare and exchange.
work:
    mov ecx, ROUNDS
1:  lock inc qword ptr [rip + sum]
    mov rax, [rip + sum_by_exchange]
2:  lea rdx, [rax + 1]
    lock cmpxchg [rip + sum_by_exchange], rdx
    jne 2b
    dec ecx
    jnz 1b
    lock inc dword ptr [rip + finished]
    ret

    .code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [TRAMPOLINE + short_pointer - trampoline]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # far jump to 32-bit code
    .long ap_32
    .word CODE32
    .align 4
short_pointer:
    .word 31
    .long gdt
trampoline_end:
    .code32
ap_32:
    mov eax, DATA
    mov ds, eax
    mov ss, eax
    mov eax, 4096
    lock xadd [next_stack], eax
    lea esp, [eax + 4096]
    call to_long_mode_32
    ljmp CODE64, offset ap_64
    .code64
ap_64:
    call work
    jmp halt
    .data
    .align 8
sum: .quad 0
sum_by_exchange: .quad 0
next_stack: .long ap_stacks
cpus: .long 1
finished: .long 0
good: .asciz "smp good "
newline: .asciz "\n"
missing: .asciz "a vCPU did not start\n"
lost: .asciz "a locked addition was lost\n"
    .bss
    .align 16
ap_stacks: .skip 8 * 4096
