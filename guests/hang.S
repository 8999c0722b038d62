# A vCPU that halts for ever with interrupts off: only a time limit ends it.
    .include "start.inc"
main:
    lea rdi, [rip + text]
    call print
    jmp halt
    .data
text: .asciz "halting for ever\n"
