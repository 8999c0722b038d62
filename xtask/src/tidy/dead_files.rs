//! Every Rust file is reached from a crate root by `mod` declarations; one that is not is dead.

use super::source::Sources;
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// Files that no target of the workspace (or of `fuzz/`) reaches.
pub fn check(sources: &Sources) -> Result<Vec<String>> {
    let files: BTreeMap<PathBuf, (&str, &str)> =
        sources.rust.iter().map(|file| (PathBuf::from(&file.path), (file.text.as_str(), file.code.as_str()))).collect();
    let mut reached = BTreeSet::new();
    for root in roots(sources) {
        visit(&root, Place::Root, &files, &mut reached);
    }
    Ok(files
        .keys()
        .filter(|file| !reached.contains(*file))
        .map(|file| format!("{}: no `mod` declaration leads here", file.display()))
        .collect())
}

/// Whether a file's children lie beside it (crate roots, mod.rs) or in a folder of its name.
#[derive(Clone, Copy)]
enum Place {
    Root,
    Child,
}

fn roots(sources: &Sources) -> Vec<PathBuf> {
    let mut roots = Vec::new();
    for package in sources.metadata["packages"].as_array().into_iter().flatten() {
        for target in package["targets"].as_array().into_iter().flatten() {
            let path = Path::new(target["src_path"].as_str().unwrap_or_default());
            roots.extend(path.strip_prefix(&sources.root).ok().map(Path::to_path_buf));
        }
    }
    // The fuzz crate is a workspace of its own: its roots are the paths of its manifest.
    for line in sources.text("fuzz/Cargo.toml").lines() {
        if let Some(path) = line.strip_prefix("path = \"").and_then(|rest| rest.strip_suffix('"')) {
            roots.push(Path::new("fuzz").join(path));
        }
    }
    roots
}

fn visit(file: &Path, place: Place, files: &BTreeMap<PathBuf, (&str, &str)>, reached: &mut BTreeSet<PathBuf>) {
    let Some((text, code)) = files.get(file) else { return };
    if !reached.insert(file.to_path_buf()) {
        return;
    }
    let beside = file.parent().unwrap_or(Path::new(""));
    let is_mod = file.file_name().is_some_and(|name| name == "mod.rs");
    let folder = match place {
        Place::Child if !is_mod => beside.join(file.file_stem().unwrap_or_default()),
        _ => beside.to_path_buf(),
    };
    let lines: Vec<&str> = text.lines().collect();
    for (index, coded) in code.lines().enumerate() {
        if let Some(name) = declared_module(coded) {
            if let Some(path) = path_attribute(&lines, index) {
                visit(&normal(&beside.join(path)), Place::Root, files, reached);
                continue;
            }
            visit(&folder.join(format!("{name}.rs")), Place::Child, files, reached);
            visit(&folder.join(name).join("mod.rs"), Place::Child, files, reached);
        }
        if coded.contains("include!(")
            && let Some(path) = lines[index].split('"').nth(1)
        {
            visit(&normal(&beside.join(path)), Place::Root, files, reached);
        }
    }
}

/// `mod name;` with any visibility.
fn declared_module(line: &str) -> Option<&str> {
    let line = line.trim();
    let at = if line.starts_with("mod ") { 0 } else { line.find(" mod ").filter(|_| line.starts_with("pub"))? + 1 };
    line[at + 4..].strip_suffix(';').map(str::trim)
}

fn path_attribute<'a>(lines: &[&'a str], index: usize) -> Option<&'a str> {
    let mut above = lines[..index].iter().rev().take_while(|line| line.trim().starts_with("#["));
    above.find_map(|line| line.trim().strip_prefix("#[path = \"")?.strip_suffix("\"]"))
}

fn normal(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                parts.pop();
            }
            Component::CurDir => {}
            other => parts.push(other),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_declaration_is_seen_with_any_visibility() {
        assert_eq!(declared_module("mod a;"), Some("a"));
        assert_eq!(declared_module("    pub(crate) mod b;"), Some("b"));
        assert_eq!(declared_module("mod tests {"), None);
        assert_eq!(declared_module("let module = 1;"), None);
    }

    #[test]
    fn a_file_without_declaration_is_not_reached() {
        let files: BTreeMap<PathBuf, (&str, &str)> =
            [("a/lib.rs", "mod b;"), ("a/b.rs", "mod c;"), ("a/b/c.rs", ""), ("a/lost.rs", "")]
                .map(|(path, text)| (PathBuf::from(path), (text, text)))
                .into();
        let mut reached = BTreeSet::new();
        visit(Path::new("a/lib.rs"), Place::Root, &files, &mut reached);
        assert_eq!(reached.len(), 3);
        assert!(!reached.contains(Path::new("a/lost.rs")));
    }
}
