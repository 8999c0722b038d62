//! Every unsafe block and unsafe impl has a `// SAFETY:` comment above it, above its statement, or on its line.

use super::source::{RustFile, Sources};

/// Looks at every Rust file.
pub fn check(sources: &Sources) -> Vec<String> {
    sources.rust.iter().flat_map(check_file).collect()
}

fn check_file(file: &RustFile) -> Vec<String> {
    let text: Vec<&str> = file.text.lines().collect();
    let code: Vec<&str> = file.code.lines().collect();
    let needs_note = |line: &str, next: Option<&&str>| {
        line.match_indices("unsafe").any(|(at, word)| {
            let before = line[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '(') && !line[..at].ends_with('(') {
                return false;
            }
            let after = line[at + word.len()..].trim_start();
            after.starts_with('{')
                || after.starts_with("impl")
                || (after.is_empty() && next.is_some_and(|next| next.trim_start().starts_with('{')))
        })
    };
    (0..code.len())
        .filter(|at| needs_note(code[*at], code.get(at + 1)) && !has_note(&text, &code, *at))
        .map(|at| format!("{}:{}: unsafe without a // SAFETY: comment above it", file.path, at + 1))
        .collect()
}

/// Walks up from the line: over comments, attributes and the beginning of the same statement.
fn has_note(text: &[&str], code: &[&str], line: usize) -> bool {
    if text[line].contains("SAFETY:") {
        return true;
    }
    for at in (0..line).rev() {
        let (written, coded) = (text[at].trim(), code[at].trim());
        if coded.is_empty() && written.contains("SAFETY:") {
            return true;
        }
        if written.is_empty() || (!coded.is_empty() && coded.ends_with([';', '{', '}']) && !coded.starts_with("#[")) {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source::code_only;

    fn findings(text: &str) -> usize {
        check_file(&RustFile { path: "a.rs".into(), text: text.into(), code: code_only(text) }).len()
    }

    #[test]
    fn a_note_above_the_statement_is_enough() {
        assert_eq!(
            findings("fn f() {\n    // SAFETY: because.\n    let a = g(\n        unsafe { h() },\n    );\n}\n"),
            0
        );
        assert_eq!(findings("// SAFETY: plain data.\n#[rustfmt::skip]\nunsafe impl Send for A {}\n"), 0);
    }

    #[test]
    fn an_unsafe_block_without_note_is_found() {
        assert_eq!(findings("fn f() {\n    let b = 1;\n    unsafe { h() }\n}\n"), 1);
        assert_eq!(findings("// SAFETY: another one.\n\nunsafe impl Send for A {}\n"), 1);
    }

    #[test]
    fn an_unsafe_function_or_word_needs_none() {
        assert_eq!(findings("unsafe fn f() {}\nconst S: &str = \"unsafe {\";\nfn is_unsafe() {}\n"), 0);
    }
}
