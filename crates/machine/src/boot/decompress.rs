//! Unpacks the payload of a bzImage on the host: gzip, xz, lz4 and zstd as Linux's build packs them.
//!
//! The payload is a file's bytes, so hostile: what comes out is bounded by [`KERNEL_LEN_MAX`], and so is what the unpackers keep.

use std::borrow::Cow;
use std::io::{self, Read};

use polder_basics::{ByteSize, MIB};

use super::BootError;
use super::bytes::u32_at;

/// Bytes that an unpacked kernel, and a kernel file, has at most. Debian's have less than 70 MiB.
pub const KERNEL_LEN_MAX: u64 = 512 * MIB;
/// Memory that the xz unpacker may take: Linux packs with dictionaries up to 128 MiB.
const XZ_MEMORY_MAX: u64 = 160 * MIB;
/// The size of a block of lz4's legacy frame.
const LZ4_BLOCK_LEN: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// The kernel ELF file inside a payload.
pub(super) fn unpack(payload: &[u8]) -> Result<Cow<'_, [u8]>, BootError> {
    unpack_bounded(payload, KERNEL_LEN_MAX)
}

fn unpack_bounded(payload: &[u8], len_max: u64) -> Result<Cow<'_, [u8]>, BootError> {
    let unpacked = match payload {
        [0x7f, b'E', b'L', b'F', ..] => return Ok(Cow::Borrowed(payload)),
        [0x1f, 0x8b, ..] => read("gzip", flate2::read::GzDecoder::new(payload), len_max)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, 0)
                .map_err(|error| BootError::BadPayload { method: "xz", source: error.into() })?;
            read("xz", liblzma::read::XzDecoder::new_stream(payload, stream), len_max)?
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(payload, len_max)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let bad = |error: ruzstd::decoding::errors::FrameDecoderError| BootError::BadPayload {
                method: "zstd",
                source: io::Error::other(error.to_string()),
            };
            read("zstd", ruzstd::decoding::StreamingDecoder::new(payload).map_err(bad)?, len_max)?
        }
        [b'B', b'Z', b'h', ..] => return Err(BootError::UnknownCompression { method: "bzip2" }),
        [0x89, b'L', b'Z', b'O', ..] => return Err(BootError::UnknownCompression { method: "lzo" }),
        [0x5d, 0, 0, ..] => return Err(BootError::UnknownCompression { method: "lzma" }),
        _ => return Err(BootError::UnknownCompression { method: "an unknown method" }),
    };
    Ok(Cow::Owned(unpacked))
}

fn read(method: &'static str, decoder: impl Read, len_max: u64) -> Result<Vec<u8>, BootError> {
    let mut unpacked = Vec::new();
    decoder.take(len_max + 1).read_to_end(&mut unpacked).map_err(|source| BootError::BadPayload { method, source })?;
    if unpacked.len() as u64 > len_max {
        return Err(BootError::PayloadTooLarge { max: ByteSize(len_max) });
    }
    Ok(unpacked)
}

/// The legacy frame: a magic, then blocks of a 32-bit length and bytes that unpack to 8 MiB, the last to less. The build
/// appends the unpacked size, 4 bytes that look like a block's length with no block behind it.
fn lz4_legacy(payload: &[u8], len_max: u64) -> Result<Vec<u8>, BootError> {
    let bad = |what: String| BootError::BadPayload {
        method: "lz4",
        source: io::Error::new(io::ErrorKind::InvalidData, what),
    };
    let mut rest = &payload[LZ4_LEGACY_MAGIC.len()..];
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_BLOCK_LEN];
    while rest.len() > 4 {
        let len = u32_at(rest, 0).ok_or_else(|| bad("a block's length is cut off".to_owned()))?;
        if len.to_le_bytes() == LZ4_LEGACY_MAGIC {
            // Concatenated frames.
            rest = &rest[4..];
            continue;
        }
        let packed =
            rest.get(4..4usize.saturating_add(len as usize)).ok_or_else(|| bad("a block is cut off".to_owned()))?;
        let count = lz4_flex::block::decompress_into(packed, &mut block).map_err(|error| bad(error.to_string()))?;
        if unpacked.len() as u64 + count as u64 > len_max {
            return Err(BootError::PayloadTooLarge { max: ByteSize(len_max) });
        }
        unpacked.extend_from_slice(&block[..count]);
        rest = &rest[4 + packed.len()..];
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn sample() -> Vec<u8> {
        (0..200_000u32).flat_map(|value| (value / 7).to_le_bytes()).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// As scripts/xz_wrap.sh does: the x86 filter, LZMA2, CRC32.
    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut filters = liblzma::stream::Filters::new();
        filters.x86().lzma2(&liblzma::stream::LzmaOptions::new_preset(1).unwrap());
        let stream = liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32).unwrap();
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_LEGACY_MAGIC.to_vec();
        for block in bytes.chunks(LZ4_BLOCK_LEN) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    /// The build appends the unpacked size to each but gzip, which has it already.
    fn packed(bytes: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let size = (bytes.len() as u32).to_le_bytes();
        let mut all = vec![("gzip", gzip(bytes)), ("xz", xz(bytes)), ("lz4", lz4(bytes)), ("zstd", zstd(bytes))];
        all[1..].iter_mut().for_each(|(_, packed)| packed.extend(size));
        all
    }

    #[test]
    fn every_method_gives_the_bytes_back() {
        let bytes = sample();
        for (method, packed) in packed(&bytes) {
            assert!(packed.len() < bytes.len(), "{method}");
            assert!(*unpack(&packed).unwrap() == *bytes, "{method}");
        }
        let large = vec![7; 3 * LZ4_BLOCK_LEN / 2];
        assert!(*unpack(&lz4(&large)).unwrap() == *large);
    }

    #[test]
    fn what_unpacks_to_more_than_the_bound_is_refused() {
        let bytes = vec![0; 3 << 20];
        for (method, packed) in packed(&bytes) {
            let result = unpack_bounded(&packed, 1 << 20);
            assert!(matches!(result, Err(BootError::PayloadTooLarge { .. })), "{method}");
        }
    }

    #[test]
    fn truncated_payloads_are_refused_with_the_method() {
        let bytes = sample();
        for (method, packed) in packed(&bytes) {
            let error = unpack(&packed[..packed.len() / 2]).unwrap_err().to_string();
            assert!(error.contains(method), "{method}: {error}");
        }
        assert!(unpack(b"BZh9").unwrap_err().to_string().contains("bzip2"));
        assert!(unpack(&[]).is_err());
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn damaged_payloads_never_panic_and_stay_in_bounds(position in 0usize..2000, byte: u8, cut in 0usize..4000) {
            let bytes = &sample()[..20_000];
            for (_, mut packed) in packed(bytes) {
                let position = position % packed.len();
                packed[position] = byte;
                packed.truncate(packed.len().saturating_sub(cut % 7));
                if let Ok(unpacked) = unpack_bounded(&packed, 100_000) {
                    assert!(unpacked.len() <= 100_000 || unpacked.len() == packed.len());
                }
            }
        }
    }
}
