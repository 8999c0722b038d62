//! From a unit's instructions to host code.
//!
//! Most instructions are emitted as themselves: registers are renamed to where they live ([`super::registers`]), a memory operand becomes a look-up
//! followed by the same instruction on `[ADDRESS + ADDEND]`. An instruction that has no such form calls its handler of the
//! interpreter ([`Generator::callout`]).
//!
//! Flags live in the host's. A look-up clobbers them where nobody needs them; where somebody does it is made of instructions that
//! leave flags alone (BMI2, JRCXZ).

use std::mem::offset_of;
use std::rc::Rc;

use iced_x86::{Encoder, FlowControl, Instruction};

use super::assembler::{Assembler, Binary, Label, Mem, Reg, Relocation, condition};
use super::cold::Cold;
use super::frame::{CALLOUT_OP, RIP, VECTORS_MISSING, cpu_field, exit, register_slot};
use super::groups::Plan;
use super::guest_code::{Item, target_inside};
use super::registers::{SPARE, home};
use super::steady::Loop;
use super::thunks::Thunks;
use super::values::Access;
use super::x87::X87Site;
use crate::cpu::{BLOCK_RIP, CodeSize, Cpu};
use crate::cpu_model::CpuModel;
use crate::lower::{self, CodeContext};
use crate::op::Op;
use crate::vector::VectorState;

/// A way out of a unit to a known address.
#[derive(Debug, Clone, Copy)]
pub struct LinkSite {
    pub target: u64,
    /// Place of the jump's distance, from the unit's start.
    pub jump_at: usize,
    /// Place of the distance of the byte that is looked at ([`super::arena::verified_at`]); only for jumps out of the page.
    pub binding_at: Option<usize>,
    /// Where the jump leads while it is not linked.
    pub stub: usize,
    pub shape: Shape,
}

impl LinkSite {
    /// A way to the code at `target`, whose jump is not emitted yet.
    pub fn new(target: u64, shape: Shape) -> LinkSite {
        LinkSite { target, jump_at: 0, binding_at: None, stub: 0, shape }
    }
}

/// How a unit's look-ups are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Accesses share them ([`super::groups`]); the shape that everybody comes to.
    Shared,
    /// Each access has its own: for where the stretch of a group lies in two pages.
    Plain,
    /// Those of the loop at its start are kept from round to round ([`super::steady`]).
    Steady,
}

/// Ops whose addresses are in generated code.
pub type Ops = Vec<Box<Op>>;

/// What generation gives.
pub struct Generated {
    /// Places of the items, if they are listed.
    pub starts: Vec<usize>,
    pub ops: Ops,
    /// [`Sites::x87`].
    pub x87: Vec<X87Site>,
    pub memory: Memory,
}

/// What a unit is generated in, kept from unit to unit: a unit has little code and would else spend a third of its time on allocations.
pub struct Memory {
    pub asm: Assembler,
    pub links: Vec<LinkSite>,
    /// [`Sites::sites`].
    pub sites: Vec<Site>,
    labels: Vec<Label>,
    cold: Vec<Cold>,
    link_stubs: Vec<Label>,
    is_target: Vec<bool>,
    encoder: Encoder,
    plan: Plan,
}

impl Default for Memory {
    fn default() -> Memory {
        Memory {
            asm: Assembler::default(),
            links: Vec::new(),
            sites: Vec::new(),
            labels: Vec::new(),
            cold: Vec::new(),
            link_stubs: Vec::new(),
            is_target: Vec::new(),
            encoder: Encoder::new(64),
            plan: Plan::default(),
        }
    }
}

/// A place in the code that stands for an instruction of the guest: one that may raise an exception on the host, or the last byte of a
/// call into Rust that may not come back.
#[derive(Debug, Clone, Copy)]
pub struct Site {
    /// From the unit's start.
    pub at: u32,
    /// The instruction, from the unit's first one.
    pub offset: u16,
    /// The number in [`Sites::x87`] plus one of the x87 instruction before it, if code has not stored that one's pointers yet.
    pub x87: u16,
    /// Of an indirect jump: what it has moved RSP by.
    pub moved: i32,
}

/// The sites of a unit; ascending.
#[derive(Debug, Default)]
pub struct Sites {
    pub sites: Vec<Site>,
    pub x87: Vec<X87Site>,
}

/// What generation depends on beside the instructions.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub model: &'a CpuModel,
    pub thunks: Thunks,
    /// Where the code will be, as a distance from the cache's start.
    pub position: usize,
    /// The data table in use.
    pub table: usize,
    /// The classes of vector and x87 instructions that are enabled.
    pub enabled: u8,
    /// CR4.SMAP is set.
    pub guards_user_pages: bool,
    /// Places of the items are wanted.
    pub listed: bool,
    /// The unit counts the instructions that it runs.
    pub counts: bool,
    /// Every look-up for writing misses first, so that what is stored to can be kept.
    pub keeps_journal: bool,
    pub shape: Shape,
    /// Number of the first link.
    pub first_link: usize,
}

/// An instruction could not be generated; the unit is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GiveUp;

pub type Result<T> = std::result::Result<T, GiveUp>;

/// How a memory operand is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Read,
    Write,
}

pub struct Generator<'a> {
    pub asm: Assembler,
    pub context: Context<'a>,
    pub items: &'a [Item],
    encoder: Encoder,
    pub labels: Vec<Label>,
    pub cold: Vec<Cold>,
    pub links: Vec<LinkSite>,
    /// (link, label of its stub), to fill in `LinkSite::stub`.
    pub link_stubs: Vec<Label>,
    ops: Ops,
    sites: Sites,
    /// The vector registers are surely loaded here.
    pub vectors_loaded: bool,
    /// The x87 registers are surely in the host's here.
    pub x87_loaded: bool,
    /// The last x87 instruction, while its pointers are still to be stored.
    pub last_x87: Option<X87Site>,
    /// The data table at each item, where STAC and CLAC are translated.
    pub tables: Option<Vec<usize>>,
    /// The data table that the unit was entered with.
    pub entry_table: usize,
    /// Items that jumps inside the unit lead to.
    pub is_target: Vec<bool>,
    pub plan: Plan,
    /// The loop at the unit's start in the steady shape, and where its look-ups are.
    pub steady: Option<Rc<Loop>>,
    pub steady_entry: Label,
    /// Heads of loops that have a steady shape.
    pub steady_heads: Vec<usize>,
    /// The item that is being generated.
    pub index: usize,
    /// The access of an item whose look-up is done; it lies at [`super::memory::LOOKED_UP`] if nothing is looked up before.
    pub ahead: Option<(usize, Access)>,
    /// The group whose stretch ADDEND has the host address of.
    pub held: Option<usize>,
    /// The same at the start of the instruction that is being generated, until ADDEND is used.
    pub held_before: Option<usize>,
}

const X87_MISSING: Mem = cpu_field(offset_of!(Cpu, vector) + VectorState::X87_MISSING_OFFSET);

impl<'a> Generator<'a> {
    pub fn new(context: Context<'a>, items: &'a [Item], memory: Memory) -> Self {
        let Memory {
            mut asm,
            mut links,
            mut sites,
            mut labels,
            cold,
            mut link_stubs,
            mut is_target,
            encoder,
            mut plan,
        } = memory;
        let steady = if context.shape == Shape::Steady { Loop::find(items).map(Rc::new) } else { None };
        match context.shape {
            Shape::Plain => plan.clear(),
            _ => plan.make(items, steady.as_deref()),
        }
        asm.clear();
        links.clear();
        sites.clear();
        labels.clear();
        link_stubs.clear();
        is_target.clear();
        labels.extend(items.iter().map(|_| asm.label()));
        let steady_entry = asm.label();
        is_target.resize(items.len(), false);
        let has_steady_shapes = context.shape != Shape::Plain && !context.keeps_journal;
        let mut steady_heads = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let inside = target_inside(items, index);
            // A jump to what comes next is no jump.
            let leaps =
                item.instruction.flow_control() == FlowControl::UnconditionalBranch && inside == Some(index + 1);
            if let Some(inside) = inside.filter(|_| !leaps) {
                is_target[inside] = true;
                if has_steady_shapes && inside <= index && !steady_heads.contains(&inside) {
                    steady_heads.push(inside);
                }
            }
        }
        let is_other = |head: usize| head != 0 || context.shape == Shape::Shared;
        steady_heads.retain(|&head| is_other(head) && Loop::find(&items[head..]).is_some());
        Generator {
            asm,
            context,
            items,
            encoder,
            labels,
            cold,
            links,
            link_stubs,
            ops: Ops::new(),
            sites: Sites { sites, x87: Vec::new() },
            vectors_loaded: false,
            x87_loaded: false,
            last_x87: None,
            tables: super::system::tables(items, context.table, context.guards_user_pages),
            entry_table: context.table,
            is_target,
            plan,
            steady,
            steady_entry,
            steady_heads,
            index: 0,
            ahead: None,
            held: None,
            held_before: None,
        }
    }

    /// Generates the unit.
    pub fn run(mut self) -> Result<Generated> {
        let mut ended = false;
        if let Some(steady) = self.steady.clone() {
            self.fill_steady(&steady, self.steady_entry);
        }
        for index in 0..self.items.len() {
            let item = self.items[index];
            self.index = index;
            if self.is_target[index] || !(item.facts.is_x87 && super::x87::leaves_pointers(&item.instruction)) {
                self.store_x87_pointers();
            }
            if self.is_target[index] {
                self.vectors_loaded = self.steady.as_ref().is_some_and(|steady| steady.has_vectors(index));
                self.x87_loaded = false;
                self.held = None;
            }
            if let Some(tables) = &self.tables {
                self.context.table = tables[index];
            }
            self.asm.bind(self.labels[index]);
            if self.context.counts {
                self.count(index);
            }
            self.look_ahead(index);
            ended = self.instruction(&item)?;
        }
        if !ended && let Some(last) = self.items.last() {
            let live = last.live_after != 0;
            self.store_x87_pointers();
            self.link(last.instruction.next_ip(), live);
        }
        self.emit_cold();
        if !self.asm.resolve() {
            return Err(GiveUp);
        }
        for (link, stub) in self.links.iter_mut().zip(&self.link_stubs) {
            link.stub = self.asm.place(*stub);
        }
        let starts = if self.context.listed {
            self.labels.iter().map(|label| self.asm.place(*label)).collect()
        } else {
            Vec::new()
        };
        let memory = Memory {
            asm: self.asm,
            links: self.links,
            sites: self.sites.sites,
            labels: self.labels,
            cold: self.cold,
            link_stubs: self.link_stubs,
            is_target: self.is_target,
            encoder: self.encoder,
            plan: self.plan,
        };
        Ok(Generated { starts, ops: self.ops, x87: self.sites.x87, memory })
    }

    /// Whether the unit ends behind an instruction.
    pub fn is_last(&self, item: &Item) -> bool {
        self.items.last().is_some_and(|last| last.instruction.ip() == item.instruction.ip())
    }

    /// Counts the instructions from one on to where code may next come from elsewhere or go elsewhere. May use SPARE; no flags that live.
    fn count(&mut self, first: usize) {
        let begins = |index: usize| {
            let before = index.checked_sub(1).map(|before| self.items[before].instruction.flow_control());
            self.is_target[index] || before != Some(FlowControl::Next)
        };
        if !begins(first) {
            return;
        }
        let len = 1 + (first + 1..self.items.len()).take_while(|&index| !begins(index)).count();
        let counter = cpu_field(offset_of!(Cpu, instructions));
        if self.items[first].live_before == 0 {
            self.asm.binary_mem_imm(Binary::Add, counter, len as i32);
            return;
        }
        self.asm.load(SPARE, counter);
        self.asm.lea(SPARE, Mem::base(SPARE, len as i32));
        self.asm.store(counter, SPARE);
    }

    /// A jump or call to a place of the code cache.
    fn reach_thunk(&mut self, opcode: u8, thunk: usize) {
        self.asm.byte(opcode);
        let from = (self.context.position + self.asm.position() + 4) as i64;
        self.asm.imm32((thunk as i64 - from) as i32);
        self.asm.relocate(4, Relocation::Distance);
    }

    pub(super) fn jump_thunk(&mut self, thunk: usize) {
        self.reach_thunk(0xe9, thunk);
    }

    pub(super) fn call_thunk(&mut self, thunk: usize) {
        self.reach_thunk(0xe8, thunk);
    }

    /// Stores a constant into RIP; may use SPARE, no flags.
    pub(super) fn store_rip(&mut self, rip: u64) {
        self.store_linear(RIP, rip, SPARE);
    }

    /// Stores a guest address near the unit's own; `scratch` is used if it needs more than 32 bits.
    pub fn store_linear(&mut self, to: Mem, value: u64, scratch: Reg) {
        match i32::try_from(value as i64) {
            Ok(short) => {
                self.asm.store_imm(to, short);
                self.asm.relocate(4, Relocation::LinearSigned);
            }
            Err(_) => {
                self.asm.linear_constant(scratch, value);
                self.asm.store(to, scratch);
            }
        }
    }

    /// Stores a 64-bit constant; `scratch` is used if it needs more than 32 bits.
    pub fn store_constant(&mut self, to: Mem, value: u64, scratch: Reg) {
        match i32::try_from(value as i64) {
            Ok(short) => self.asm.store_imm(to, short),
            Err(_) => {
                self.asm.constant(scratch, value);
                self.asm.store(to, scratch);
            }
        }
    }

    /// A label of cold code that leaves with RIP at `rip`.
    pub fn leave_label(&mut self, exit: u32, rip: u64) -> Label {
        let entry = self.asm.label();
        self.cold.push(Cold::Leave { entry, exit, rip });
        entry
    }

    /// Ends the unit: the instruction at `rip` is the interpreter's.
    pub fn interpret(&mut self, rip: u64) {
        let label = self.leave_label(exit::INTERPRET, rip);
        self.asm.jump(label);
    }

    /// Notes that the host may fault in the instruction that is emitted next.
    pub fn may_fault(&mut self, rip: u64) {
        self.site(self.asm.position(), rip, self.last_x87, 0);
    }

    /// The distance of an address from the unit's first instruction, if it lies close behind.
    pub(super) fn offset_of(&self, rip: u64) -> Option<u16> {
        u16::try_from(rip.wrapping_sub(self.first_ip())).ok()
    }

    /// The address of the unit.
    pub(super) fn first_ip(&self) -> u64 {
        self.items.first().map_or(0, |item| item.instruction.ip())
    }

    /// Notes that the call that was emitted last stands for the instruction at `rip`.
    pub(super) fn call_site(&mut self, rip: u64, x87: Option<X87Site>, moved: i32) {
        self.site(self.asm.position() - 1, rip, x87, moved);
    }

    /// Notes that a place stands for the instruction at `rip`, which lies in the unit or right behind it.
    fn site(&mut self, at: usize, rip: u64, x87: Option<X87Site>, moved: i32) {
        let x87 = x87.map_or(0, |site| {
            self.sites.x87.push(site);
            self.sites.x87.len() as u16
        });
        let offset = self.offset_of(rip);
        debug_assert!(offset.is_some(), "{rip:#x} is far from the unit at {:#x}", self.first_ip());
        let offset = offset.unwrap_or_default();
        self.sites.sites.push(Site { at: at as u32, offset, x87, moved });
    }

    /// Whether STAC and CLAC are translated in this unit.
    pub fn switches_tables(&self) -> bool {
        self.tables.is_some()
    }

    /// Loads a guest register into a host register, or tells where it is.
    pub fn register(&mut self, guest: u8, scratch: Reg) -> Reg {
        home(guest).unwrap_or_else(|| {
            self.asm.load(scratch, register_slot(guest));
            scratch
        })
    }

    /// Puts a value into a guest register.
    pub fn set_register(&mut self, guest: u8, from: Reg) {
        match home(guest) {
            Some(host) => self.asm.mov(host, from),
            None => self.asm.store(register_slot(guest), from),
        }
    }

    /// Jumps if a byte is not zero. Uses SPARE and leaves flags alone where they are live.
    pub fn jump_if_set(&mut self, byte: Mem, live: bool, to: Label) {
        if live {
            self.asm.load_u8(SPARE, byte);
            self.asm.jump_unless_rcx_zero(to);
        } else {
            self.asm.compare8_imm(byte, 0);
            self.asm.jump_if(condition::NOT_EQUAL, to);
        }
    }

    /// Makes sure that the vector registers are loaded. Uses SPARE.
    pub fn need_vectors(&mut self, live: bool) {
        if self.vectors_loaded {
            return;
        }
        self.vectors_loaded = true;
        let entry = self.asm.label();
        let resume = self.asm.label();
        self.jump_if_set(VECTORS_MISSING, live, entry);
        self.asm.bind(resume);
        self.cold.push(Cold::LoadVectors { entry, resume });
    }

    /// Makes sure that the x87 registers are in the host's. Uses SPARE, and in cold code ADDEND.
    pub fn need_x87(&mut self, live: bool) {
        if self.x87_loaded {
            return;
        }
        self.x87_loaded = true;
        let entry = self.asm.label();
        let resume = self.asm.label();
        self.jump_if_set(X87_MISSING, live, entry);
        self.asm.bind(resume);
        self.cold.push(Cold::LoadX87 { entry, resume });
    }

    /// Encodes a host instruction.
    pub fn encode(&mut self, instruction: &Instruction) -> Result<()> {
        self.encoder.encode(instruction, 0).map_err(|_| GiveUp)?;
        let mut bytes = self.encoder.take_buffer();
        self.asm.raw(&bytes);
        bytes.clear();
        self.encoder.set_buffer(bytes);
        Ok(())
    }

    /// Calls the interpreter's handler for an instruction. The call does not return where the handler did not just go on to the next one.
    pub fn callout(&mut self, item: &Item) {
        // Handlers may take the x87 registers out of the host's.
        self.x87_loaded = false;
        let instruction = &item.instruction;
        let context = CodeContext { code: CodeSize::Bits64, block_rip: instruction.ip() };
        let (op, _) = lower::lower_for(self.context.model, instruction, context);
        let op = Box::new(op);
        let pointer = &raw const *op as u64;
        self.ops.push(op);
        self.store_linear(register_slot(BLOCK_RIP as u8), instruction.ip(), SPARE);
        self.store_constant(CALLOUT_OP, pointer, SPARE);
        self.store_rip(instruction.ip());
        self.call_thunk(self.context.thunks.callout);
    }
}
