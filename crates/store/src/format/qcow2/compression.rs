//! Compressed clusters: raw deflate with a window of 4 KiB, or a zstd frame.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::io::Read;

/// What compressed clusters of an image are compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// zstd.
    Zstd,
}

/// The largest window that a zstd frame may ask for, in bytes: what compressors use at their usual levels. QEMU's frames need
/// one cluster.
const ZSTD_WINDOW_LEN_MAX: u64 = 8 << 20;

/// The window of deflate that the format prescribes: 4 KiB.
const ZLIB_WINDOW_BITS: u8 = 12;

/// State that is worth keeping from cluster to cluster.
pub(super) struct Inflater {
    zlib: Decompress,
    zstd: FrameDecoder,
}

impl Inflater {
    pub(super) fn new() -> Self {
        let mut zstd = FrameDecoder::new();
        zstd.set_max_window_size(ZSTD_WINDOW_LEN_MAX);
        Inflater { zlib: Decompress::new(false), zstd }
    }

    /// Fills `cluster` from `bytes`, behind whose end of stream anything may follow. What does not give a whole cluster is an
    /// error; what would give more is not inflated further.
    pub(super) fn inflate(&mut self, kind: Compression, bytes: &[u8], cluster: &mut [u8]) -> Result<(), String> {
        match kind {
            Compression::Zlib => {
                self.zlib.reset(false);
                let status = self
                    .zlib
                    .decompress(bytes, cluster, FlushDecompress::Finish)
                    .map_err(|error| format!("the compressed data is no deflate stream: {error}"))?;
                let got = self.zlib.total_out() as usize;
                if got != cluster.len() {
                    let end = if status == Status::StreamEnd { "ends" } else { "is cut off" };
                    return Err(format!("the compressed data {end} after {got} of {} bytes", cluster.len()));
                }
                Ok(())
            }
            Compression::Zstd => {
                let mut rest = bytes;
                self.zstd.reset(&mut rest).map_err(|error| format!("the compressed data is no zstd frame: {error}"))?;
                let damaged = |error| format!("the compressed data is damaged: {error}");
                self.zstd.decode_blocks(&mut rest, BlockDecodingStrategy::UptoBytes(cluster.len())).map_err(damaged)?;
                if !self.zstd.is_finished() {
                    // An empty last block may follow.
                    self.zstd.decode_blocks(&mut rest, BlockDecodingStrategy::UptoBlocks(1)).map_err(damaged)?;
                }
                if !self.zstd.is_finished() || self.zstd.can_collect() != cluster.len() {
                    let got = self.zstd.can_collect();
                    let end = if self.zstd.is_finished() { "ends" } else { "goes on" };
                    return Err(format!(
                        "the compressed data {end} after {got} bytes; a cluster has {}",
                        cluster.len()
                    ));
                }
                self.zstd.read_exact(cluster).map_err(|error| format!("the compressed data is damaged: {error}"))?;
                Ok(())
            }
        }
    }
}

/// Compresses clusters, one after the other.
pub(super) enum Deflater {
    /// Raw deflate.
    Zlib(Compress),
    /// zstd.
    Zstd,
}

impl Deflater {
    pub(super) fn new(kind: Compression) -> Self {
        match kind {
            Compression::Zlib => {
                let level = flate2::Compression::default();
                Deflater::Zlib(Compress::new_with_window_bits(level, false, ZLIB_WINDOW_BITS))
            }
            Compression::Zstd => Deflater::Zstd,
        }
    }

    /// The cluster compressed, unless that is no shorter.
    pub(super) fn deflate(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        match self {
            Deflater::Zlib(zlib) => {
                zlib.reset();
                // One byte less than the cluster: what does not fit is not worth it.
                let mut packed = vec![0; cluster.len() - 1];
                let status = zlib.compress(cluster, &mut packed, FlushCompress::Finish);
                packed.truncate(zlib.total_out() as usize);
                matches!(status, Ok(Status::StreamEnd)).then_some(packed)
            }
            Deflater::Zstd => {
                Some(compress_to_vec(cluster, CompressionLevel::Fastest)).filter(|packed| packed.len() < cluster.len())
            }
        }
    }
}
