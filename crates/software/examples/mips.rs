//! Prints how fast the engine runs a few small loops, in million instructions a second:
//! `cargo run --release -p polder-software --example mips`.

use std::time::Instant;

use polder_software::testbench::{CODE, DATA, STACK, TestBench};

/// A loop as bytes, entered at its first byte.
struct Loop {
    name: &'static str,
    code: &'static [u8],
}

const LOOPS: [Loop; 6] = [
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
    // mov ecx, 4096; mov rdi, rsi; rep stosb; jmp back
    Loop { name: "rep stosb of 4 KiB", code: &[0xb9, 0, 0x10, 0, 0, 0x48, 0x89, 0xf7, 0xf3, 0xaa, 0xeb, 0xf4] },
];

fn main() {
    for looped in &LOOPS {
        let mut bench = TestBench::new();
        bench.write(CODE, looped.code);
        bench.cpu.gpr[6] = DATA;
        bench.cpu.gpr[4] = STACK;
        bench.run(1_000_000);
        let before = bench.cpu.instructions;
        let start = Instant::now();
        bench.run(100_000_000);
        let instructions = bench.cpu.instructions - before;
        let nanoseconds = start.elapsed().as_nanos() as f64;
        println!("{:24} {:7.1} MIPS", looped.name, instructions as f64 * 1000.0 / nanoseconds);
    }
}
