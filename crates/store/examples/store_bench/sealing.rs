//! What the steps of storing and reading a chunk cost, each alone and all together, with encryption and without.

use std::fs::File;
use std::hint::black_box;
use std::num::NonZeroU8;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use polder_store::{Kind, Name, Namer};
use polder_trust::keys::Secret;
use polder_trust::seal::{ChunkCipher, Form, LogCipher, LogPlace, Seal, Suite};
use serde_json::json;

use crate::Outcome;
use crate::arguments::Arguments;

const CHUNK: usize = 16 << 10;
const BLOCK: usize = 4096;
const CHUNKS_MAX: usize = 2048;
const ROUNDS: usize = 40;
/// Bytes of a record's header that a seal is bound to.
const HEADER: [u8; 52] = [7; 52];

/// A chunk on its way.
struct Chunk {
    content: Vec<u8>,
    name: Name,
    form: Form,
    packed: Vec<u8>,
    sealed: Vec<u8>,
    seal: Seal,
}

/// `file= chunks= suite=`: nanoseconds a chunk, the least of many rounds over chunks of a raw disk that are not zeros.
pub fn steps(arguments: &Arguments) -> Outcome {
    let suite = match arguments.number_or("suite", 1)? {
        0 => Suite::Aes256Gcm,
        _ => Suite::Aegis256X2,
    };
    let secret = Secret::random()?;
    let (namer, cipher, log) = (Namer::new(secret.bytes()), ChunkCipher::of(&secret)?, LogCipher::of(suite, &secret));
    let mut table = CompressTable::default();
    let mut space = vec![0; get_maximum_output_size(CHUNK)];
    let mut chunks = read(arguments)?;
    let lz4 = Form::Encoded(NonZeroU8::MIN);
    for chunk in &mut chunks {
        let len = compress_into_with_table(&chunk.content, &mut space, &mut table)?;
        (chunk.form, chunk.packed) = match len + 64 <= CHUNK {
            true => (lz4, space[..len].to_vec()),
            false => (Form::Whole, chunk.content.clone()),
        };
        chunk.name = namer.name(Kind::Data, &chunk.content);
        chunk.sealed = chunk.packed.clone();
        chunk.seal = cipher.seal(suite, &chunk.name.0, chunk.form, &HEADER, &mut chunk.sealed);
    }
    let mut target = vec![0; CHUNK];
    let name = least(&chunks, |chunk| {
        black_box(namer.name(Kind::Data, &chunk.content));
    });
    let pack = least(&chunks, |chunk| {
        // What does not pack is found out the same way.
        let _ = black_box(compress_into_with_table(&chunk.content, &mut space, &mut table));
    });
    let copy = least(&chunks, |chunk| target[..chunk.packed.len()].copy_from_slice(black_box(&chunk.packed)));
    let seal = least(&chunks, |chunk| {
        let payload = &mut target[..chunk.packed.len()];
        payload.copy_from_slice(&chunk.packed);
        black_box(cipher.seal(suite, &chunk.name.0, chunk.form, &HEADER, payload));
    });
    let open = least(&chunks, |chunk| {
        let payload = &mut target[..chunk.packed.len()];
        payload.copy_from_slice(&chunk.sealed);
        cipher.open(&chunk.name.0, chunk.form, &HEADER, &chunk.seal, payload).expect("it was sealed so");
    });
    let mut content = vec![0; CHUNK];
    let unpack = least(&chunks, |chunk| unpack_into(chunk, &chunk.packed, &mut content));
    let mut storing = |is_sealed: bool| {
        least(&chunks, |chunk| {
            let name = namer.name(Kind::Data, &chunk.content);
            let packed = match compress_into_with_table(&chunk.content, &mut space, &mut table) {
                Ok(len) if len + 64 <= CHUNK => &space[..len],
                _ => &chunk.content[..],
            };
            let payload = &mut target[..packed.len()];
            payload.copy_from_slice(packed);
            if is_sealed {
                black_box(cipher.seal(suite, &name.0, chunk.form, &HEADER, payload));
            }
        })
    };
    let (storing, storing_sealed) = (storing(false), storing(true));
    let mut reading = |is_sealed: bool| {
        least(&chunks, |chunk| {
            let payload = &mut target[..chunk.packed.len()];
            payload.copy_from_slice(if is_sealed { &chunk.sealed } else { &chunk.packed });
            if is_sealed {
                cipher.open(&chunk.name.0, chunk.form, &HEADER, &chunk.seal, payload).expect("it was sealed so");
            }
            unpack_into(chunk, payload, &mut content);
        })
    };
    let (reading, reading_sealed) = (reading(false), reading(true));
    let mut sequence = 0;
    let log_block = least(&chunks, |chunk| {
        target[..BLOCK].copy_from_slice(&chunk.content[..BLOCK]);
        black_box(log.seal(LogPlace { epoch: 1, sequence }, &[0; 8], &mut target[..BLOCK]));
        sequence += 1;
    });
    let packed_bytes: usize = chunks.iter().map(|chunk| chunk.packed.len()).sum();
    Ok(json!({
        "chunks": chunks.len(), "packed_bytes": packed_bytes / chunks.len(),
        "name": name, "pack": pack, "copy": copy, "seal": seal, "open": open, "unpack": unpack, "log_block": log_block,
        "storing": storing, "storing_sealed": storing_sealed, "reading": reading, "reading_sealed": reading_sealed,
    }))
}

fn unpack_into(chunk: &Chunk, packed: &[u8], content: &mut [u8]) {
    match chunk.form {
        Form::Whole => content.copy_from_slice(packed),
        Form::Encoded(_) => {
            black_box(decompress_into(packed, content)).expect("it was packed so");
        }
    }
}

/// Chunks from all over the disk.
fn read(arguments: &Arguments) -> Outcome<Vec<Chunk>> {
    let file = File::open(arguments.path("file")?)?;
    let places = file.metadata()?.len() / CHUNK as u64;
    let wanted: usize = arguments.number_or("chunks", CHUNKS_MAX)?;
    // An odd number of chunks apart, as what is packed may go by turns.
    let stride = (places / wanted.max(1) as u64).max(1) | 1;
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < places && chunks.len() < wanted {
        let mut content = vec![0; CHUNK];
        file.read_exact_at(&mut content, at * CHUNK as u64)?;
        at += stride;
        if content.iter().any(|&byte| byte != 0) {
            let seal = Seal { suite: Suite::NEWEST, nonce: [0; 12], tag: [0; 16] };
            let (packed, sealed) = (Vec::new(), Vec::new());
            chunks.push(Chunk { content, name: Name::NONE, form: Form::Whole, packed, sealed, seal });
        }
    }
    if chunks.is_empty() { Err("the disk has nothing but zeros".into()) } else { Ok(chunks) }
}

/// Nanoseconds a chunk of the quickest round.
fn least(chunks: &[Chunk], mut act: impl FnMut(&Chunk)) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        chunks.iter().for_each(&mut act);
        least = least.min(begin.elapsed().as_nanos() as f64 / chunks.len() as f64);
    }
    least
}
