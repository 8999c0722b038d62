# Shows that a triple fault ends the machine: an invalid opcode with an empty IDT.
    .include "start.inc"
main:
    lidt [rip + empty]
    ud2
    .data
    .align 8
empty: .word 0
    .quad 0
