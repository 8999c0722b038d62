//! The files that tidy looks at, with Rust code separated from its comments and strings.

use crate::command::capture;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Everything the rules need, read once.
pub struct Sources {
    pub root: PathBuf,
    /// Every file git tracks or would track, relative to the root.
    pub files: Vec<String>,
    /// The Rust files among them.
    pub rust: Vec<RustFile>,
    /// What `cargo metadata` says of the workspace.
    pub metadata: Value,
}

/// One Rust file.
pub struct RustFile {
    pub path: String,
    pub text: String,
    /// The text with comments, strings and character literals blanked out, line for line.
    pub code: String,
}

impl Sources {
    /// Reads the work tree at `root`.
    pub fn read(root: &Path) -> Result<Self> {
        let listed = capture(Command::new("git").current_dir(root).args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
        ]))?;
        let files: Vec<String> = listed.lines().filter(|file| root.join(file).is_file()).map(str::to_string).collect();
        let mut rust = Vec::new();
        for path in files.iter().filter(|file| file.ends_with(".rs")) {
            let text = std::fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))?;
            rust.push(RustFile { path: path.clone(), code: code_only(&text), text });
        }
        let metadata =
            capture(crate::command::cargo().args(["metadata", "--no-deps", "--format-version=1", "--offline"]))
                .or_else(|_| capture(crate::command::cargo().args(["metadata", "--no-deps", "--format-version=1"])))?;
        let metadata = serde_json::from_str(&metadata).context("cargo metadata wrote no JSON")?;
        Ok(Self { root: root.to_path_buf(), files, rust, metadata })
    }

    /// The text of a file at the top, or nothing if it is not there.
    pub fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }
}

/// Blanks comments, strings and character literals with spaces; line breaks stay, so line numbers hold.
pub fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = match literal_end(bytes, at) {
            Some(end) => end,
            None => {
                out.push(bytes[at]);
                at += 1;
                continue;
            }
        };
        out.extend(bytes[at..end].iter().map(|byte| if *byte == b'\n' { b'\n' } else { b' ' }));
        at = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// If a comment, string or character literal starts at `at`, where it ends.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let identifier_before = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if rest.starts_with(b"//") {
        return Some(at + rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len()));
    }
    if rest.starts_with(b"/*") {
        return Some(block_comment_end(bytes, at));
    }
    if rest.starts_with(b"\"") {
        return Some(string_end(bytes, at + 1));
    }
    if !identifier_before && (rest.starts_with(b"r\"") || rest.starts_with(b"r#") || rest.starts_with(b"br")) {
        return raw_string_end(bytes, at);
    }
    if rest.starts_with(b"'") {
        return character_end(bytes, at);
    }
    None
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0usize);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn raw_string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + usize::from(bytes[start] == b'b') + 1;
    let hashes = bytes.get(at..)?.iter().take_while(|byte| **byte == b'#').count();
    at += hashes;
    if bytes.get(at) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'"'];
    close.extend(std::iter::repeat_n(b'#', hashes));
    let found = bytes[at + 1..].windows(close.len()).position(|window| window == close);
    Some(found.map_or(bytes.len(), |offset| at + 1 + offset + close.len()))
}

/// `'a'` and `'\n'` are literals, `'a` is a lifetime.
fn character_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes.get(at + 3..)?.iter().position(|byte| *byte == b'\'')?;
        return Some(at + 3 + close + 1);
    }
    let width = match bytes.get(at + 1)? {
        0..=0x7f => 1,
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        _ => 4,
    };
    (bytes.get(at + 1 + width) == Some(&b'\'')).then_some(at + width + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_are_no_code_and_lines_stay() {
        let text =
            "let a = \"unsafe {\"; // unsafe {\nlet b = 'x'; let c: &'static str = r#\"unsafe\n\"#; /* unsafe */ end";
        let code = code_only(text);
        assert!(!code.contains("unsafe"));
        assert_eq!(code.lines().count(), text.lines().count());
        assert!(code.contains("'static") && code.contains("end"));
    }
}
