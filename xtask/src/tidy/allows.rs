//! No blanket allows: a lint is switched off for the one item that needs it, by name.

use super::source::{RustFile, Sources};

/// Lints that switch off too much whatever they stand on.
const TOO_WIDE: &[&str] = &["warnings", "clippy::all", "clippy::pedantic", "unused", "dead_code", "unsafe_code"];

/// Looks at every Rust file.
pub fn check(sources: &Sources) -> Vec<String> {
    sources.rust.iter().flat_map(check_file).collect()
}

fn check_file(file: &RustFile) -> Vec<String> {
    let mut findings = Vec::new();
    for (index, line) in file.code.lines().enumerate() {
        let line = line.trim();
        let mut found = |what: &str| findings.push(format!("{}:{}: {what}", file.path, index + 1));
        if line.starts_with("#![allow") || line.starts_with("#![expect") {
            found("an allow for a whole file or crate");
        } else if line.starts_with("#[allow") {
            let inside = line.split(['(', ')']).nth(1).unwrap_or_default();
            if let Some(lint) = inside.split(',').map(str::trim).find(|lint| TOO_WIDE.contains(lint)) {
                found(&format!("allow({lint}) hides too much"));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(code: &str) -> usize {
        check_file(&RustFile { path: "a.rs".into(), text: code.into(), code: code.into() }).len()
    }

    #[test]
    fn an_allow_for_a_whole_file_is_found() {
        assert_eq!(findings("#![allow(clippy::too_many_arguments)]\n"), 1);
        assert_eq!(findings("#[allow(dead_code)]\nfn f() {}\n"), 1);
    }

    #[test]
    fn a_named_lint_on_one_item_is_fine() {
        assert_eq!(findings("#[allow(clippy::too_many_arguments)]\nfn f() {}\n"), 0);
    }
}
