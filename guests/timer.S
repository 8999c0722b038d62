# Shows that the local APIC timer interrupts a halted vCPU: ten one-shot timers, then a hundred ticks of a periodic one.
    .include "start.inc"
    .set APIC, 0xfee00000
    .set VECTOR, 0x40
main:
    mov edi, VECTOR
    lea rsi, [rip + tick]
    call set_gate
    mov edi, 0xff
    lea rsi, [rip + spurious]
    call set_gate
    mov ebx, APIC
    mov dword ptr [rbx + 0xf0], 0x1ff   # APIC on, spurious vector 0xff
    mov dword ptr [rbx + 0x80], 0       # every priority
    mov dword ptr [rbx + 0x3e0], 0xb    # divide by one
    mov r12d, 10
1:  mov dword ptr [rbx + 0x320], VECTOR # one-shot
    mov eax, [rip + ticks]
    lea r13d, [rax + 1]
    mov dword ptr [rbx + 0x380], 100000
    call wait_for_r13d
    dec r12d
    jnz 1b
    # A one-shot timer has run out: its count is zero.
    lea rdi, [rip + still_counting]
    cmp dword ptr [rbx + 0x390], 0
    jne fail
    mov dword ptr [rbx + 0x320], VECTOR | 0x20000   # periodic
    mov eax, [rip + ticks]
    lea r13d, [rax + 100]
    mov dword ptr [rbx + 0x380], 200000
    call wait_for_r13d
    mov dword ptr [rbx + 0x320], 0x10000            # masked
    lea rdi, [rip + good]
    jmp print

# Halts until the count of ticks reaches R13D. STI and HLT are one step: no tick falls between them.
wait_for_r13d:
    cli
    cmp [rip + ticks], r13d
    jae 1f
    sti
    hlt
    jmp wait_for_r13d
1:  ret

tick:
    inc dword ptr [rip + ticks]
    push rax
    mov eax, APIC
    mov dword ptr [rax + 0xb0], 0
    pop rax
spurious:
    iretq
    .data
ticks: .long 0
good: .asciz "timer good\n"
still_counting: .asciz "a one-shot timer went on counting\n"
