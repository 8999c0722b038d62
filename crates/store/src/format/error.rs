//! What can be wrong with an image, in words for its user.

use std::io;
use std::path::Path;

/// Characters of a name out of a file that an error shows.
const SHOWN_NAME_LEN_MAX: usize = 200;

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The host refused.
    #[error("{file}: cannot {act}")]
    Io {
        /// The file.
        file: String,
        /// What was tried: "read 512 bytes at 0x1000".
        act: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The file's first bytes are not those of the format.
    #[error("{file} is not a {format} image: {reason}")]
    WrongFormat {
        /// The file.
        file: String,
        /// What the caller said that it is.
        format: &'static str,
        /// What is there instead.
        reason: String,
    },
    /// The file breaks the rules of its format.
    #[error("{file}: {place}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// The table and the index in it.
        place: String,
        /// What is wrong there.
        problem: String,
    },
    /// The file is sound, and uses something that polder does not read.
    #[error("{file} uses {feature}, which polder does not read")]
    Unsupported {
        /// The file.
        file: String,
        /// The feature's name.
        feature: String,
    },
    /// Something is larger than any sound image needs.
    #[error("{file}: {what} is {value}, and at most {limit} is read")]
    TooLarge {
        /// The file.
        file: String,
        /// What is too large, with its unit.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        limit: u64,
    },
    /// The image names another file, and the caller did not allow to follow names.
    #[error("{file} names another file as its {role} ({name}), and names in an image are not followed")]
    NamesOtherFile {
        /// The file.
        file: String,
        /// What the other one is for it: "backing file", "data file", "extent".
        role: &'static str,
        /// The name, made printable.
        name: String,
    },
    /// The caller allowed names, but not this one.
    #[error("{file} names {name} as its {role}, and {problem}")]
    BadOtherFile {
        /// The file.
        file: String,
        /// What the other one is for it.
        role: &'static str,
        /// The name, made printable.
        name: String,
        /// Why it is not opened.
        problem: String,
    },
    /// There is no snapshot of that name inside.
    #[error("{file} has no snapshot {name}")]
    NoSuchSnapshot {
        /// The file.
        file: String,
        /// What the caller asked for.
        name: String,
    },
    /// The format needs a program that is not there.
    #[error("{format} images are read and written with qemu-img, and there is no {program}")]
    NoQemuImg {
        /// Where it was looked for.
        program: String,
        /// The format.
        format: &'static str,
    },
    /// The program did not convert.
    #[error("{file}: qemu-img does not convert it: {problem}")]
    QemuImg {
        /// The file.
        file: String,
        /// What the program said, made printable.
        problem: String,
    },
    /// The target is smaller than what is to go into it.
    #[error("the target has {target_len} bytes, and {needed_len} are needed")]
    TargetTooSmall {
        /// Bytes of the target.
        target_len: u64,
        /// Bytes of the source.
        needed_len: u64,
    },
    /// The target has no room for what else there is.
    #[error("the disk of {target_len} bytes has no {what} left for what is to go into it")]
    TargetFull {
        /// Bytes of the target.
        target_len: u64,
        /// What has run out: "blocks" or "inodes".
        what: &'static str,
    },
    /// A target that takes ranges in ascending order got one that goes back.
    #[error("{file}: a write at {offset} comes after one that ended at {end}")]
    OutOfOrder {
        /// The file.
        file: String,
        /// Where the write begins.
        offset: u64,
        /// Where the last one ended.
        end: u64,
    },
}

impl FormatError {
    pub(crate) fn io(file: &str, act: impl Into<String>, source: impl Into<io::Error>) -> Self {
        FormatError::Io { file: file.to_owned(), act: act.into(), source: source.into() }
    }

    pub(crate) fn malformed(file: &str, place: impl Into<String>, problem: impl Into<String>) -> Self {
        FormatError::Malformed { file: file.to_owned(), place: place.into(), problem: problem.into() }
    }

    pub(crate) fn unsupported(file: &str, feature: impl Into<String>) -> Self {
        FormatError::Unsupported { file: file.to_owned(), feature: feature.into() }
    }
}

/// A file's name as errors show it.
pub(crate) fn file_name(path: &Path) -> String {
    path.display().to_string()
}

/// Bytes out of an image as an error may show them: no control characters, no terminal sequences, cut.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut shown: String =
        text.chars().take(SHOWN_NAME_LEN_MAX).flat_map(|character| character.escape_debug()).collect();
    if text.chars().nth(SHOWN_NAME_LEN_MAX).is_some() {
        shown.push_str("...");
    }
    shown
}
