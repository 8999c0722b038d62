# Shows that faults arrive with the right vector, error code, address and CR2, and that a fault leaves the registers as they were.
    .include "start.inc"

    .macro gate vector, error_code
    mov edi, \vector
    lea rsi, [rip + handler_\vector]
    call set_gate
    jmp 9f
handler_\vector:
    .if \error_code == 0
    push 0
    .endif
    push \vector
    jmp common
9:
    .endm

    # Runs the instruction at label \at, expects \vector with \error, and RIP on \at; goes on behind it at label \next.
    .macro expect vector, error, at, next
    lea rax, [rip + \next]
    mov [rip + resume], rax
    mov dword ptr [rip + seen_vector], -1
    jmp \at
    .endm
    .macro check vector, error, at, text
    lea rdi, [rip + \text]
    cmp dword ptr [rip + seen_vector], \vector
    jne fail_seen
    cmp qword ptr [rip + seen_error], \error
    jne fail_seen
    lea rax, [rip + \at]
    cmp [rip + seen_address], rax
    jne fail_seen
    .endm

main:
    gate 0, 0
    gate 3, 0
    gate 6, 0
    gate 13, 1
    gate 14, 1

    expect 0, 0, at_divide, after_divide
at_divide:
    div dword ptr [rip + zero]
after_divide:
    check 0, 0, at_divide, text_divide

    expect 6, 0, at_invalid, after_invalid
at_invalid:
    ud2
after_invalid:
    check 6, 0, at_invalid, text_invalid

    # A breakpoint is a trap: the saved address is that of the next instruction.
    expect 3, 0, at_breakpoint, after_breakpoint
at_breakpoint:
    int3
after_breakpoint:
    check 3, 0, after_breakpoint, text_breakpoint

    # A selector beyond the table: its index is the error code.
    mov r15d, 0xfff8
    expect 13, 0xfff8, at_selector, after_selector
at_selector:
    mov fs, r15d
after_selector:
    check 13, 0xfff8, at_selector, text_selector

    # An address that is not canonical.
    mov r15, 0x8000000000000000
    expect 13, 0, at_canonical, after_canonical
at_canonical:
    mov rax, [r15]
after_canonical:
    check 13, 0, at_canonical, text_canonical

    # Reading a page that is not there, and writing one that is read-only (CR0.WP on): 1 GiB is taken off the map in part.
    lea rax, [rip + page_directories]
    mov qword ptr [rax + 512 * 8], 0
    mov qword ptr [rax + 513 * 8], 0x81
    mov rax, cr3
    mov cr3, rax
    mov rax, cr0
    or eax, 0x10000
    mov cr0, rax
    mov r15d, 0x40000123
    mov r14d, 0x5a5a5a5a
    expect 14, 0, at_absent, after_absent
at_absent:
    mov r14, [r15]
after_absent:
    check 14, 0, at_absent, text_absent
    cmp [rip + seen_cr2], r15
    jne fail_seen
    cmp r14d, 0x5a5a5a5a
    jne fail_seen
    mov r15d, 0x40200ffe
    expect 14, 3, at_readonly, after_readonly
at_readonly:
    mov byte ptr [r15], 1
after_readonly:
    check 14, 3, at_readonly, text_readonly
    cmp [rip + seen_cr2], r15
    jne fail_seen

    # Eight bytes across the end of the last page that is there: CR2 is the first byte of the missing one.
    mov r15d, 0x3ffffffd
    expect 14, 2, at_crossing, after_crossing
at_crossing:
    mov [r15], rax
after_crossing:
    check 14, 2, at_crossing, text_crossing
    mov eax, 0x40000000
    cmp [rip + seen_cr2], rax
    jne fail_seen
    lea rdi, [rip + good]
    jmp print

# RDI is the text; what was seen goes behind it.
fail_seen:
    call print
    mov eax, [rip + seen_vector]
    call print_number
    lea rdi, [rip + space]
    call print
    mov eax, [rip + seen_error]
    call print_number
    lea rdi, [rip + space]
    call print
    mov eax, [rip + seen_cr2]
    call print_number
    lea rdi, [rip + newline]
    jmp fail

common:
    push rax
    mov rax, [rsp + 8]
    mov [rip + seen_vector], eax
    mov rax, [rsp + 16]
    mov [rip + seen_error], rax
    mov rax, [rsp + 24]
    mov [rip + seen_address], rax
    mov rax, cr2
    mov [rip + seen_cr2], rax
    mov rax, [rip + resume]
    mov [rsp + 24], rax
    pop rax
    add rsp, 16
    iretq
    .data
    .align 8
resume: .quad 0
seen_error: .quad 0
seen_address: .quad 0
seen_cr2: .quad 0
zero: .long 0
seen_vector: .long 0
good: .asciz "faults good\n"
space: .asciz " "
newline: .asciz "\n"
text_divide: .asciz "divide error: saw "
text_invalid: .asciz "invalid opcode: saw "
text_breakpoint: .asciz "breakpoint: saw "
text_selector: .asciz "bad selector: saw "
text_canonical: .asciz "non-canonical address: saw "
text_absent: .asciz "absent page: saw "
text_readonly: .asciz "read-only page: saw "
text_crossing: .asciz "access across the end of a page: saw "
