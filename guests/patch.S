# Shows that vCPUs may change the code that others run meanwhile, in the two ways that are allowed (SDM vol. 3, 9.1.3): one instruction
# behind a breakpoint, as kernels do it, and a function behind a flag. Each vCPU runs, patches and is interrupted; whatever runs must be a
# version that was valid. Beside that each runs so many other functions that a small cache of translated code is always full. The command line is "cpus=N".
    .include "start.inc"
    .include "smp.inc"
    .set SYNC, 0x40                     # the interrupt that makes a vCPU take notice of changed code
    .set SITES, 32                      # places of 16 bytes that are patched; half of them load a number, half of them jump
    .set TARGETS, 1024                  # where the jumps go: no site is patched more often
    .set PATCHES, 100                   # made by each vCPU
    .set CALLS, 40                      # calls of sites between two patches
    .set FILLERS, 1024                  # functions that fill the cache of translated code
    .set FILLER_BYTES, 512
    .set FILLER_STORES, 40
main:
    mov al, 0xff                        # no interrupts from PICs, where a machine has them
    out 0x21, al
    out 0xa1, al
    push rsi
    call write_code
    mov edi, 3
    lea rsi, [rip + breakpoint]
    call set_gate
    mov edi, SYNC
    lea rsi, [rip + synchronize]
    call set_gate
    mov edi, 0xff
    lea rsi, [rip + spurious]
    call set_gate
    pop rsi
    call start_others
    call work
    lea rdi, [rip + good]
    call print
    mov eax, [rip + breakpoints]
    call print_number
    lea rdi, [rip + messages_text]
    call print
    mov eax, [rip + messages]
    call print_number
    lea rdi, [rip + newline]
    jmp print

# Sites, jumps to them, targets of their jumps, and fillers, as they are at first.
write_code:
    lea rdi, [rip + sites]
    xor ecx, ecx
1:  test ecx, 1
    jnz 2f
    mov byte ptr [rdi], 0xb8            # mov eax, 0
    mov dword ptr [rdi + 1], 0
    jmp 3f
2:  mov byte ptr [rdi], 0xe9            # jmp targets
    lea rax, [rip + targets - 5]
    sub rax, rdi
    mov [rdi + 1], eax
3:  mov byte ptr [rdi + 5], 0xc3
    add rdi, 16
    inc ecx
    cmp ecx, SITES
    jne 1b
    lea rdi, [rip + jumps_here]
    call write_jumps
    lea rdi, [rip + jumps_there]
    call write_jumps
    lea rdi, [rip + targets]
    xor ecx, ecx
4:  mov byte ptr [rdi], 0xb8            # mov eax, number
    mov [rdi + 1], ecx
    mov byte ptr [rdi + 5], 0xc3
    add rdi, 16
    inc ecx
    cmp ecx, TARGETS
    jne 4b
    lea rdi, [rip + fillers]
    xor ecx, ecx
5:  mov rsi, rdi
    mov edx, 1
6:  mov dword ptr [rsi], 0x24848948     # mov [rsp - 8 * n], rax
    imul eax, edx, -8
    mov [rsi + 4], eax
    add rsi, 8
    inc edx
    cmp edx, FILLER_STORES
    jbe 6b
    mov byte ptr [rsi], 0xb8            # mov eax, number
    mov [rsi + 1], ecx
    mov byte ptr [rsi + 5], 0xc3
    add rdi, FILLER_BYTES
    inc ecx
    cmp ecx, FILLERS
    jne 5b
    ret

# Jumps to each of the sites, at RDI.
write_jumps:
    lea rax, [rip + sites - 5]
    sub rax, rdi
    mov ecx, SITES
1:  mov byte ptr [rdi], 0xe9
    mov [rdi + 1], eax
    add rdi, 16
    loop 1b
    ret

# What each vCPU does. R15: its number; R14: random bits; R13: patches that it has yet to make.
work:
    mov r15d, 1
    lock xadd [rip + next_number], r15d
    imul r14d, r15d, 0x9e3779b9
    add r14d, 12345
    mov r13d, PATCHES
    mov ebx, APIC
    mov dword ptr [rbx + 0xf0], 0x1ff
    mov dword ptr [rbx + 0x80], 0
    sti
    lock inc dword ptr [rip + started_vcpus]
1:  pause
    mov eax, [rip + started_vcpus]
    cmp eax, [rip + cpus]
    jne 1b
2:  mov r12d, CALLS
3:  call run_site
    call run_filler
    dec r12d
    jnz 3b
    call read_message
    call write_message
    call patch_site
    test r13d, r13d
    jnz 2b
    lock inc dword ptr [rip + finished]
    # The others may still wait for this vCPU's answers.
4:  call run_site
    call read_message
    mov eax, [rip + finished]
    cmp eax, [rip + cpus]
    jne 4b
    ret

# The next random number: EAX.
random:
    mov eax, r14d
    shl eax, 13
    xor r14d, eax
    mov eax, r14d
    shr eax, 17
    xor r14d, eax
    mov eax, r14d
    shl eax, 5
    xor r14d, eax
    mov eax, r14d
    shr eax, 7
    ret

# Runs a site, by its address or by a jump in its page or in another. The version that has run was begun by now, and not older than the last one that all vCPUs had been told of before.
run_site:
    call random
    and eax, SITES - 1
    mov esi, eax
    lea rdx, [rip + sites]
    lea rcx, [rip + jumps_here]
    test r14d, 1 << 20
    cmovnz rdx, rcx
    lea rcx, [rip + jumps_there]
    test r14d, 1 << 21
    cmovnz rdx, rcx
    shl eax, 4
    add rdx, rax
    lea rcx, [rip + complete]
    mov ebp, [rcx + rsi * 4]
    call rdx
    lea rcx, [rip + begun]
    mov ecx, [rcx + rsi * 4]
    lea rdi, [rip + stale]
    cmp eax, ebp
    jb fail
    lea rdi, [rip + unborn]
    cmp eax, ecx
    ja fail
    ret

run_filler:
    call random
    and eax, FILLERS - 1
    mov esi, eax
    imul eax, eax, FILLER_BYTES
    lea rdx, [rip + fillers]
    add rdx, rax
    call rdx
    lea rdi, [rip + wrong_filler]
    cmp eax, esi
    jne fail
    ret

# Patches a site that nobody else patches just now: a breakpoint over its first byte, the rest, the first byte, and after each all vCPUs are told.
patch_site:
    call random
    and eax, SITES - 1
    mov ebp, eax
    lock bts [rip + locks], ebp
    jc 3f
    lea rcx, [rip + begun]
    inc dword ptr [rcx + rbp * 4]
    mov esi, ebp
    shl esi, 4
    lea rdx, [rip + sites]
    add rsi, rdx
    mov byte ptr [rsi], 0xcc
    call tell_all
    lea rcx, [rip + begun]
    mov eax, [rcx + rbp * 4]
    mov r8d, 0xb8
    test ebp, 1
    jz 1f
    mov r8d, 0xe9
    shl eax, 4
    lea rdx, [rip + targets - 5]
    add rax, rdx
    sub rax, rsi
1:  mov [rsi + 1], eax
    call tell_all
    mov [rsi], r8b
    call tell_all
    lea rcx, [rip + begun]
    mov eax, [rcx + rbp * 4]
    lea rcx, [rip + complete]
    mov [rcx + rbp * 4], eax
    lock btr [rip + locks], ebp
    dec r13d
3:  ret

# Comes back when every vCPU has run a serializing instruction. Clobbers RAX, RBX, RCX, RDX, R9, R10.
tell_all:
    mov r9d, 1
    lock xadd [rip + told], r9d
    inc r9d
    mov ebx, APIC
    mov dword ptr [rbx + 0x300], 0xc0000 | SYNC     # to all others
    xor r10d, r10d
1:  cmp r10d, r15d
    je 3f
    lea rcx, [rip + heard]
2:  mov eax, [rcx + r10 * 4]
    sub eax, r9d
    jns 3f
    pause
    jmp 2b
3:  inc r10d
    cmp r10d, [rip + cpus]
    jne 1b
    xor eax, eax
    cpuid
    ret

# The interrupt of `tell_all`. Its return serializes: no instruction after it was fetched before.
synchronize:
    push rax
    push rcx
    mov eax, [rip + told]
    lea rcx, [rip + heard]
    mov [rcx + r15 * 4], eax
    mov eax, APIC
    mov dword ptr [rax + 0xb0], 0
    pop rcx
    pop rax
spurious:
    iretq

# A breakpoint was met: the instruction is run again until it is whole.
breakpoint:
    push rax
    mov rax, [rsp + 8]
    dec rax
    mov [rsp + 8], rax
    push rdx
    lea rdx, [rip + sites]
    sub rax, rdx
    pop rdx
    cmp rax, SITES * 16
    jae 1f
    lock inc dword ptr [rip + breakpoints]
    pause
    pop rax
    iretq
1:  lea rdi, [rip + foreign_breakpoint]
    jmp fail

# A message to the next vCPU: a function that returns its number, of another length each time, behind a flag.
write_message:
    lea eax, [r15 + 1]
    cmp eax, [rip + cpus]
    jne 1f
    xor eax, eax
1:  lea rsi, [rip + flags]
    lea rsi, [rsi + rax * 4]
    cmp dword ptr [rsi], 0
    jne 3f
    shl eax, 12
    lea rdi, [rip + message_code]
    add rdi, rax
    call random
    or eax, 1
    mov edx, eax
    mov ecx, eax
    shr ecx, 3
    and ecx, 15
    mov al, 0x90                        # some NOPs
    rep stosb
    mov byte ptr [rdi], 0xb8            # mov eax, number
    mov [rdi + 1], edx
    mov byte ptr [rdi + 5], 0xc3
    mov [rsi], edx
3:  ret

read_message:
    lea rsi, [rip + flags]
    mov ebp, [rsi + r15 * 4]
    test ebp, ebp
    jz 1f
    xor eax, eax
    cpuid
    mov eax, r15d
    shl eax, 12
    lea rdx, [rip + message_code]
    add rdx, rax
    call rdx
    lea rdi, [rip + wrong_message]
    cmp eax, ebp
    jne fail
    lock inc dword ptr [rip + messages]
    mov dword ptr [rsi + r15 * 4], 0
1:  ret

    .data
    .align 4
next_number: .long 0
started_vcpus: .long 0
finished: .long 0
told: .long 0
locks: .long 0
breakpoints: .long 0
messages: .long 0
heard: .skip 8 * 4
flags: .skip 8 * 4
begun: .skip SITES * 4
complete: .skip SITES * 4
good: .asciz "patch good, breakpoints "
messages_text: .asciz ", messages "
newline: .asciz "\n"
stale: .asciz "a site ran as it was before a change that everybody had been told of\n"
unborn: .asciz "a site ran as it never was\n"
wrong_filler: .asciz "a function that nobody changed ran as another\n"
wrong_message: .asciz "a function behind a flag ran as it was before\n"
foreign_breakpoint: .asciz "a breakpoint was met where none was set\n"
    .bss
    .align 4096
sites: .skip SITES * 16
jumps_here: .skip SITES * 16
    .align 4096
jumps_there: .skip SITES * 16
    .align 4096
targets: .skip TARGETS * 16
    .align 4096
message_code: .skip 8 * 4096
fillers: .skip FILLERS * FILLER_BYTES
