//! `cargo xtask tidy`: the house rules that no compiler checks.
//!
//! Each rule is a module with one function from the sources to a list of findings; a finding names file and line. Files are
//! the ones git knows, so build output is never looked at.

mod allows;
mod dead_files;
mod floors;
mod promises;
mod safety_notes;
mod source;
mod top_folder;

use crate::command::step;
use anyhow::{Result, bail};
use source::Sources;

/// Checks every rule and fails if any found something.
pub fn tidy() -> Result<()> {
    step("tidy");
    let sources = Sources::read(&crate::project::root())?;
    let rules: [(&str, Vec<String>); 6] = [
        ("floors", floors::check(&sources)?),
        ("safety notes", safety_notes::check(&sources)),
        ("blanket allows", allows::check(&sources)),
        ("dead files", dead_files::check(&sources)?),
        ("promises", promises::check(&sources)),
        ("top folder", top_folder::check(&sources)),
    ];
    let mut findings = 0;
    for (rule, found) in &rules {
        println!(
            "tidy: {rule}: {}",
            if found.is_empty() { "clean".to_string() } else { format!("{} found", found.len()) }
        );
        for finding in found {
            println!("  {finding}");
        }
        findings += found.len();
    }
    if findings > 0 {
        bail!("tidy found {findings} things to put right");
    }
    Ok(())
}
