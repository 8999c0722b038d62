//! The negotiation, byte by byte.

use super::exports::{Export, Exports};
use super::negotiation::{Agreed, Negotiation, Step, TlsPolicy};
use super::protocol::{Form, OPTION_MAGIC, info, option, reply, transmission, u16_at, u32_at, u64_at};
use super::{CONTEXT_QUERIES_MAX, CONTEXTS_MAX, OPTION_LEN_MAX};
use crate::disk::memory::MemoryDisk;
use std::sync::Arc;

const FIXED: u32 = 1;
const NO_ZEROES: u32 = 2;
const CAPACITY: u64 = 1 << 20;

struct Client {
    negotiation: Negotiation<MemoryDisk>,
}

/// Replies to one option: their type and data.
type Replies = Vec<(u32, Vec<u8>)>;

impl Client {
    fn new(policy: TlsPolicy) -> Self {
        Self::with_flags(policy, FIXED | NO_ZEROES)
    }

    fn with_flags(policy: TlsPolicy, flags: u32) -> Self {
        let disk = Arc::new(MemoryDisk::new(CAPACITY));
        for name in ["old", "new"] {
            disk.snapshot(name);
        }
        let exports = Arc::new(Exports::new());
        exports.add(Export::new("first", disk.clone()).with_description("The first disk.")).unwrap();
        exports.add(Export::new("second", disk).read_only()).unwrap();
        let mut negotiation = Negotiation::new(exports, policy);
        let (used, step) = negotiation.step(&flags.to_be_bytes(), &mut Vec::new());
        assert_eq!(used, 4);
        assert!(matches!(step, Step::Continue));
        Self { negotiation }
    }

    fn step(&mut self, option: u32, data: &[u8]) -> (Vec<u8>, Step<MemoryDisk>) {
        let mut output = Vec::new();
        let bytes = option_bytes(option, data);
        let (used, step) = self.negotiation.step(&bytes, &mut output);
        assert_eq!(used, bytes.len());
        (output, step)
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> (Replies, Step<MemoryDisk>) {
        let (output, step) = self.step(option, data);
        (parse(&output, option), step)
    }

    /// The type of the last reply.
    fn outcome(&mut self, option: u32, data: &[u8]) -> u32 {
        self.ask(option, data).0.last().expect("an option is answered").0
    }

    fn go(&mut self, name: &str) -> Agreed<MemoryDisk> {
        match self.ask(option::GO, &go_data(name, &[])).1 {
            Step::Transmit(agreed) => agreed,
            _ => panic!("{name} is an export"),
        }
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let numbers = [option.to_be_bytes(), (data.len() as u32).to_be_bytes()];
    [&OPTION_MAGIC.to_be_bytes()[..], &numbers.concat(), data].concat()
}

fn parse(mut output: &[u8], option: u32) -> Replies {
    let mut replies = Vec::new();
    while !output.is_empty() {
        assert_eq!(u64_at(output, 0), 0x0003_e889_0455_65a9);
        assert_eq!(u32_at(output, 8), option);
        let len = u32_at(output, 16) as usize;
        replies.push((u32_at(output, 12), output[20..20 + len].to_vec()));
        output = &output[20 + len..];
    }
    replies
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn go_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

fn context_names(replies: &Replies) -> Vec<&str> {
    let contexts = replies.iter().filter(|(kind, _)| *kind == reply::META_CONTEXT);
    contexts.map(|(_, data)| std::str::from_utf8(&data[4..]).unwrap()).collect()
}

#[test]
fn the_greeting_offers_fixed_newstyle_without_zeroes() {
    assert_eq!(&Negotiation::<MemoryDisk>::greeting(), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn a_client_with_unknown_flags_is_left() {
    let mut negotiation = Negotiation::<MemoryDisk>::new(Arc::new(Exports::new()), TlsPolicy::Off);
    let (_, step) = negotiation.step(&4u32.to_be_bytes(), &mut Vec::new());
    assert!(matches!(step, Step::Close));
}

#[test]
fn an_old_client_gets_an_export_by_its_name() {
    for (flags, zeroes) in [(0, 124), (NO_ZEROES, 0), (FIXED, 124)] {
        let mut client = Client::with_flags(TlsPolicy::Off, flags);
        let (output, step) = client.step(option::EXPORT_NAME, b"second");
        assert_eq!(output.len(), 10 + zeroes);
        assert_eq!(u64_at(&output, 0), CAPACITY);
        assert_eq!(u16_at(&output, 8) & transmission::READ_ONLY, transmission::READ_ONLY);
        assert!(
            matches!(step, Step::Transmit(agreed) if agreed.export.name() == "second" && agreed.form == Form::Simple)
        );
    }
    let mut client = Client::with_flags(TlsPolicy::Off, 0);
    let (output, step) = client.step(option::EXPORT_NAME, b"third");
    assert!(output.is_empty() && matches!(step, Step::Close));
    let mut client = Client::with_flags(TlsPolicy::Off, 0);
    let (output, step) = client.step(option::LIST, b"");
    assert!(output.is_empty() && matches!(step, Step::Close), "an old client knows no other option");
}

#[test]
fn exports_are_listed_with_their_descriptions() {
    let mut client = Client::new(TlsPolicy::Off);
    let (replies, _) = client.ask(option::LIST, b"");
    let expected: Replies = vec![
        (reply::SERVER, [string("first"), b"The first disk.".to_vec()].concat()),
        (reply::SERVER, string("second")),
        (reply::ACK, vec![]),
    ];
    assert_eq!(replies, expected);
    assert_eq!(client.outcome(option::LIST, b"x"), reply::ERR_INVALID);
}

#[test]
fn info_and_go_tell_the_same() {
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99];
    let mut client = Client::new(TlsPolicy::Off);
    let (asked, step) = client.ask(option::INFO, &go_data("", &wanted));
    assert!(matches!(step, Step::Continue));
    let (got, step) = client.ask(option::GO, &go_data("", &wanted));
    assert!(matches!(step, Step::Transmit(agreed) if agreed.export.name() == "first"));
    assert_eq!(asked, got);
    let kinds: Vec<u16> =
        got.iter().filter(|(kind, _)| *kind == reply::INFO).map(|(_, data)| u16_at(data, 0)).collect();
    assert_eq!(kinds, [info::EXPORT, info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]);
    assert_eq!(&got[1].1[2..], b"first");
    assert_eq!(&got[2].1[2..], b"The first disk.");
    let sizes: Vec<u32> = got[3].1[2..].chunks(4).map(|size| u32_at(size, 0)).collect();
    assert_eq!(sizes, [1, 4096, 64 << 20]);
    let mut client = Client::new(TlsPolicy::Off);
    assert_eq!(client.outcome(option::GO, &go_data("third", &[])), reply::ERR_UNKNOWN);
}

#[test]
fn structured_replies_bring_the_flag_not_to_fragment() {
    let mut client = Client::new(TlsPolicy::Off);
    let flags = |client: &mut Client| u16_at(&client.ask(option::INFO, &go_data("", &[])).0[0].1, 10);
    assert_eq!(flags(&mut client) & transmission::SEND_DF, 0);
    assert_eq!(client.outcome(option::STRUCTURED_REPLY, b"x"), reply::ERR_INVALID);
    assert_eq!(client.outcome(option::STRUCTURED_REPLY, b""), reply::ACK);
    assert_ne!(flags(&mut client) & transmission::SEND_DF, 0);
    assert_eq!(client.go("first").form, Form::Structured);
}

#[test]
fn extended_headers_need_no_structured_replies_and_there_is_no_way_back() {
    for before in [&[][..], &[option::STRUCTURED_REPLY]] {
        let mut client = Client::new(TlsPolicy::Off);
        before.iter().for_each(|option| assert_eq!(client.outcome(*option, b""), reply::ACK));
        assert_eq!(client.outcome(option::EXTENDED_HEADERS, b"x"), reply::ERR_INVALID);
        assert_eq!(client.outcome(option::EXTENDED_HEADERS, b""), reply::ACK);
        assert_eq!(client.outcome(option::STRUCTURED_REPLY, b""), reply::ERR_EXT_HEADER_REQD);
        assert_eq!(client.outcome(option::EXTENDED_HEADERS, b""), reply::ACK);
        let flags = u16_at(&client.ask(option::INFO, &go_data("", &[])).0[0].1, 10);
        assert_ne!(flags & transmission::SEND_DF, 0);
        assert_eq!(client.outcome(option::SET_META_CONTEXT, &context_data("first", &["base:allocation"])), reply::ACK);
        let agreed = client.go("first");
        assert!(agreed.form == Form::Extended && agreed.contexts.len() == 1);
    }
}

#[test]
fn contexts_are_listed_and_chosen() {
    let mut client = Client::new(TlsPolicy::Off);
    let all = context_data("first", &[]);
    assert_eq!(client.outcome(option::LIST_META_CONTEXT, &all), reply::ERR_INVALID, "structured replies come first");
    assert_eq!(client.outcome(option::STRUCTURED_REPLY, b""), reply::ACK);
    let everything = [
        "base:allocation",
        "polder:changed:new",
        "polder:changed:old",
        "qemu:dirty-bitmap:new",
        "qemu:dirty-bitmap:old",
    ];
    let (replies, _) = client.ask(option::LIST_META_CONTEXT, &all);
    assert_eq!(context_names(&replies), everything);
    for (query, expected) in [
        ("base:", &everything[..1]),
        ("qemu:", &everything[3..]),
        ("polder:changed:", &everything[1..3]),
        ("qemu:dirty-bitmap:old", &everything[4..]),
        ("base:unknown", &[]),
        ("elsewhere:", &[]),
    ] {
        let (replies, _) = client.ask(option::LIST_META_CONTEXT, &context_data("first", &[query, query]));
        assert_eq!(context_names(&replies), expected);
    }
    let chosen = ["qemu:dirty-bitmap:old", "base:allocation", "polder:changed:gone", "base:"];
    let (replies, _) = client.ask(option::SET_META_CONTEXT, &context_data("first", &chosen));
    assert_eq!(context_names(&replies), &chosen[..2]);
    assert_eq!(
        replies.iter().map(|(_, data)| data.first_chunk::<4>().copied()).collect::<Vec<_>>(),
        [Some([0; 4]), Some([0, 0, 0, 1]), None]
    );
    assert!(client.go("second").contexts.is_empty(), "they were chosen for another export");
    let mut client = Client::new(TlsPolicy::Off);
    client.ask(option::STRUCTURED_REPLY, b"");
    client.ask(option::SET_META_CONTEXT, &context_data("first", &chosen));
    assert_eq!(client.go("first").contexts.len(), 2);
}

#[test]
fn a_context_option_that_fails_leaves_none_chosen() {
    let mut client = Client::new(TlsPolicy::Off);
    client.ask(option::STRUCTURED_REPLY, b"");
    client.ask(option::SET_META_CONTEXT, &context_data("first", &["base:allocation"]));
    assert_eq!(client.outcome(option::SET_META_CONTEXT, b"x"), reply::ERR_INVALID);
    assert!(client.go("first").contexts.is_empty());
}

#[test]
fn options_that_make_no_sense_are_refused_and_the_next_one_is_answered() {
    let mut client = Client::new(TlsPolicy::Off);
    client.ask(option::STRUCTURED_REPLY, b"");
    let long_name = "x".repeat(4097);
    let wrong: [(u32, Vec<u8>, u32); 12] = [
        (4, vec![], reply::ERR_UNSUP),
        (99, vec![1; 100], reply::ERR_UNSUP),
        (option::STARTTLS, vec![], reply::ERR_POLICY),
        (option::GO, vec![], reply::ERR_INVALID),
        (option::GO, vec![0xff; 4], reply::ERR_INVALID),
        (option::GO, [string("first"), vec![0, 2, 0, 1]].concat(), reply::ERR_INVALID),
        (option::GO, go_data("fir\0st", &[]), reply::ERR_INVALID),
        (option::INFO, go_data(&long_name, &[]), reply::ERR_INVALID),
        (option::LIST_META_CONTEXT, context_data("first", &["nocolon"]), reply::ERR_INVALID),
        (option::LIST_META_CONTEXT, [string("first"), vec![0xff; 4]].concat(), reply::ERR_INVALID),
        (option::SET_META_CONTEXT, context_data("third", &[]), reply::ERR_UNKNOWN),
        (option::SET_META_CONTEXT, context_data("first", &vec!["base:"; CONTEXT_QUERIES_MAX + 1]), reply::ERR_TOO_BIG),
    ];
    for (option, data, outcome) in wrong {
        assert_eq!(client.outcome(option, &data), outcome, "option {option}");
        assert_eq!(client.outcome(option::LIST, b""), reply::ACK);
    }
}

#[test]
fn an_option_that_is_too_long_is_skipped() {
    let mut client = Client::new(TlsPolicy::Off);
    let len = OPTION_LEN_MAX + 1;
    let mut bytes = option_bytes(option::GO, &vec![1; len]);
    bytes.extend(option_bytes(option::ABORT, b"any data"));
    let mut output = Vec::new();
    let mut start = 0;
    loop {
        let end = (start + 1000).min(bytes.len());
        let (used, step) = client.negotiation.step(&bytes[start..end], &mut output);
        start += used;
        if matches!(step, Step::Close) {
            break;
        }
    }
    let split = output.len() - 20;
    assert_eq!(parse(&output[..split], option::GO)[0].0, reply::ERR_TOO_BIG);
    assert_eq!(parse(&output[split..], option::ABORT), [(reply::ACK, vec![])]);
    let mut client = Client::new(TlsPolicy::Off);
    let head = option_bytes(option::EXPORT_NAME, &vec![1; len]);
    assert!(matches!(client.negotiation.step(&head[..16], &mut output).1, Step::Close));
}

#[test]
fn a_wrong_magic_number_ends_the_connection() {
    let mut client = Client::new(TlsPolicy::Off);
    let (_, step) = client.negotiation.step(&[0; 16], &mut Vec::new());
    assert!(matches!(step, Step::Close));
}

#[test]
fn where_tls_is_required_nothing_else_is_answered() {
    let mut client = Client::new(TlsPolicy::Required);
    for option in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::SET_META_CONTEXT, 99] {
        assert_eq!(client.outcome(option, b""), reply::ERR_TLS_REQD);
    }
    assert!(matches!(client.step(option::EXPORT_NAME, b"first").1, Step::Close));
    let mut client = Client::new(TlsPolicy::Required);
    let (replies, step) = client.ask(option::STARTTLS, b"");
    assert_eq!(replies, [(reply::ACK, vec![])]);
    assert!(matches!(step, Step::StartTls));
    client.negotiation.secured();
    assert_eq!(client.outcome(option::LIST, b""), reply::ACK);
    assert_eq!(client.outcome(option::STARTTLS, b""), reply::ERR_INVALID);
}

#[test]
fn what_was_said_before_tls_is_forgotten() {
    let mut client = Client::new(TlsPolicy::Allowed);
    assert_eq!(client.outcome(option::STRUCTURED_REPLY, b""), reply::ACK);
    client.ask(option::SET_META_CONTEXT, &context_data("first", &["base:allocation"]));
    assert_eq!(client.outcome(option::STARTTLS, b"x"), reply::ERR_INVALID);
    assert!(matches!(client.ask(option::STARTTLS, b"").1, Step::StartTls));
    client.negotiation.secured();
    let agreed = client.go("first");
    assert!(agreed.form == Form::Simple && agreed.contexts.is_empty());
}

#[test]
fn too_many_contexts_are_refused() {
    let disk = Arc::new(MemoryDisk::new(CAPACITY));
    let names: Vec<String> = (0..=CONTEXTS_MAX).map(|index| format!("s{index}")).collect();
    names.iter().for_each(|name| disk.snapshot(name));
    let exports = Arc::new(Exports::new());
    exports.add(Export::new("disk", disk)).unwrap();
    let mut negotiation = Negotiation::new(exports, TlsPolicy::Off);
    negotiation.step(&FIXED.to_be_bytes(), &mut Vec::new());
    let mut client = Client { negotiation };
    client.ask(option::STRUCTURED_REPLY, b"");
    let queries: Vec<String> = names.iter().map(|name| format!("polder:changed:{name}")).collect();
    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &context_data("disk", &queries)), reply::ERR_TOO_BIG);
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &context_data("disk", &queries[1..])), reply::ACK);
}

mod random {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_options_are_answered_or_end_the_connection(
            options in prop::collection::vec((0u32..13, prop::collection::vec(any::<u8>(), 0..60)), 0..30),
            tail in prop::collection::vec(any::<u8>(), 0..40),
            required: bool,
        ) {
            let mut client = Client::new(if required { TlsPolicy::Required } else { TlsPolicy::Allowed });
            let mut bytes: Vec<u8> = options.iter().flat_map(|(option, data)| option_bytes(*option, data)).collect();
            bytes.extend(tail);
            let mut start = 0;
            loop {
                let mut output = Vec::new();
                let (used, step) = client.negotiation.step(&bytes[start..], &mut output);
                prop_assert!(used <= bytes.len() - start);
                start += used;
                match step {
                    Step::Continue => prop_assert!(used > 0),
                    Step::StartTls => client.negotiation.secured(),
                    Step::NeedMore | Step::Close | Step::Transmit(_) => break,
                }
            }
        }
    }
}
