//! Archives and folders become ext4 disks.

use super::error::{FormatError, file_name};
use super::ext4::{Entry, Ext4Options, Ext4Summary, Ext4Writer};
use super::tar::{TarKind, TarReader};
use super::{RawSource, Source, Target};
use std::io::{self, BufReader, Read};
use std::path::Path;

/// The largest window that a zstd stream may ask for, in bytes, and the memory that an xz stream may take.
const WINDOW_LEN_MAX: u64 = 128 << 20;
/// Bytes that are read from an archive's file at once.
const READ_LEN: usize = 256 << 10;

/// What an archive is packed with. The caller says it, as with every format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Nothing.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
    /// xz.
    Xz,
}

/// What became of an archive or a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The file system.
    pub file_system: Ext4Summary,
    /// Entries whose access control list was left out: archives have it in words that only the machine which wrote them can
    /// read. Lists that lie in an archive as extended attributes are kept.
    pub access_lists_left_out: u64,
}

/// Makes an ext4 file system of a tar archive. The archive's bytes are read once, from one end to the other; at most the target's
/// room is written, however much the archive unpacks to.
pub fn tar_to_ext4(
    path: &Path,
    packing: Packing,
    target: &mut dyn Target,
    options: Ext4Options,
) -> Result<Imported, FormatError> {
    let source = RawSource::open(path)?;
    let name = file_name(path);
    let input = BufReader::with_capacity(READ_LEN, SourceReader { source, at: 0 });
    match packing {
        Packing::Plain => tar_stream_to_ext4(input, &name, target, options),
        Packing::Gzip => tar_stream_to_ext4(flate2::bufread::MultiGzDecoder::new(input), &name, target, options),
        Packing::Zstd => tar_stream_to_ext4(ZstdReader { input, frame: None }, &name, target, options),
        Packing::Xz => {
            let flags = liblzma::stream::CONCATENATED;
            let stream = liblzma::stream::Stream::new_stream_decoder(WINDOW_LEN_MAX, flags)
                .map_err(|error| FormatError::io(&name, "unpack it", io::Error::other(error)))?;
            let input = liblzma::bufread::XzDecoder::new_stream(input, stream);
            tar_stream_to_ext4(input, &name, target, options)
        }
    }
}

/// Makes an ext4 file system of an unpacked tar archive; `name` is for errors.
pub fn tar_stream_to_ext4(
    input: impl Read,
    name: &str,
    target: &mut dyn Target,
    options: Ext4Options,
) -> Result<Imported, FormatError> {
    let mut writer = Ext4Writer::new(target, name, options)?;
    let mut archive = TarReader::new(input, name);
    let mut access_lists_left_out = 0;
    while let Some(entry) = archive.next_entry()? {
        access_lists_left_out += u64::from(entry.has_acl_text);
        let what = match &entry.kind {
            TarKind::File { len } => Entry::File { len: *len },
            TarKind::HardLink { target } => Entry::HardLink { target },
            TarKind::Symlink { text } => Entry::Symlink { text },
            TarKind::Character { major, minor } => Entry::Character { major: *major, minor: *minor },
            TarKind::Block { major, minor } => Entry::Block { major: *major, minor: *minor },
            TarKind::Directory => Entry::Directory,
            TarKind::Fifo => Entry::Fifo,
        };
        writer.add(&entry.path, &entry.attributes, what)?;
        archive.content(&entry, |offset, bytes| writer.write(offset, bytes))?;
    }
    Ok(Imported { file_system: writer.finish()?, access_lists_left_out })
}

/// A source from one end to the other.
struct SourceReader {
    source: RawSource,
    at: u64,
}

impl Read for SourceReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = (self.source.len() - self.at).min(bytes.len() as u64) as usize;
        self.source.read_at(self.at, &mut bytes[..len]).map_err(io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// zstd frames one behind the other, as `zstd` and `pzstd` write them.
struct ZstdReader<R: io::BufRead> {
    input: R,
    frame: Option<ruzstd::decoding::FrameDecoder>,
}

impl<R: io::BufRead> Read for ZstdReader<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
        use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
        loop {
            if let Some(frame) = &mut self.frame {
                let len = frame.read(bytes)?;
                if len > 0 || bytes.is_empty() {
                    return Ok(len);
                }
                if !frame.is_finished() {
                    let some = BlockDecodingStrategy::UptoBytes(bytes.len());
                    frame.decode_blocks(&mut self.input, some).map_err(io::Error::other)?;
                    continue;
                }
            }
            if self.input.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let mut frame = self.frame.take().unwrap_or_else(|| {
                let mut frame = FrameDecoder::new();
                frame.set_max_window_size(WINDOW_LEN_MAX);
                frame
            });
            match frame.reset(&mut self.input) {
                Ok(()) => self.frame = Some(frame),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    io::copy(&mut self.input.by_ref().take(u64::from(length)), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}
