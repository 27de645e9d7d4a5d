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
    /// Its document, and how many lines stand before it in its file.
    text: String,
    before: u64,
}

impl Manifest {
    /// An object that came without a text, and what it came with.
    #[must_use]
    pub fn without_text(object: Object, with: &str) -> Self {
        Self { object, file: with.into(), line: 1, text: String::new(), before: 0 }
    }

    /// A problem with this object as a whole.
    #[must_use]
    pub fn problem(&self, message: String, hint: &str) -> Problem {
        Problem { file: self.file.clone(), line: self.line, column: 1, message, hint: hint.into() }
    }

    /// A problem with what is written at a field, which may stand anywhere in the document; its place is the value's,
    /// or the field's where the value is empty or written in another way.
    #[must_use]
    pub fn problem_at(&self, key: &str, value: &str, message: String, hint: &str) -> Problem {
        let problem = self.problem(message, hint);
        match place_of(&self.text, key, value) {
            Some((line, column)) => Problem { line: self.before + line, column, ..problem },
            None => problem,
        }
    }
}

/// Where a value stands at or below a key, or else the first such key; line and column from 1.
fn place_of(text: &str, key: &str, value: &str) -> Option<(u64, u64)> {
    let lines: Vec<&str> = text.lines().map(uncommented).collect();
    let indent = |line: &str| line.len() - line.trim_start_matches([' ', '-']).len();
    let place = |line: usize, at: usize| {
        let column = lines[line][..at].chars().count() as u64 + 1;
        Some((line as u64 + 1, column))
    };
    let mut first = None;
    for (number, line) in lines.iter().enumerate() {
        let mut from = 0;
        while let Some(at) = word(&line[from..], key).map(|at| from + at) {
            from = at + key.len();
            if !line[from..].starts_with(':') {
                continue;
            }
            let written = from + 1 + line[from + 1..].len() - line[from + 1..].trim_start().len();
            first =
                first.or_else(|| place(number, if written < line.len() { written } else { at }));
            if value.is_empty() {
                return first;
            }
            if let Some(found) = word(&line[written..], value) {
                return place(number, written + found);
            }
            let deeper = |below: &&str| below.trim().is_empty() || indent(below) > indent(line);
            let below = lines[number + 1..].iter().take_while(|below| deeper(below));
            for (more, below) in below.enumerate() {
                if let Some(found) = word(below, value) {
                    return place(number + 1 + more, found);
                }
            }
        }
    }
    first
}

/// A line without its comment.
fn uncommented(line: &str) -> &str {
    let comment = line
        .match_indices('#')
        .find(|(at, _)| line[..*at].chars().next_back().is_none_or(char::is_whitespace));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// Where a word begins that is no part of a longer one, bytes.
fn word(text: &str, word: &str) -> Option<usize> {
    let part = |c: char| c.is_alphanumeric() || "-_./".contains(c);
    let free = |(at, _): &(usize, &str)| {
        !text[..*at].chars().next_back().is_some_and(part)
            && !text[at + word.len()..].chars().next().is_some_and(part)
    };
    text.match_indices(word).find(free).map(|(at, _)| at)
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
        let (message, hint) = match message.as_str() {
            it if it.starts_with("recursive references") => {
                ("this alias stands inside the value that it names".into(), "write the value out")
            }
            it if it.starts_with("budget breached") => (
                "with its aliases written out, this document is far too large".into(),
                "write values out instead of `*aliases` of aliases",
            ),
            _ => (message, ""),
        };
        Problem {
            file: file.to_owned(),
            line: place.as_ref().map_or(line, serde_saphyr::Location::line),
            column: place.as_ref().map_or(1, serde_saphyr::Location::column),
            message,
            hint: hint.into(),
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
    let kinds = "the kinds are Host, Pool, Image, Network, Certificate, Target, VM and Service";
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
        Kind::Certificate => Object::Certificate(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Target => Object::Target(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Vm => Object::Vm(Stored { meta, spec: yaml(file, line, &spec)? }),
        Kind::Service => Object::Service(Stored { meta, spec: yaml(file, line, &spec)? }),
    };
    let document = text.trim_start_matches('\n');
    let before = (text.len() - document.len()) as u64;
    Ok(Manifest { object, file: file.to_owned(), line, text: document.to_owned(), before })
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
    fn ten_megabytes_are_refused() {
        let said = problems(&"# \n".repeat(4 << 20));
        assert_eq!(
            said,
            "web.yaml:0:0 the manifests are 12582912 bytes long, and at most 1048576 are read"
        );
    }

    #[test]
    fn a_bomb_is_refused_as_one_before_it_grows() {
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
        let said = problems(&bomb);
        assert_eq!(
            said,
            "web.yaml:9:20 with its aliases written out, this document is far too large"
        );
        assert!(begin.elapsed().as_secs() < 2);
    }

    #[test]
    fn a_value_that_holds_itself_is_refused_where_it_does() {
        let said = problems("kind: VM\nname: web\nmemory: 1GiB\nlabels: &a\n  me: *a\n");
        assert_eq!(said, "web.yaml:5:7 this alias stands inside the value that it names");
    }

    #[test]
    fn a_problem_of_meaning_points_at_the_value() {
        let text = "# one\nkind: Pool\nname: fast\ndriver: local\npath: /a\n---\nkind: VM # the VM\nname: web\nmemory: 4TiB\n\
                    networks: # image: none\n- network: front\n  address: 10.77.0.1\n- {network: back}\n\
                    affinity:\n  near:\n    tier: db\n";
        let read = parse(&[("x.yaml".into(), text.into())]).unwrap();
        let at = |key: &str, value: &str| {
            let problem = read[1].problem_at(key, value, "wrong".into(), "right");
            (problem.line, problem.column)
        };
        assert_eq!(at("memory", ""), (9, 9));
        assert_eq!(at("name", "web"), (8, 7));
        assert_eq!(at("network", "front"), (11, 12));
        assert_eq!(at("network", "back"), (13, 13));
        assert_eq!(at("address", "10.77.0.1"), (12, 12));
        assert_eq!(at("near", "db"), (16, 11));
        assert_eq!(at("affinity", ""), (14, 1), "a field with nothing behind it on its line");
        assert_eq!(at("cpus", ""), (7, 1), "a field that is not written");
        assert_eq!(at("image", "none"), (7, 1), "a comment is none");
        let first = read[0].problem_at("path", "/a", "wrong".into(), "right");
        assert_eq!((first.line, first.column), (5, 7));
    }
}
