//! `haven edit`: an object in a person's editor, written back over the version that was read.
//!
//! The text lies in a file of a name nobody can guess, with mode 0600. Whatever goes wrong, a changed text is never
//! lost: it stays in that file, whose name is printed.

use super::{files, objects::unified};
use crate::{connect::connect, failure::Failure, out, render::yaml};
use haven_client::Client;
use haven_model::{
    api::{ClusterItem, Item, ManifestFile},
    manifest::{to_yaml, value},
};
use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// Begins the lines that are ours and not the object's.
const NOTE: &str = "# haven: ";

fn unwritable(error: impl std::fmt::Display) -> Failure {
    Failure::failed(
        format!("the text to edit cannot be kept in a file: {error}"),
        "check free space in the directory for temporary files, or set TMPDIR",
    )
}

/// The text with notes above it.
fn with_notes(text: &str, notes: &str) -> String {
    let notes: String = notes.lines().map(|line| format!("{NOTE}{line}\n")).collect();
    format!("{notes}{text}")
}

/// The text without our notes.
fn without_notes(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with(NOTE.trim_end()));
    lines.map(|line| format!("{line}\n")).collect()
}

/// The editor that a person wants.
fn editor() -> String {
    ["VISUAL", "EDITOR"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .find(|value| !value.trim().is_empty())
        .unwrap_or_else(|| "vi".into())
}

/// Lets a person change the file.
fn open(editor: &str, path: &Path) -> Result<(), Failure> {
    // The name is an argument of its own, so that no shell reads it; the editor's own words may be several.
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("{editor} \"$1\""), "sh"])
        .arg(path)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::bad(
            format!("the editor `{editor}` failed ({status}); nothing was changed"),
            "set EDITOR to an editor that is installed",
        )),
        Err(error) => Err(Failure::bad(
            format!("the editor `{editor}` cannot be started: {error}"),
            "set EDITOR",
        )),
    }
}

/// A draft on its way through the editor.
struct Draft {
    file: NamedTempFile,
}

impl Draft {
    fn new(text: &str) -> Result<Self, Failure> {
        let mut file = tempfile::Builder::new()
            .prefix("haven-edit-")
            .suffix(".yaml")
            .tempfile()
            .map_err(unwritable)?;
        file.write_all(text.as_bytes()).map_err(unwritable)?;
        Ok(Self { file })
    }

    /// What stands in it now. Editors may put another file in its place, so it is read by name.
    fn text(&self) -> Result<String, Failure> {
        Ok(without_notes(&files::one(self.file.path())?.text))
    }

    fn write(&self, text: &str) -> Result<(), Failure> {
        std::fs::write(self.file.path(), text).map_err(unwritable)
    }

    /// Leaves the text in its file.
    fn keep(self, text: &str) -> Result<PathBuf, Failure> {
        self.write(text)?;
        self.file.keep().map(|(_, path)| path).map_err(unwritable)
    }
}

/// What the cluster's own spec is called.
pub const CLUSTER: &str = "cluster";

/// What is edited, as it was read.
enum Thing {
    /// An object.
    Object(Box<Item>),
    /// The cluster's own spec.
    Cluster(Box<ClusterItem>),
}

impl Thing {
    async fn read(client: &Client, what: &str) -> Result<Self, Failure> {
        if what == CLUSTER {
            return Ok(Self::Cluster(Box::new(client.cluster().await?)));
        }
        Ok(Self::Object(Box::new(client.object(&what.parse()?).await?)))
    }

    fn version(&self) -> i64 {
        match self {
            Self::Object(item) => item.resource_version,
            Self::Cluster(item) => item.resource_version,
        }
    }

    fn yaml(&self) -> String {
        match self {
            Self::Object(item) => to_yaml(&item.object),
            Self::Cluster(item) => yaml(&item.spec),
        }
    }

    /// Writes the text over the version that was read.
    async fn save(&self, client: &Client, text: &str, path: &Path) -> Result<(), Failure> {
        match self {
            Self::Object(item) => save(client, item, text, path).await,
            Self::Cluster(item) => {
                let name = path.display().to_string();
                let spec = value(&name, text).map_err(|wrong| Failure::manifests(vec![wrong]))?;
                client.replace_cluster(&ClusterItem { spec, ..(**item).clone() }).await?;
                Ok(())
            }
        }
    }

    /// How a kept text is used when it is right.
    fn again(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Object(_) => format!("when it is right: haven apply -f {path}"),
            Self::Cluster(_) => format!("when it is right: EDITOR='cp {path}' haven edit cluster"),
        }
    }
}

/// Runs it.
pub async fn run(what: &str) -> Result<(), Failure> {
    let client = connect().await?;
    let thing = Thing::read(&client, what).await?;
    let before = thing.yaml();
    let head = format!("Change {what} and save. Leave it as it is to change nothing.");
    let draft = Draft::new(&with_notes(&before, &head))?;
    let editor = editor();
    let mut refused: Option<(String, Failure)> = None;
    loop {
        let opened = open(&editor, draft.file.path());
        let text = draft.text()?;
        if let Err(failure) = opened {
            return if text == before { Err(failure) } else { kept(&thing, draft, &text, failure) };
        }
        if text == before {
            out::line(format_args!("{what} unchanged"));
            return Ok(());
        }
        // Saved once more as it was refused: the person gives up.
        if let Some((last, failure)) = refused.take_if(|(last, _)| *last == text) {
            return kept(&thing, draft, &last, failure);
        }
        match thing.save(&client, &text, draft.file.path()).await {
            Ok(()) => {
                out::line(format_args!("{what} changed"));
                return Ok(());
            }
            Err(failure) if failure.code == 4 => {
                show_both(&client, what, &thing, &text).await;
                return kept(&thing, draft, &text, failure);
            }
            Err(failure) if !std::io::stdin().is_terminal() => {
                return kept(&thing, draft, &text, failure);
            }
            Err(failure) => {
                draft.write(&with_notes(&text, &failure.to_string()))?;
                refused = Some((text, failure));
            }
        }
    }
}

/// Writes the text over the version that was read.
async fn save(client: &Client, item: &Item, text: &str, path: &Path) -> Result<(), Failure> {
    let what = item.object.reference();
    let file = ManifestFile { name: path.display().to_string(), text: text.to_owned() };
    let mut given = files::objects(vec![file])?;
    let object = match (given.pop(), given.is_empty()) {
        (Some(manifest), true) => manifest.object,
        _ => {
            return Err(Failure::bad(
                format!("the text must hold {what} and nothing else"),
                "more than one object is changed with `haven apply`",
            ));
        }
    };
    if object.reference() != what {
        return Err(Failure::bad(
            format!("the text is about {}, and {what} is being edited", object.reference()),
            "kind and name stay; a copy under another name is made with `haven apply`",
        ));
    }
    let item = client.replace(&Item { object, ..item.clone() }).await?;
    out::warn(std::iter::once(item.warning.as_str()));
    Ok(())
}

/// Shows what somebody else changed meanwhile and what this person wanted.
async fn show_both(client: &Client, what: &str, thing: &Thing, text: &str) {
    let (before, version) = (thing.yaml(), thing.version());
    let read = format!("{what} as you read it (version {version})");
    if let Ok(now) = Thing::read(client, what).await {
        let theirs = format!("{what} in the cluster (version {})", now.version());
        eprint!("{}", unified(&before, &now.yaml(), &read, &theirs));
    }
    eprint!("{}", unified(&before, text, &read, &format!("{what} as you wrote it")));
}

/// Fails, and says where the text is.
fn kept(thing: &Thing, draft: Draft, text: &str, failure: Failure) -> Result<(), Failure> {
    let path = draft.keep(text)?;
    let hint = format!("your text is kept in {}; {}", path.display(), thing.again(&path));
    Err(failure.hint(hint))
}

#[cfg(test)]
mod tests {
    use super::{Draft, with_notes, without_notes};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_draft_is_private_and_its_notes_are_not_the_objects() {
        let text = "kind: VM\n# mine\nname: a\n";
        let noted = with_notes(text, "error: no\n  hint: yes\n");
        assert!(noted.starts_with("# haven: error: no\n# haven:   hint: yes\nkind"));
        assert_eq!(without_notes(&noted), text);
        let draft = Draft::new(&noted).unwrap();
        let mode = std::fs::metadata(draft.file.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(draft.text().unwrap(), text);
        let path = draft.keep(text).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        std::fs::remove_file(path).unwrap();
    }
}
