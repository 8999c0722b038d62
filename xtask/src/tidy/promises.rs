//! Every promise in SPECIFICATION.md names the test or bench that shows it, and that test or bench exists.
//!
//! A promise is a list item; it ends with `test NAME` or `bench NAME` in back quotes, one or more.

use super::source::Sources;
use std::collections::BTreeSet;

const PAGE: &str = "SPECIFICATION.md";

/// Checks every promise.
pub fn check(sources: &Sources) -> Vec<String> {
    let mut tests = BTreeSet::new();
    for file in &sources.rust {
        tests.extend(test_names(&file.code));
    }
    let benches: BTreeSet<String> = sources.files.iter().filter_map(|file| bench_name(file)).collect();
    check_page(&sources.text(PAGE), &tests, &benches)
}

fn check_page(page: &str, tests: &BTreeSet<String>, benches: &BTreeSet<String>) -> Vec<String> {
    let mut findings = Vec::new();
    let mut promises = 0;
    for (index, line) in page.lines().enumerate().filter(|(_, line)| line.starts_with("- ")) {
        promises += 1;
        let shown: Vec<&str> = line
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|quoted| quoted.starts_with("test ") || quoted.starts_with("bench "))
            .collect();
        if shown.is_empty() {
            findings.push(format!("{PAGE}:{}: the promise names no test and no bench", index + 1));
        }
        for name in shown {
            let known = match name.split_once(' ') {
                Some(("test", test)) => tests.contains(test),
                Some((_, bench)) => benches.contains(bench),
                None => false,
            };
            if !known {
                findings.push(format!("{PAGE}:{}: there is no {name}", index + 1));
            }
        }
    }
    if promises == 0 {
        findings.push(format!("{PAGE} holds no promise"));
    }
    findings
}

/// Functions under `#[test]`, also inside `proptest!`; a test that is switched off shows nothing and is left out.
fn test_names(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    let (mut pending, mut ignored) = (false, false);
    for line in code.lines().map(str::trim) {
        pending |= line.starts_with("#[test]");
        ignored |= line.starts_with("#[ignore");
        if pending && let Some(at) = line.find("fn ") {
            let name: String = line[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !ignored {
                names.push(name);
            }
            (pending, ignored) = (false, false);
        }
    }
    names
}

/// `benches/engine/...` is the bench `engine`.
fn bench_name(file: &str) -> Option<String> {
    file.strip_prefix("benches/")?.split_once('/').map(|(name, _)| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_without_an_existing_test_is_found() {
        let tests: BTreeSet<String> =
            test_names("#[test]\nfn a_page_is_kept() {}\nfn helper() {}\n#[test]\n#[ignore]\nfn off() {}\n")
                .into_iter()
                .collect();
        assert_eq!(tests.len(), 1);
        let benches = BTreeSet::from(["engine".to_string()]);
        let page =
            "- Pages are kept: `test a_page_is_kept`\n- It is fast: `bench engine`\n- Lost: `test helper`\n- Nothing\n";
        let findings = check_page(page, &tests, &benches);
        assert_eq!(findings.len(), 2);
        assert!(findings[0].contains("test helper"));
    }
}
