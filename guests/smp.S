# Shows that every other vCPU starts by INIT and SIPI and that locked additions from all of them lose nothing. The command line
# says how many vCPUs there are: "cpus=N", N from 1 to 8.
    .include "start.inc"
    .include "smp.inc"
    .set ROUNDS, 20000
main:
    call start_others
    call work
    lea rdi, [rip + missing]
    mov rcx, 20000000000
1:  mov eax, [rip + finished]
    cmp eax, [rip + cpus]
    je 2f
    pause
    dec rcx
    jnz 1b
    jmp fail
2:  lea rdi, [rip + lost]
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
    .data
    .align 8
sum: .quad 0
sum_by_exchange: .quad 0
finished: .long 0
good: .asciz "smp good "
newline: .asciz "\n"
missing: .asciz "a vCPU did not start\n"
lost: .asciz "a locked addition was lost\n"
