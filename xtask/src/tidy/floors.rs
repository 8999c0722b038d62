//! A crate uses crates on lower floors only; the floors are the table in ARCHITECTURE.md.

use super::source::Sources;
use anyhow::Result;
use std::collections::BTreeMap;

const PAGE: &str = "ARCHITECTURE.md";

/// Floors by package name.
type Floors = BTreeMap<String, u32>;

/// Compares every crate's dependencies inside the workspace with the table.
pub fn check(sources: &Sources) -> Result<Vec<String>> {
    let floors = read_table(&sources.text(PAGE));
    let mut findings = Vec::new();
    if floors.is_empty() {
        findings.push(format!("{PAGE} has no table of floors (| floor | crate | ... |)"));
    }
    let packages = sources.metadata["packages"].as_array().cloned().unwrap_or_default();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        let dependencies: Vec<String> = package["dependencies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|dependency| dependency["path"].is_string())
            .filter_map(|dependency| dependency["name"].as_str().map(str::to_string))
            // Only for tests can a crate name itself: to switch on a feature of its own.
            .filter(|dependency| dependency != name)
            .collect();
        findings.extend(check_package(&floors, name, &dependencies));
    }
    Ok(findings)
}

fn check_package(floors: &Floors, name: &str, dependencies: &[String]) -> Vec<String> {
    let Some(floor) = floors.get(name) else {
        return vec![format!("{name} has no floor in {PAGE}")];
    };
    dependencies
        .iter()
        .filter_map(|dependency| match floors.get(dependency) {
            None => Some(format!("{name} uses {dependency}, which has no floor in {PAGE}")),
            Some(below) if below >= floor => {
                Some(format!("{name} (floor {floor}) uses {dependency} (floor {below}): only lower floors may be used"))
            }
            Some(_) => None,
        })
        .collect()
}

/// Reads rows `| 3 | `devices` | text |`; folder names become package names.
fn read_table(page: &str) -> Floors {
    let mut floors = Floors::new();
    for line in page.lines() {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        let [floor, names, ..] = cells[..] else { continue };
        let Ok(floor) = floor.parse::<u32>() else { continue };
        for folder in names.split('`').skip(1).step_by(2) {
            let package = match folder {
                "polder" | "xtask" => folder.to_string(),
                _ => format!("polder-{folder}"),
            };
            floors.insert(package, floor);
        }
    }
    floors
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "| floor | crate | holds |\n|---|---|---|\n| 0 | `basics` | words |\n| 1 | `memory` `trust` | two |\n| 8 | `polder` | all |\n";

    #[test]
    fn the_table_gives_every_named_crate_its_floor() {
        let floors = read_table(TABLE);
        assert_eq!(floors.get("polder-trust"), Some(&1));
        assert_eq!(floors.get("polder"), Some(&8));
        assert_eq!(floors.len(), 4);
    }

    #[test]
    fn a_crate_may_not_use_its_own_floor() {
        let floors = read_table(TABLE);
        assert!(check_package(&floors, "polder-memory", &["polder-basics".into()]).is_empty());
        assert_eq!(check_package(&floors, "polder-memory", &["polder-trust".into()]).len(), 1);
        assert_eq!(check_package(&floors, "polder-new", &[]).len(), 1);
    }
}
