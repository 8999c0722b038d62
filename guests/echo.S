# Types back what is typed at the serial console; q powers off through ACPI, c reports a kernel panic.
    .include "start.inc"
    .set ACPI_SLEEP_CONTROL, 0xfed00004
    .set POWER_OFF, 0x34            # SLP_EN, SLP_TYP 5
    .set PVPANIC, 0x505
main:
    lea rdi, [rip + text]
    call print
1:  pause
    mov dx, COM1 + 5
    in al, dx
    test al, 1
    jz 1b
    mov dx, COM1
    in al, dx
    cmp al, 'q'
    je 2f
    cmp al, 'c'
    je 3f
    mov [rip + typed], al
    lea rdi, [rip + typed]
    call print
    jmp 1b
2:  mov edi, ACPI_SLEEP_CONTROL
    mov byte ptr [rdi], POWER_OFF
    jmp halt
3:  mov dx, PVPANIC
    mov al, 1
    out dx, al
    jmp halt
    .data
text: .asciz "echo ready\n"
typed: .word 0
