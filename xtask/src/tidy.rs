//! The laws of the tree that no lint knows: the direction of dependencies and that each is used, the length of files, a head on every
//! module, paths in documents that exist, no names of registries' hosts.

use anyhow::{Result, bail};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

/// Lines that a file may have.
const LONGEST: usize = 800;

/// Which of Haven's crates a crate may use.
const EDGES: [(&str, &[&str]); 8] = [
    ("haven-model", &[]),
    ("haven-plan", &["haven-model"]),
    ("haven-store", &["haven-model"]),
    ("haven-client", &["haven-model"]),
    ("haven-host", &["haven-model", "haven-store"]),
    ("haven-control", &["haven-model", "haven-plan", "haven-store"]),
    ("haven-lab", &["haven-model", "haven-client"]),
    ("xtask", &[]),
];

/// Checks everything.
pub fn run() -> Result<()> {
    let mut broken = Vec::new();
    let metadata = metadata()?;
    broken.extend(edges(&metadata));
    let mut sources = Vec::new();
    for path in tracked()? {
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        broken.extend(file(&path, &text));
        if path.extension().is_some_and(|e| e == "rs") {
            sources.push((std::path::absolute(&path)?, text));
        }
    }
    broken.extend(unused(&metadata, &sources));
    if broken.is_empty() {
        println!("1 passed, 0 failed");
        return Ok(());
    }
    bail!("{} laws are broken:\n  {}", broken.len(), broken.join("\n  "))
}

fn metadata() -> Result<Value> {
    let output =
        Command::new("cargo").args(["metadata", "--format-version=1", "--no-deps"]).output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn tracked() -> Result<Vec<PathBuf>> {
    let output = Command::new("git").args(["ls-files"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect())
}

fn edges(metadata: &Value) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = EDGES.into_iter().collect();
    let mut broken = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = allowed.get(name) else {
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let for_tests = dependency["kind"] == "dev";
            if to.starts_with("haven-") && !for_tests && !allowed.contains(&to) {
                broken.push(format!("{name} must not depend on {to}"));
            }
        }
    }
    broken
}

/// Dependencies that no source of their crate names: each costs every build.
fn unused(metadata: &Value, sources: &[(PathBuf, String)]) -> Vec<String> {
    let mut broken = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let text = |key: &Value| PathBuf::from(key.as_str().unwrap_or_default());
        // Tests and benches may stand elsewhere.
        let targets = package["targets"].as_array().into_iter().flatten();
        let homes: Vec<PathBuf> = targets
            .map(|target| text(&target["src_path"]))
            .chain([text(&package["manifest_path"])])
            .filter_map(|file| file.parent().map(Path::to_path_buf))
            .collect();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let name = dependency["name"].as_str().unwrap_or_default();
            let word = name.replace('-', "_");
            let names_it = |(path, text): &(PathBuf, String)| {
                homes.iter().any(|home| path.starts_with(home)) && text.contains(&word)
            };
            if !sources.iter().any(names_it) {
                let who = package["name"].as_str().unwrap_or_default();
                broken.push(format!("{who} depends on {name} and names it nowhere; take it out"));
            }
        }
    }
    broken
}

fn file(path: &Path, text: &str) -> Vec<String> {
    let shown = path.display();
    let mut broken = Vec::new();
    let rust = path.extension().is_some_and(|e| e == "rs");
    if rust && text.lines().count() > LONGEST {
        broken.push(format!("{shown} has more than {LONGEST} lines; split it"));
    }
    if rust && !text.starts_with("//!") && !text.starts_with("#!") {
        broken.push(format!("{shown} has no `//!` at its head"));
    }
    if rust && holds_an_example(text) {
        broken.push(format!("{shown} has an example in its documentation, which `./check` does not run; make it a test, or mark it `text`"));
    }
    // Put together here so that this file does not break its own law.
    let unfinished =
        [["to", "do!("].concat(), ["unimpl", "emented!("].concat(), ["FIX", "ME"].concat()];
    let registries = [
        ["deb.deb", "ian.org"].concat(),
        ["crates", ".io/api"].concat(),
        ["registry.npm", "js"].concat(),
    ];
    for word in unfinished.iter().chain(&registries) {
        let lock = path.file_name().is_some_and(|n| n == "Cargo.lock");
        if text.contains(word.as_str()) && !lock {
            broken.push(format!("{shown} holds `{word}`"));
        }
    }
    if path.extension().is_some_and(|e| e == "md") {
        broken.extend(
            paths_of(text)
                .into_iter()
                .filter(|p| !Path::new(p).exists())
                .map(|p| format!("{shown} names `{p}`, which does not exist")),
        );
    }
    broken
}

/// Whether documentation holds a block of code that is to be compiled.
fn holds_an_example(text: &str) -> bool {
    let fences = text.lines().filter_map(|line| {
        let line = line.trim_start();
        let words = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"))?;
        words.trim_start().strip_prefix("```")
    });
    // Every second one ends a block.
    fences.step_by(2).any(|kind| kind.is_empty() || kind.starts_with("rust"))
}

/// Paths in backticks or links that begin with a folder of this tree.
fn paths_of(text: &str) -> Vec<String> {
    let tops = ["crates/", "docs/", "examples/", "guests/", "packaging/", "xtask/", "benches/"];
    text.split(['`', '(', ')'])
        .filter(|word| {
            tops.iter().any(|top| word.starts_with(top)) && !word.contains([' ', '*', '<', '{'])
        })
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{edges, file, paths_of, unused};
    use std::path::{Path, PathBuf};

    #[test]
    fn a_wrong_edge_is_found() {
        let metadata = serde_json::json!({"packages": [{"name": "haven-plan", "dependencies": [
            {"name": "haven-model", "kind": null}, {"name": "haven-store", "kind": null}]}]});
        assert_eq!(edges(&metadata), ["haven-plan must not depend on haven-store"]);
    }

    #[test]
    fn a_dependency_that_nobody_names_is_found() {
        let metadata = serde_json::json!({"packages": [{"name": "a", "manifest_path": "/a/Cargo.toml",
            "targets": [{"src_path": "/b/test.rs"}],
            "dependencies": [{"name": "far-off"}, {"name": "here"}, {"name": "idle"}]}]});
        let sources =
            [("/a/src/lib.rs", "use here;"), ("/b/test.rs", "far_off::f()"), ("/c/c.rs", "idle")]
                .map(|(path, text)| (PathBuf::from(path), text.to_owned()));
        assert_eq!(
            unused(&metadata, &sources),
            ["a depends on idle and names it nowhere; take it out"]
        );
    }

    #[test]
    fn bad_files_are_found() {
        assert_eq!(file(Path::new("a.rs"), "fn main() {}").len(), 1);
        assert_eq!(file(Path::new("a.rs"), &format!("//! a\n{}", "\n".repeat(900))).len(), 1);
        assert_eq!(file(Path::new("a.rs"), &["//! a\n to", "do!()"].concat()).len(), 1);
        let block =
            |kind: &str| format!("//! a\n\n/// ```{kind}\n/// f();\n/// ```\n/// b\nfn f() {{}}\n");
        assert_eq!(file(Path::new("a.rs"), &block("")).len(), 1);
        assert!(file(Path::new("a.rs"), &block("text")).is_empty());
        assert_eq!(file(Path::new("a.md"), "see `crates/nothing/here.rs`").len(), 1);
    }

    #[test]
    fn paths_in_documents_are_seen() {
        assert_eq!(
            paths_of("see `crates/plan` and [x](docs/flows/a.md), not `a b`"),
            ["crates/plan", "docs/flows/a.md"]
        );
    }
}
