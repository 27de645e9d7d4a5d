//! Manifests: YAML as people write it, and what is wrong with it, with file, line and column.
//!
//! A document is flat: `kind`, `name`, `labels`, and the fields of that kind's spec. Reading takes two passes over
//! the same text, so that each error keeps its place: one for those three, one for the spec with their lines blanked.

use crate::{
    error::ModelError,
    name::Name,
    object::{Kind, Meta, Object, Stored},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;

/// The largest text that is read at all, bytes over all files.
pub const LARGEST: usize = 1 << 20;

/// Something is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// The file, as the person named it.
    pub file: String,
    /// From 1; 0 when it is about the whole file.
    pub line: u64,
    /// From 1; 0 when it is about the whole line.
    pub column: u64,
    /// What is wrong.
    pub message: String,
    /// What is right.
    #[serde(default)]
    pub hint: String,
}

/// An object as a manifest gives it; its uid is made when it is first written.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Meta and spec.
    pub object: Object,
    /// The file it came from.
    pub file: String,
    /// The line on which its document begins.
    pub line: u64,
}

impl Manifest {
    /// A problem with this object as a whole.
    #[must_use]
    pub fn problem(&self, message: String, hint: &str) -> Problem {
        Problem { file: self.file.clone(), line: self.line, column: 1, message, hint: hint.into() }
    }
}

#[derive(Deserialize)]
struct Head {
    kind: Option<String>,
    name: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// Reads all documents of all files; either all are right or none is taken.
///
/// # Errors
/// Everything that is wrong, in order.
pub fn parse(files: &[(String, String)]) -> Result<Vec<Manifest>, Vec<Problem>> {
    let size: usize = files.iter().map(|(_, text)| text.len()).sum();
    if size > LARGEST {
        let file = files.first().map(|(file, _)| file.clone()).unwrap_or_default();
        let message =
            format!("the manifests are {size} bytes long, and at most {LARGEST} are read");
        let hint =
            "apply them in several steps; images are imported with `haven image import`".into();
        return Err(vec![Problem { file, line: 0, column: 0, message, hint }]);
    }
    let (mut found, mut problems) = (Vec::<Manifest>::new(), Vec::new());
    for (file, text) in files {
        for (line, document) in documents(text) {
            match read(file, line, &document) {
                Ok(manifest) => found.push(manifest),
                Err(problem) => problems.push(problem),
            }
        }
    }
    let mut seen: BTreeMap<_, &Manifest> = BTreeMap::new();
    for manifest in &found {
        if let Some(first) = seen.insert(manifest.object.reference(), manifest) {
            let message = format!(
                "{} is given twice, first in {} line {}",
                manifest.object.reference(),
                first.file,
                first.line
            );
            problems.push(manifest.problem(message, "give one of them another name or remove it"));
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// The documents of a text: the line each begins on, and its text behind so many blank lines that every line keeps
/// its number.
fn documents(text: &str) -> Vec<(u64, String)> {
    let mut documents = Vec::new();
    let mut current = String::new();
    let mut begin = 1;
    for (i, line) in text.lines().chain(["---"]).enumerate() {
        if line.trim_end() == "---" || line.starts_with("--- ") {
            let blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
            if !current.lines().all(blank) {
                let first = current.lines().position(|line| !blank(line)).unwrap_or(0) as u64 + 1;
                documents.push((first.max(begin), std::mem::take(&mut current)));
            }
            current = "\n".repeat(i + 1);
            begin = i as u64 + 2;
        } else {
            current.push_str(line);
            current.push('\n');
        }
    }
    documents
}

/// Reads a text that is one value and no object, for example the cluster's own spec.
///
/// # Errors
/// What is wrong, with its place.
pub fn value<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, Problem> {
    yaml(file, 1, text)
}

fn yaml<T: DeserializeOwned>(file: &str, line: u64, text: &str) -> Result<T, Problem> {
    serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location();
        let full = error.to_string();
        // The renderer draws the source below the first line; the caller shows the place itself.
        let first = full.lines().next().unwrap_or_default();
        let first = first.strip_prefix("error: ").unwrap_or(first);
        let message = match first.split_once(": ") {
            Some((head, rest)) if head.starts_with("line ") => rest.to_owned(),
            _ => first.to_owned(),
        };
        Problem {
            file: file.to_owned(),
            line: place.as_ref().map_or(line, serde_saphyr::Location::line),
            column: place.as_ref().map_or(1, serde_saphyr::Location::column),
            message,
            hint: String::new(),
        }
    })
}

fn read(file: &str, line: u64, text: &str) -> Result<Manifest, Problem> {
    let whole = |message: String, hint: &str| Problem {
        file: file.to_owned(),
        line,
        column: 1,
        message,
        hint: hint.to_owned(),
    };
    let head: Head = yaml(file, line, text)?;
    let kinds = "the kinds are Host, Pool, Image, Network, VM and Service";
    let kind = head.kind.ok_or_else(|| whole("`kind` is missing".into(), kinds))?;
    let kind: Kind =
        kind.parse().map_err(|e: ModelError| at_key(text, "kind", whole(e.to_string(), kinds)))?;
    let name = head
        .name
        .ok_or_else(|| whole("`name` is missing".into(), "every object has a name of its own"))?;
    let name = Name::new(name).map_err(|e| at_key(text, "name", whole(e.to_string(), "")))?;
    let mut meta = Meta::new(name, String::new(), 0);
    meta.labels = head.labels;
    let spec = blank_head(text);
    let object = match kind {
        Kind::Host => Object::Host(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Pool => Object::Pool(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Image => Object::Image(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Network => Object::Network(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Vm => Object::Vm(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Service => Object::Service(Stored { meta, spec: yaml(file, line, &spec)? }),
    };
    Ok(Manifest { object, file: file.to_owned(), line })
}

/// Moves a problem to the line of a top-level key.
fn at_key(text: &str, key: &str, problem: Problem) -> Problem {
    let line = text.lines().position(|line| line.starts_with(&format!("{key}:")));
    Problem {
        line: line.map_or(problem.line, |l| l as u64 + 1),
        column: key.len() as u64 + 3,
        ..problem
    }
}

/// The text without `kind`, `name` and `labels`: their lines are empty, all others keep their number.
fn blank_head(text: &str) -> String {
    let mut inside = false;
    let mut blanked = String::new();
    for line in text.lines() {
        let top = line.starts_with(|c: char| !c.is_whitespace() && c != '#' && c != '-');
        if top {
            inside = ["kind:", "name:", "labels:"].iter().any(|key| line.starts_with(key));
        }
        if !inside {
            blanked.push_str(line);
        }
        blanked.push('\n');
    }
    if blanked.trim().is_empty() { format!("{}{{}}\n", blanked) } else { blanked }
}

/// An object as a manifest: what `get -o yaml` prints and `apply` reads back.
#[must_use]
pub fn to_yaml(object: &Object) -> String {
    let value = serde_json::to_value(object).unwrap_or_default();
    let meta = object.meta();
    let mut text =
        format!("kind: {}\nname: {}\n", value["kind"].as_str().unwrap_or_default(), meta.name);
    if !meta.labels.is_empty() {
        text.push_str(
            &serde_saphyr::to_string(&BTreeMap::from([("labels", &meta.labels)]))
                .unwrap_or_default(),
        );
    }
    if value["spec"].as_object().is_some_and(|spec| !spec.is_empty()) {
        text.push_str(&serde_saphyr::to_string(&value["spec"]).unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{parse, to_yaml};

    fn problems(text: &str) -> String {
        let problems = parse(&[("web.yaml".into(), text.into())]).unwrap_err();
        let line = |p: &super::Problem| format!("{}:{}:{} {}", p.file, p.line, p.column, p.message);
        problems.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    const GOOD: &str = "# a network and a VM\nkind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\nkind: VM\nname: web\nlabels:\n  tier: web\nmemory: 128MiB\nnetworks:\n- network: front\n";

    #[test]
    fn good_documents_are_read_and_come_back_as_they_were() {
        let read = parse(&[("x".into(), GOOD.into())]).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(read[1].line, 6);
        for manifest in read {
            let text = to_yaml(&manifest.object);
            let again =
                parse(&[("y".into(), text.clone())]).unwrap_or_else(|p| panic!("{text}\n{p:?}"));
            assert_eq!(again[0].object, manifest.object);
        }
    }

    #[test]
    fn an_unknown_field_is_named_with_its_place_and_what_is_allowed() {
        let said = problems("kind: VM\nname: web\nmemory: 128MiB\ncpu: 2\n");
        assert!(said.starts_with("web.yaml:4:1 "), "{said}");
        assert!(said.contains("cpu") && said.contains("cpus"), "{said}");
    }

    #[test]
    fn a_wrong_unit_is_explained() {
        let said = problems("kind: VM\nname: web\nmemory: 128megs\n");
        assert!(said.starts_with("web.yaml:3:"), "{said}");
        assert!(said.contains("write a whole number with a unit"), "{said}");
    }

    #[test]
    fn a_duplicate_names_both_places() {
        let said =
            problems("kind: VM\nname: web\nmemory: 1GiB\n---\nkind: VM\nname: web\nmemory: 1GiB\n");
        assert!(said.contains("vm/web is given twice, first in web.yaml line 1"), "{said}");
    }

    #[test]
    fn kinds_and_names_are_checked() {
        assert!(problems("kind: Machine\nname: web\n").contains("`Machine` is not a kind"));
        assert!(
            problems("kind: VM\nname: Web_1\nmemory: 1GiB\n")
                .contains("web.yaml:2:7 `Web_1` is not a valid name")
        );
        assert!(problems("name: web\n").contains("`kind` is missing"));
    }

    #[test]
    fn ten_megabytes_and_a_bomb_are_refused() {
        assert!(problems(&"# \n".repeat(4 << 20)).contains("at most"));
        let mut bomb = String::from(
            "kind: VM\nname: web\nmemory: 1GiB\na0: &a0 [x, x, x, x, x, x, x, x, x]\n",
        );
        for i in 1..12 {
            bomb.push_str(&format!(
                "a{i}: &a{i} [{}]\n",
                vec![format!("*a{}", i - 1); 9].join(", ")
            ));
        }
        let begin = std::time::Instant::now();
        assert!(!problems(&bomb).is_empty());
        assert!(begin.elapsed().as_secs() < 2);
    }
}
