//! Code off the straight path of a unit, emitted after it.

use super::assembler::{Label, Mem, Reg, Relocation};
use super::frame::{EXIT, NEXT_PAGE_MASK, OFFSET_MASK, exit};
use super::generate::{Generator, Use};
use super::registers::{ADDRESS, SPARE};
use super::x87::X87Site;

/// Bit of [`super::frame::Frame::argument`]: after a store to a watched page translated code may be left.
pub const NOTED_LEAVES: u64 = 1 << 30;
/// The same: RIP is set, because the guest goes on far from the unit.
pub const NOTED_FAR: u64 = 1 << 29;

/// Stores went anywhere in the page.
pub const NOTED_PAGE: u64 = 1 << 28;

/// Code off the straight path, emitted after it.
pub enum Cold {
    /// A look-up missed: fill the table and try again, or leave the instruction at `rip` to the interpreter.
    Miss {
        entry: Label,
        retry: Label,
        bytes: u32,
        usage: Use,
        rip: u64,
        /// Where to go on if the bytes lie in two pages; `None`: such a look-up may miss like others.
        split: Option<Split>,
        x87: Option<X87Site>,
    },
    /// A store to a watched page at `host` is done.
    Noted {
        entry: Label,
        resume: Label,
        bytes: u32,
        next: Option<u64>,
        host: Mem,
        x87: Option<X87Site>,
    },
    /// Stores to one page are done, which somebody watches by now; `host` has the address of one of them.
    PageNoted {
        entry: Label,
        resume: Label,
        rip: u64,
        host: Mem,
    },
    Leave {
        entry: Label,
        exit: u32,
        rip: u64,
    },
    Link {
        entry: Label,
        link: usize,
    },
    LoadX87 {
        entry: Label,
        resume: Label,
    },
    LoadVectors {
        entry: Label,
        resume: Label,
    },
    /// An indirect jump missed; RIP is stored.
    Indirect {
        entry: Label,
        rip: u64,
        moved: i32,
        /// The function called: one of [`super::thunks::Thunks`]' that take such a jump.
        thunk: usize,
    },
    /// A jump that is a link: where a call is expected to come back to, or the other shape of a loop.
    Jump {
        entry: Label,
        /// The code of the link from there on.
        to: Label,
        link: usize,
    },
}

/// Where a group goes on whose stretch lies in two pages.
#[derive(Debug, Clone, Copy)]
pub struct Split {
    pub entry: Label,
    /// The link that leads there.
    pub link: Option<usize>,
}

impl Generator<'_> {
    /// Emits all of it.
    pub(super) fn emit_cold(&mut self) {
        let mut all = std::mem::take(&mut self.cold);
        for cold in all.drain(..) {
            match cold {
                Cold::Miss { entry, retry, bytes, usage, rip, split, x87 } => {
                    self.asm.bind(entry);
                    if let Some(split) = split {
                        if let Some(site) = x87 {
                            self.store_pointers_of(site);
                        }
                        self.asm.extract(SPARE, ADDRESS, OFFSET_MASK);
                        self.asm.lea(SPARE, Mem::base(SPARE, bytes as i32 - 1));
                        self.asm.extract(SPARE, SPARE, NEXT_PAGE_MASK);
                        self.asm.jump_unless_rcx_zero(split.entry);
                        if let Some(link) = split.link {
                            self.links[link].jump_at = self.asm.position() - 4;
                        }
                    }
                    self.asm.constant(SPARE, u64::from(bytes));
                    let thunks = &self.context.thunks;
                    self.call_thunk(if usage == Use::Write { thunks.miss_write } else { thunks.miss_read });
                    self.call_site(rip, x87, 0);
                    self.asm.jump(retry);
                }
                Cold::Noted { entry, resume, bytes, next, host, x87 } => {
                    self.asm.bind(entry);
                    if !is_only(host, ADDRESS) {
                        self.asm.lea(ADDRESS, host);
                    }
                    let far = next.filter(|&next| self.offset_of(next).is_none());
                    if let Some(far) = far {
                        self.store_rip(far);
                    }
                    let leaves = match (next, far) {
                        (None, _) => 0,
                        (Some(_), None) => NOTED_LEAVES,
                        (Some(_), Some(_)) => NOTED_LEAVES | NOTED_FAR,
                    };
                    self.asm.constant(SPARE, u64::from(bytes) | leaves);
                    self.call_thunk(self.context.thunks.noted);
                    self.call_site(next.filter(|_| far.is_none()).unwrap_or_else(|| self.first_ip()), x87, 0);
                    self.asm.jump(resume);
                }
                Cold::PageNoted { entry, resume, rip, host } => {
                    self.asm.bind(entry);
                    self.asm.load(ADDRESS, host);
                    self.asm.constant(SPARE, NOTED_PAGE);
                    self.call_thunk(self.context.thunks.noted);
                    self.call_site(rip, None, 0);
                    self.asm.jump(resume);
                }
                Cold::Leave { entry, exit, rip } => {
                    self.asm.bind(entry);
                    let thunk = match exit {
                        exit::INTERPRET => Some(self.context.thunks.interpret),
                        exit::ATTENTION => Some(self.context.thunks.attend),
                        _ => None,
                    };
                    if let Some(thunk) = thunk.filter(|_| self.offset_of(rip).is_some()) {
                        self.call_thunk(thunk);
                        self.call_site(rip, None, 0);
                        continue;
                    }
                    self.store_rip(rip);
                    self.asm.store32_imm(EXIT, exit);
                    self.jump_thunk(self.context.thunks.exit);
                }
                Cold::Link { entry, link } => {
                    self.asm.bind(entry);
                    let site = self.links[link];
                    if site.binding_at.is_some() {
                        self.asm.linear_constant(ADDRESS, site.target);
                    }
                    self.asm.store32_imm(EXIT, (self.context.first_link + link) as u32);
                    self.asm.relocate(4, Relocation::Link);
                    let thunks = &self.context.thunks;
                    self.jump_thunk(if site.binding_at.is_some() { thunks.far_link } else { thunks.link });
                }
                Cold::LoadVectors { entry, resume } => {
                    self.asm.bind(entry);
                    self.call_thunk(self.context.thunks.load_vectors);
                    self.asm.jump(resume);
                }
                Cold::LoadX87 { entry, resume } => {
                    self.asm.bind(entry);
                    self.call_thunk(self.context.thunks.load_x87);
                    self.asm.jump(resume);
                }
                Cold::Indirect { entry, rip, moved, thunk } => {
                    self.asm.bind(entry);
                    self.call_thunk(thunk);
                    self.call_site(rip, None, moved);
                }
                Cold::Jump { entry, to, link } => {
                    self.asm.bind(entry);
                    self.asm.jump(to);
                    self.links[link].jump_at = self.asm.position() - 4;
                }
            }
        }
        self.cold = all;
    }
}

/// Whether a memory operand is what a register points at.
fn is_only(mem: Mem, register: Reg) -> bool {
    mem.base == Some(register) && mem.index.is_none() && mem.displacement == 0
}
