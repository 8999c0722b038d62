# Shows entry and serial output.
    .include "start.inc"
main:
    lea rdi, [rip + text]
    jmp print
    .data
text: .asciz "hello from a tiny guest\n"
