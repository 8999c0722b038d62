# Shows that a write to the reset port asks for a reset.
    .include "start.inc"
main:
    mov dx, 0xcf9
    mov al, 6
    out dx, al
    mov ecx, 1000000000
1:  pause
    dec ecx
    jnz 1b
    lea rdi, [rip + text]
    jmp fail
    .data
text: .asciz "the machine went on after a reset\n"
