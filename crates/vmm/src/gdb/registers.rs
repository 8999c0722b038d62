//! The registers as gdb knows them: names, sizes and order.
//!
//! gdb is told by a target description (GDB manual, appendix G). The features `org.gnu.gdb.i386.*` and the names in them are gdb's own
//! (G.5.15); the control registers have a feature of ours, which gdb shows as it is told.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

use gdbstub::arch::{Arch, RegId, Registers};
use polder_machine::{VcpuState, VectorRegisters};

const GENERAL: [&str; 16] =
    ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
/// Where gdb's general registers are in [`VcpuState::gpr`].
const GENERAL_INDEX: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
const SEGMENTS: [&str; 6] = ["cs", "ss", "ds", "es", "fs", "gs"];
/// Where gdb's segment registers are in [`VcpuState::segments`].
const SEGMENT_INDEX: [usize; 6] = [1, 2, 3, 0, 4, 5];
const FLOAT_CONTROL: [&str; 8] = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"];
const CONTROL: [&str; 6] = ["cr0", "cr2", "cr3", "cr4", "cr8", "efer"];

const RIP: usize = 16;
const EFLAGS: usize = 17;
const SEGMENT: usize = 18;
const ST: usize = 24;
const FLOAT: usize = 32;
const XMM: usize = 40;
const MXCSR: usize = 56;
const FS_BASE: usize = 57;
const GS_BASE: usize = 58;
const YMM_HIGH: usize = 59;
const SYSTEM: usize = 75;
const COUNT: usize = SYSTEM + CONTROL.len();
/// The widest register.
const BYTES_MAX: usize = 16;

/// Places in an FXSAVE64 area (SDM vol. 1, table 10-2).
mod fxsave {
    pub const CONTROL: usize = 0;
    pub const STATUS: usize = 2;
    pub const TAG: usize = 4;
    pub const OPCODE: usize = 6;
    pub const INSTRUCTION: usize = 8;
    pub const DATA: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
}

/// x86-64 as gdb sees it.
pub(super) enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = GuestRegisters;
    type BreakpointKind = usize;
    type RegId = RegisterNumber;

    fn target_description_xml() -> Option<&'static str> {
        Some(&DESCRIPTION)
    }
}

/// A register by gdb's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegisterNumber(usize);

impl RegId for RegisterNumber {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        (id < COUNT).then(|| (RegisterNumber(id), NonZeroUsize::new(bytes_of(id))))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}

fn bytes_of(number: usize) -> usize {
    match number {
        EFLAGS..ST | FLOAT..XMM | MXCSR => 4,
        ST..FLOAT => 10,
        XMM..MXCSR | YMM_HIGH..SYSTEM => 16,
        _ => 8,
    }
}

/// All registers of a vCPU that gdb knows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GuestRegisters {
    pub(super) state: VcpuState,
    pub(super) vector: VectorRegisters,
}

impl Default for GuestRegisters {
    fn default() -> Self {
        let vector = VectorRegisters { fxsave: [0; 512], ymm_high: [0; 16] };
        GuestRegisters { state: VcpuState::power_on(true), vector }
    }
}

impl GuestRegisters {
    /// A register's value, and how many of its bytes there are.
    pub(super) fn get(&self, number: RegisterNumber) -> ([u8; BYTES_MAX], usize) {
        let state = &self.state;
        let value = match number.0 {
            number @ 0..RIP => state.gpr[GENERAL_INDEX[number]].into(),
            RIP => state.rip.into(),
            EFLAGS => state.rflags.into(),
            number @ SEGMENT..ST => state.segments[SEGMENT_INDEX[number - SEGMENT]].selector.into(),
            number @ ST..FLOAT => self.image(fxsave::ST + 16 * (number - ST), 10),
            number @ FLOAT..XMM => self.float_control(number - FLOAT),
            number @ XMM..MXCSR => self.image(fxsave::XMM + 16 * (number - XMM), 16),
            MXCSR => self.image(fxsave::MXCSR, 4),
            FS_BASE => state.segments[4].base.into(),
            GS_BASE => state.segments[5].base.into(),
            number @ YMM_HIGH..SYSTEM => self.vector.ymm_high[number - YMM_HIGH],
            number => {
                let values = [state.cr0, state.cr2, state.cr3, state.cr4, state.cr8, state.efer];
                values.get(number - SYSTEM).copied().unwrap_or(0).into()
            }
        };
        (value.to_le_bytes(), bytes_of(number.0))
    }

    /// Sets a register; false for those that gdb may only read, unless that is their value anyway.
    pub(super) fn set(&mut self, number: RegisterNumber, bytes: &[u8]) -> bool {
        let mut wide = [0; BYTES_MAX];
        let len = bytes.len().min(BYTES_MAX);
        wide[..len].copy_from_slice(&bytes[..len]);
        let value = u128::from_le_bytes(wide);
        let state = &mut self.state;
        match number.0 {
            number @ 0..RIP => state.gpr[GENERAL_INDEX[number]] = value as u64,
            RIP => state.rip = value as u64,
            // gdb knows 32 of them; the rest are zero.
            EFLAGS => state.rflags = u64::from(value as u32),
            number @ ST..FLOAT => self.set_image(fxsave::ST + 16 * (number - ST), 10, value),
            number @ FLOAT..XMM => self.set_float_control(number - FLOAT, value as u32),
            number @ XMM..MXCSR => self.set_image(fxsave::XMM + 16 * (number - XMM), 16, value),
            MXCSR => self.set_image(fxsave::MXCSR, 4, value),
            FS_BASE => state.segments[4].base = value as u64,
            GS_BASE => state.segments[5].base = value as u64,
            number @ YMM_HIGH..SYSTEM => self.vector.ymm_high[number - YMM_HIGH] = value,
            _ => return self.get(number).0 == wide,
        }
        true
    }

    fn image(&self, at: usize, len: usize) -> u128 {
        let bytes = &self.vector.fxsave[at..at + len];
        bytes.iter().rev().fold(0, |value, &byte| value << 8 | u128::from(byte))
    }

    fn set_image(&mut self, at: usize, len: usize, value: u128) {
        self.vector.fxsave[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// Where one of [`FLOAT_CONTROL`] is in the area, the tag word apart, and its bytes.
    fn float_place(index: usize) -> (usize, usize) {
        match index {
            0 => (fxsave::CONTROL, 2),
            1 => (fxsave::STATUS, 2),
            3 => (fxsave::INSTRUCTION + 4, 2),
            4 => (fxsave::INSTRUCTION, 4),
            5 => (fxsave::DATA + 4, 2),
            6 => (fxsave::DATA, 4),
            _ => (fxsave::OPCODE, 2),
        }
    }

    fn float_control(&self, index: usize) -> u128 {
        if index == 2 {
            return self.full_tags().into();
        }
        let (at, len) = Self::float_place(index);
        self.image(at, len)
    }

    fn set_float_control(&mut self, index: usize, value: u32) {
        if index == 2 {
            // The area has one bit for each register: not empty (SDM vol. 1, 10.5.1.1).
            self.vector.fxsave[fxsave::TAG] = (0..8)
                .filter(|register| value >> (2 * register) & 3 != 3)
                .fold(0, |tags, register| tags | 1 << register);
            return;
        }
        let (at, len) = Self::float_place(index);
        self.set_image(at, len, value.into());
    }

    /// The tag word with two bits for each physical register (SDM vol. 1, 8.1.7): valid, zero, special, empty.
    fn full_tags(&self) -> u16 {
        let top = usize::from(self.vector.fxsave[fxsave::STATUS + 1] >> 3 & 7);
        (0..8).fold(0, |tags, physical| {
            let in_use = self.vector.fxsave[fxsave::TAG] >> physical & 1 != 0;
            let value = self.image(fxsave::ST + 16 * ((physical + 8 - top) % 8), 10);
            let (exponent, significand) = ((value >> 64) as u16 & 0x7fff, value as u64);
            let tag = match (exponent, significand) {
                _ if !in_use => 3,
                (0, 0) => 1,
                (0 | 0x7fff, _) => 2,
                _ if significand >> 63 == 0 => 2,
                _ => 0,
            };
            tags | tag << (2 * physical)
        })
    }
}

impl Registers for GuestRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.state.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for number in 0..COUNT {
            let (bytes, len) = self.get(RegisterNumber(number));
            bytes[..len].iter().for_each(|&byte| write_byte(Some(byte)));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let mut rest = bytes;
        for number in 0..COUNT {
            let (value, after) = rest.split_at_checked(bytes_of(number)).ok_or(())?;
            // Registers that are only to be read are among them, and stay as they are.
            self.set(RegisterNumber(number), value);
            rest = after;
        }
        Ok(())
    }
}

static DESCRIPTION: LazyLock<String> = LazyLock::new(describe);

/// The target description.
fn describe() -> String {
    let mut text =
        String::from("<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">");
    text.push_str("<architecture>i386:x86-64</architecture>");
    let mut feature = |name: &str, types: &str, registers: &mut dyn Iterator<Item = (String, usize, &str)>| {
        let _ = write!(text, "<feature name=\"{name}\">{types}");
        for (name, bytes, kind) in registers {
            let _ = write!(text, "<reg name=\"{name}\" bitsize=\"{}\" type=\"{kind}\"/>", 8 * bytes);
        }
        text.push_str("</feature>");
    };
    let general = GENERAL.iter().map(|&name| {
        let kind = if matches!(name, "rbp" | "rsp") { "data_ptr" } else { "int64" };
        (name.to_owned(), 8, kind)
    });
    let segments = SEGMENTS.iter().map(|&name| (name.to_owned(), 4, "int32"));
    let floats = (0..8).map(|n| (format!("st{n}"), 10, "i387_ext"));
    let controls = FLOAT_CONTROL.iter().map(|&name| (name.to_owned(), 4, "int"));
    let rip = [("rip".to_owned(), 8, "code_ptr"), ("eflags".to_owned(), 4, "flags")];
    let mut core = general.chain(rip).chain(segments).chain(floats).chain(controls);
    feature("org.gnu.gdb.i386.core", &flags_type(), &mut core);
    let vectors = (0..16).map(|n| (format!("xmm{n}"), 16, "vec128"));
    feature("org.gnu.gdb.i386.sse", VECTOR_TYPES, &mut vectors.chain([("mxcsr".to_owned(), 4, "int")]));
    let bases = ["fs_base", "gs_base"].into_iter().map(|name| (name.to_owned(), 8, "int"));
    feature("org.gnu.gdb.i386.segments", "", &mut bases.into_iter());
    feature("org.gnu.gdb.i386.avx", "", &mut (0..16).map(|n| (format!("ymm{n}h"), 16, "uint128")));
    feature("org.polder.x86.control", "", &mut CONTROL.iter().map(|&name| (name.to_owned(), 8, "int64")));
    text.push_str("</target>");
    text
}

/// RFLAGS bit by bit (SDM vol. 1, 3.4.3).
fn flags_type() -> String {
    const BITS: [(&str, u32); 16] = [
        ("CF", 0),
        ("PF", 2),
        ("AF", 4),
        ("ZF", 6),
        ("SF", 7),
        ("TF", 8),
        ("IF", 9),
        ("DF", 10),
        ("OF", 11),
        ("NT", 14),
        ("RF", 16),
        ("VM", 17),
        ("AC", 18),
        ("VIF", 19),
        ("VIP", 20),
        ("ID", 21),
    ];
    let fields: String =
        BITS.iter().map(|(name, bit)| format!("<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>")).collect();
    format!("<flags id=\"flags\" size=\"4\">{fields}</flags>")
}

const VECTOR_TYPES: &str = "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
    <vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/><vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\
    <vector id=\"v8i16\" type=\"int16\" count=\"8\"/><vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\
    <vector id=\"v2i64\" type=\"int64\" count=\"2\"/><union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/>\
    <field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/><field name=\"v8_int16\" type=\"v8i16\"/>\
    <field name=\"v4_int32\" type=\"v4i32\"/><field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_described_once_and_keeps_its_value() {
        assert_eq!(DESCRIPTION.matches("<reg name").count(), COUNT);
        let mut registers = GuestRegisters::default();
        let value: Vec<u8> = (1..=16).collect();
        let mut bytes = Vec::new();
        for number in 0..COUNT {
            let (register, len) = RegisterNumber::from_raw_id(number).unwrap();
            let len = len.unwrap().get();
            let is_tag_or_read_only = number == FLOAT + 2 || (SEGMENT..ST).contains(&number) || number >= SYSTEM;
            if !is_tag_or_read_only {
                assert!(registers.set(register, &value[..len]));
                let kept = if (FLOAT..XMM).contains(&number) && len == 4 { 2 } else { len };
                assert_eq!(registers.get(register).0[..kept], value[..kept], "{number}");
            }
            bytes.extend_from_slice(&registers.get(register).0[..len]);
        }
        assert_eq!(RegisterNumber::from_raw_id(COUNT), None);
        let mut serialized = Vec::new();
        registers.gdb_serialize(|byte| serialized.extend(byte));
        assert_eq!(serialized.len(), bytes.len());
        let mut back = GuestRegisters::default();
        back.gdb_deserialize(&serialized).unwrap();
        assert_eq!(back.state.gpr, registers.state.gpr);
        assert_eq!(back.vector.ymm_high, registers.vector.ymm_high);
        assert!(back.gdb_deserialize(&serialized[1..]).is_err());
    }

    #[test]
    fn control_registers_are_only_to_be_read() {
        let mut registers = GuestRegisters::default();
        assert!(!registers.set(RegisterNumber(SYSTEM), &[1; 8]));
        assert!(registers.set(RegisterNumber(SYSTEM), &0x6000_0010u64.to_le_bytes()));
    }

    #[test]
    fn tags_say_what_the_x87_registers_hold() {
        let mut registers = GuestRegisters::default();
        // Top of stack 6: ST0 is physical register 6 and holds 1.0, ST1 is 7 and holds zero.
        registers.vector.fxsave[fxsave::STATUS + 1] = 6 << 3;
        registers.vector.fxsave[fxsave::TAG] = 0xc0;
        registers.vector.fxsave[fxsave::ST + 7..fxsave::ST + 10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        assert_eq!(registers.float_control(2), 0x4fff);
        registers.set_float_control(2, 0x3fff);
        assert_eq!(registers.vector.fxsave[fxsave::TAG], 0x80);
    }
}
