//! Prints how fast the engine runs a few small loops, in million instructions a second:
//! `cargo run --release -p polder-software --example mips`.

use std::time::Instant;

use polder_software::testbench::{CODE, DATA, STACK, TestBench};

/// A loop as bytes, entered at its first byte.
struct Loop {
    name: &'static str,
    code: &'static [u8],
}

const LOOPS: [Loop; 10] = [
    // add rax, rbx; xor rcx, rax; lea rdx, [rcx+rax]; shr rdx, 3; cmp rdx, rax; je +0; jmp back
    Loop {
        name: "registers",
        code: &[
            0x48, 0x01, 0xd8, 0x48, 0x31, 0xc1, 0x48, 0x8d, 0x14, 0x01, 0x48, 0xc1, 0xea, 0x03, 0x48, 0x39, 0xc2, 0x74,
            0x00, 0xeb, 0xeb,
        ],
    },
    // dec rcx; jnz back; jmp back
    Loop { name: "count down", code: &[0x48, 0xff, 0xc9, 0x75, 0xfb, 0xeb, 0xf9] },
    // mov rax, [rsi]; add rax, [rsi+8]; mov [rsi+16], rax; movzx edx, byte [rsi]; inc dword [rsi+24]; jmp back
    Loop {
        name: "memory",
        code: &[
            0x48, 0x8b, 0x06, 0x48, 0x03, 0x46, 0x08, 0x48, 0x89, 0x46, 0x10, 0x0f, 0xb6, 0x16, 0xff, 0x46, 0x18, 0xeb,
            0xed,
        ],
    },
    // call +2; jmp back; push rbp; mov rbp, rsp; pop rbp; ret
    Loop { name: "calls", code: &[0xe8, 2, 0, 0, 0, 0xeb, 0xf9, 0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3] },
    // mov rax, rcx; and eax, 1; test eax, eax; jz +3; add rbx, 1(3 bytes: 48 ff c3 inc rbx); inc rcx; cmp rcx, 0; jne back
    Loop {
        name: "branches",
        code: &[
            0x48, 0x89, 0xc8, 0x83, 0xe0, 0x01, 0x85, 0xc0, 0x74, 0x03, 0x48, 0xff, 0xc3, 0x48, 0xff, 0xc1, 0x48, 0x83,
            0xf9, 0x00, 0x75, 0xea, 0xeb, 0xe8,
        ],
    },
    // movaps xmm0, [rsi]; mulps xmm0, xmm1; addps xmm0, xmm2; movaps [rsi+16], xmm0; jmp back
    Loop {
        name: "packed floats",
        code: &[0x0f, 0x28, 0x06, 0x0f, 0x59, 0xc1, 0x0f, 0x58, 0xc2, 0x0f, 0x29, 0x46, 0x10, 0xeb, 0xf1],
    },
    // movsd xmm0, [rsi]; mulsd xmm0, xmm1; addsd xmm0, [rsi+8]; movsd [rsi+16], xmm0; jmp back
    Loop {
        name: "scalar doubles",
        code: &[
            0xf2, 0x0f, 0x10, 0x06, 0xf2, 0x0f, 0x59, 0xc1, 0xf2, 0x0f, 0x58, 0x46, 0x08, 0xf2, 0x0f, 0x11, 0x46, 0x10,
            0xeb, 0xec,
        ],
    },
    // movdqu xmm0, [rsi]; paddd xmm0, xmm1; pshufd xmm2, xmm0, 27; pxor xmm2, xmm1; jmp back
    Loop {
        name: "packed integers",
        code: &[
            0xf3, 0x0f, 0x6f, 0x06, 0x66, 0x0f, 0xfe, 0xc1, 0x66, 0x0f, 0x70, 0xd0, 0x1b, 0x66, 0x0f, 0xef, 0xd1, 0xeb,
            0xed,
        ],
    },
    // fld qword [rsi]; fmul qword [rsi+8]; fstp qword [rsi+16]; jmp back
    Loop { name: "x87", code: &[0xdd, 0x06, 0xdc, 0x4e, 0x08, 0xdd, 0x5e, 0x10, 0xeb, 0xf6] },
    // mov ecx, 4096; mov rdi, rsi; rep stosb; jmp back
    Loop { name: "rep stosb of 4 KiB", code: &[0xb9, 0, 0x10, 0, 0, 0x48, 0x89, 0xf7, 0xf3, 0xaa, 0xeb, 0xf4] },
];

fn main() {
    for looped in &LOOPS {
        let mut bench = TestBench::new();
        bench.write(CODE, looped.code);
        bench.cpu.gpr[6] = DATA;
        bench.cpu.gpr[4] = STACK;
        bench.write(CODE - 2, &[0xdb, 0xe3]);
        bench.cpu.rip = CODE - 2;
        bench.run(1_000_000);
        let before = bench.cpu.instructions;
        let start = Instant::now();
        bench.run(50_000_000);
        let instructions = bench.cpu.instructions - before;
        let nanoseconds = start.elapsed().as_nanos() as f64;
        println!("{:24} {:7.1} MIPS", looped.name, instructions as f64 * 1000.0 / nanoseconds);
    }
}
