//! The first phase of a connection: which export, and how it will be talked to.
//!
//! Bytes in, bytes out: no socket here. [`Negotiation::step`] takes at most one option and appends the whole answer to it, so
//! what a client can make the server hold is one answer.

use super::context::Context;
use super::exports::{Export, Exports};
use super::protocol::{
    Form, INIT_PASSWORD, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_LEN_MAX, handshake, info, option, reply, u16_at,
    u32_at, u64_at,
};
use super::{CONTEXT_QUERIES_MAX, CONTEXTS_MAX, OPTION_LEN_MAX, PAYLOAD_LEN_MAX};
use crate::disk::{Disk, SECTOR_LEN};
use std::sync::Arc;

/// Whether a server talks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TlsPolicy {
    Off,
    Allowed,
    Required,
}

/// What was agreed on.
pub(super) struct Agreed<D> {
    pub export: Arc<Export<D>>,
    pub form: Form,
    pub contexts: Vec<Context>,
}

/// What comes after one step.
pub(super) enum Step<D> {
    /// The answer is to be sent; the next option can be looked at.
    Continue,
    /// More bytes are needed for the next step.
    NeedMore,
    /// After the answer, everything is TLS.
    StartTls,
    /// After the answer, transmission begins.
    Transmit(Agreed<D>),
    /// After the answer, the connection ends.
    Close,
}

/// The negotiation of one connection.
pub(super) struct Negotiation<D> {
    exports: Arc<Exports<D>>,
    policy: TlsPolicy,
    phase: Phase,
    fixed: bool,
    no_zeroes: bool,
    secure: bool,
    form: Form,
    contexts: Option<(Arc<Export<D>>, Vec<Context>)>,
}

enum Phase {
    ClientFlags,
    Options,
    /// The rest of an option that is too long to be looked at.
    Skipping {
        option: u32,
        remaining: u32,
    },
}

const OPTION_HEAD_LEN: usize = 16;
const TLS_ONLY: &[u8] = b"this server talks TLS only";

impl<D: Disk> Negotiation<D> {
    /// A negotiation about `exports`.
    pub fn new(exports: Arc<Exports<D>>, policy: TlsPolicy) -> Self {
        Self {
            exports,
            policy,
            phase: Phase::ClientFlags,
            fixed: false,
            no_zeroes: false,
            secure: false,
            form: Form::Simple,
            contexts: None,
        }
    }

    /// What the server says first.
    pub fn greeting() -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[..8].copy_from_slice(&INIT_PASSWORD.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        bytes
    }

    /// TLS is there now. What was agreed on before is forgotten: somebody between client and server may have said it.
    pub fn secured(&mut self) {
        self.secure = true;
        self.form = Form::Simple;
        self.contexts = None;
    }

    /// Looks at the beginning of `input`, appends an answer to `output`, and says how many bytes it has used.
    pub fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Step<D>) {
        match self.phase {
            Phase::ClientFlags => self.client_flags(input),
            Phase::Skipping { option, remaining } => {
                let used = input.len().min(remaining as usize);
                if used < remaining as usize {
                    self.phase = Phase::Skipping { option, remaining: remaining - used as u32 };
                    return (used, Step::NeedMore);
                }
                self.phase = Phase::Options;
                if self.needs_tls() {
                    answer(output, option, reply::ERR_TLS_REQD, TLS_ONLY);
                } else {
                    answer(output, option, reply::ERR_TOO_BIG, b"the option is too long");
                }
                (used, Step::Continue)
            }
            Phase::Options => {
                if input.len() < OPTION_HEAD_LEN {
                    return (0, Step::NeedMore);
                }
                let (magic, option, len) = (u64_at(input, 0), u32_at(input, 8), u32_at(input, 12));
                if magic != OPTION_MAGIC {
                    return (input.len(), Step::Close);
                }
                if len as usize > OPTION_LEN_MAX {
                    if option == option::EXPORT_NAME || !self.fixed {
                        return (input.len(), Step::Close);
                    }
                    self.phase = Phase::Skipping { option, remaining: len };
                    return (OPTION_HEAD_LEN, Step::Continue);
                }
                let end = OPTION_HEAD_LEN + len as usize;
                if input.len() < end {
                    return (0, Step::NeedMore);
                }
                (end, self.option(option, &input[OPTION_HEAD_LEN..end], output))
            }
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Step<D>) {
        if input.len() < 4 {
            return (0, Step::NeedMore);
        }
        let flags = u32_at(input, 0);
        let (fixed, no_zeroes) = (u32::from(handshake::FIXED_NEWSTYLE), u32::from(handshake::NO_ZEROES));
        if flags & !(fixed | no_zeroes) != 0 {
            return (4, Step::Close);
        }
        self.fixed = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        self.phase = Phase::Options;
        (4, Step::Continue)
    }

    fn option(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Step<D> {
        if !self.fixed && option != option::EXPORT_NAME {
            // Such a client does not understand answers.
            return Step::Close;
        }
        if self.needs_tls() {
            match option {
                option::STARTTLS | option::ABORT => {}
                option::EXPORT_NAME => return Step::Close,
                _ => {
                    answer(output, option, reply::ERR_TLS_REQD, TLS_ONLY);
                    return Step::Continue;
                }
            }
        }
        match option {
            option::EXPORT_NAME => return self.export_name(data, output),
            option::ABORT => {
                answer(output, option, reply::ACK, &[]);
                return Step::Close;
            }
            option::LIST => self.list(data, output),
            option::STARTTLS => return self.start_tls(data, output),
            option::INFO | option::GO => return self.info(option, data, output),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                answer(output, option, reply::ERR_INVALID, b"the option has no data");
            }
            // There is no way back to shorter heads.
            option::STRUCTURED_REPLY if self.form == Form::Extended => {
                answer(output, option, reply::ERR_EXT_HEADER_REQD, b"extended headers are agreed on");
            }
            option::STRUCTURED_REPLY => self.take_form(option, Form::Structured, output),
            option::EXTENDED_HEADERS => self.take_form(option, Form::Extended, output),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data, output),
            _ => answer(output, option, reply::ERR_UNSUP, b"this server does not know the option"),
        }
        Step::Continue
    }

    fn take_form(&mut self, option: u32, form: Form, output: &mut Vec<u8>) {
        self.form = form;
        answer(output, option, reply::ACK, &[]);
    }

    fn needs_tls(&self) -> bool {
        self.policy == TlsPolicy::Required && !self.secure
    }

    fn export_name(&mut self, data: &[u8], output: &mut Vec<u8>) -> Step<D> {
        let Some(export) = parse_string(data).and_then(|name| self.exports.find(name)) else {
            return Step::Close;
        };
        output.extend_from_slice(&export.disk().capacity_bytes().to_be_bytes());
        output.extend_from_slice(&export.flags(self.form).to_be_bytes());
        if !self.no_zeroes {
            output.resize(output.len() + 124, 0);
        }
        Step::Transmit(self.agree(export))
    }

    fn list(&self, data: &[u8], output: &mut Vec<u8>) {
        if !data.is_empty() {
            return answer(output, option::LIST, reply::ERR_INVALID, b"the option has no data");
        }
        for export in self.exports.all() {
            let name_len = export.name().len() as u32;
            let parts = [&name_len.to_be_bytes(), export.name().as_bytes(), export.description().as_bytes()];
            answer(output, option::LIST, reply::SERVER, &parts.concat());
        }
        answer(output, option::LIST, reply::ACK, &[]);
    }

    fn start_tls(&mut self, data: &[u8], output: &mut Vec<u8>) -> Step<D> {
        if self.policy == TlsPolicy::Off {
            answer(output, option::STARTTLS, reply::ERR_POLICY, b"this server does not talk TLS");
        } else if self.secure {
            answer(output, option::STARTTLS, reply::ERR_INVALID, b"TLS is there already");
        } else if !data.is_empty() {
            answer(output, option::STARTTLS, reply::ERR_INVALID, b"the option has no data");
        } else {
            answer(output, option::STARTTLS, reply::ACK, &[]);
            return Step::StartTls;
        }
        Step::Continue
    }

    fn info(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Step<D> {
        let Some((name, wanted)) = parse_info(data) else {
            answer(output, option, reply::ERR_INVALID, b"the option's data makes no sense");
            return Step::Continue;
        };
        let Some(export) = self.exports.find(name) else {
            answer(output, option, reply::ERR_UNKNOWN, b"there is no export of that name");
            return Step::Continue;
        };
        let mut about = |kind: u16, parts: &[&[u8]]| {
            answer(output, option, reply::INFO, &[&kind.to_be_bytes()[..], &parts.concat()].concat());
        };
        let flags = export.flags(self.form);
        about(info::EXPORT, &[&export.disk().capacity_bytes().to_be_bytes(), &flags.to_be_bytes()]);
        let wants = |kind| wanted.contains(&kind);
        if wants(info::NAME) {
            about(info::NAME, &[export.name().as_bytes()]);
        }
        if wants(info::DESCRIPTION) && !export.description().is_empty() {
            about(info::DESCRIPTION, &[export.description().as_bytes()]);
        }
        if wants(info::BLOCK_SIZE) {
            // Any byte can be written; whole blocks are cheaper.
            let preferred = export.disk().block_bytes().clamp(SECTOR_LEN as u32, 1 << 24).next_power_of_two();
            let sizes = [1, preferred, PAYLOAD_LEN_MAX].map(u32::to_be_bytes);
            about(info::BLOCK_SIZE, &[&sizes.concat()]);
        }
        answer(output, option, reply::ACK, &[]);
        match option {
            option::GO => Step::Transmit(self.agree(export)),
            _ => Step::Continue,
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) {
        if option == option::SET_META_CONTEXT {
            self.contexts = None;
        }
        let Some((name, queries)) = parse_queries(data) else {
            return answer(output, option, reply::ERR_INVALID, b"the option's data makes no sense");
        };
        if self.form == Form::Simple {
            return answer(output, option, reply::ERR_INVALID, b"structured replies were not asked for");
        }
        if queries.len() > CONTEXT_QUERIES_MAX {
            return answer(output, option, reply::ERR_TOO_BIG, b"there are too many queries");
        }
        let Some(export) = self.exports.find(name) else {
            return answer(output, option, reply::ERR_UNKNOWN, b"there is no export of that name");
        };
        let found = match option {
            option::SET_META_CONTEXT => Context::select(&**export.disk(), &queries),
            _ => Context::list(&**export.disk(), &queries),
        };
        let found = match found {
            Ok(found) => found,
            Err(error) => return answer(output, option, reply::ERR_UNKNOWN, error.to_string().as_bytes()),
        };
        if option == option::SET_META_CONTEXT && found.len() > CONTEXTS_MAX {
            return answer(output, option, reply::ERR_TOO_BIG, b"there are too many contexts");
        }
        for (id, context) in found.iter().enumerate() {
            // The number means something only for a context that is selected.
            let id = if option == option::SET_META_CONTEXT { id as u32 } else { 0 };
            answer(output, option, reply::META_CONTEXT, &[&id.to_be_bytes()[..], context.name().as_bytes()].concat());
        }
        answer(output, option, reply::ACK, &[]);
        if option == option::SET_META_CONTEXT {
            self.contexts = Some((export, found));
        }
    }

    fn agree(&mut self, export: Arc<Export<D>>) -> Agreed<D> {
        let contexts = match self.contexts.take() {
            Some((of, contexts)) if Arc::ptr_eq(&of, &export) => contexts,
            _ => Vec::new(),
        };
        Agreed { export, form: self.form, contexts }
    }
}

/// Appends one reply to an option.
fn answer(output: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    output.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    for number in [option, kind, data.len() as u32] {
        output.extend_from_slice(&number.to_be_bytes());
    }
    output.extend_from_slice(data);
}

fn parse_string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_LEN_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// A string that its length comes before, and what follows.
fn split_string(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let len = u32_at(bytes.first_chunk::<4>()?, 0) as usize;
    let (string, rest) = bytes[4..].split_at_checked(len)?;
    Some((parse_string(string)?, rest))
}

/// The name of an export, and what the client wants to know of it.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (name, rest) = split_string(data)?;
    let count = usize::from(u16_at(rest.first_chunk::<2>()?, 0));
    let wanted: Vec<u16> = rest[2..].chunks_exact(2).map(|kind| u16_at(kind, 0)).collect();
    (rest.len() == 2 + 2 * count).then_some((name, wanted))
}

/// The name of an export, and queries about its contexts.
fn parse_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (name, rest) = split_string(data)?;
    let count = u32_at(rest.first_chunk::<4>()?, 0);
    let mut rest = &rest[4..];
    let mut queries = Vec::new();
    for _ in 0..count {
        let query;
        (query, rest) = split_string(rest)?;
        if !query.contains(':') {
            return None;
        }
        queries.push(query);
    }
    rest.is_empty().then_some((name, queries))
}
