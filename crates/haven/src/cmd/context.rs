//! `haven context …`.

use crate::{
    context::{Contexts, LOCAL, PORT, Saved, directory, fingerprint, token, write_private},
    failure::Failure,
    out,
    render::{self, How},
};
use clap::{Args, Subcommand};
use haven_model::Name;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A cluster to be saved.
#[derive(Debug, Args)]
pub struct NewContext {
    /// A name for it
    name: String,
    /// HOST[:PORT] of any host of it
    #[arg(long)]
    address: String,
    /// SHA-256 of its authority's certificate (/var/lib/haven/pki/ca.crt of every host)
    #[arg(long)]
    fingerprint: String,
    /// The file that holds the token, with mode 0600
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Read the token from standard input and keep it beside the saved clusters
    #[arg(long, conflicts_with = "token_file")]
    token_stdin: bool,
    /// Over one of the same name
    #[arg(long)]
    replace: bool,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List saved clusters
    #[command(after_help = "Examples:\n  haven context ls\n  haven context ls -o yaml")]
    Ls(How),
    /// Speak to a saved cluster from now on, or to this machine's own with `local`
    #[command(after_help = "Examples:\n  haven context use prod\n  haven context use local")]
    Use {
        /// Its name
        name: String,
    },
    /// Save a cluster
    #[command(
        after_help = "Examples:\n  haven context add prod --address 10.0.0.1 --fingerprint 3f…9a --token-file ~/.prod-token\n  ssh root@10.0.0.1 haven token create me --role admin | haven context add prod --address 10.0.0.1 --fingerprint 3f…9a --token-stdin"
    )]
    Add(NewContext),
    /// Forget a saved cluster
    #[command(after_help = "Examples:\n  haven context rm prod")]
    Rm {
        /// Its name
        name: String,
    },
}

/// A saved cluster as a list shows it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    name: String,
    current: bool,
    address: String,
    fingerprint: String,
    token_file: String,
}

fn lines(contexts: &Contexts) -> Vec<Line> {
    let current = contexts.current.as_deref().unwrap_or(LOCAL);
    let local = Line {
        name: LOCAL.into(),
        current: current == LOCAL,
        address: "this machine".into(),
        fingerprint: String::new(),
        token_file: String::new(),
    };
    let saved = contexts.clusters.iter().map(|(name, of)| Line {
        name: name.clone(),
        current: current == name,
        address: of.address.clone(),
        fingerprint: of.fingerprint.clone(),
        token_file: of.token_file.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
    });
    std::iter::once(local).chain(saved).collect()
}

fn text(lines: &[Line], wide: bool) -> String {
    let mut head = vec!["name", "in use", "address", "token file"];
    head.extend(wide.then_some("fingerprint"));
    let rows = lines.iter().map(|line| {
        let used = if line.current { "yes" } else { "" };
        let mut row =
            vec![line.name.clone(), used.into(), line.address.clone(), line.token_file.clone()];
        row.extend(wide.then(|| line.fingerprint.clone()));
        row
    });
    render::table(&head, rows.collect())
}

/// `HOST:PORT`, with the API's port when none is given.
fn address(text: &str) -> Result<String, Failure> {
    let full = match text.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() => text.to_owned(),
        Some(_) => String::new(),
        None => format!("{text}:{PORT}"),
    };
    if full.is_empty() || full.starts_with(':') || full.contains(['/', ' ']) {
        let message = format!("`{text}` is not an address");
        return Err(Failure::bad(message, "write HOST or HOST:PORT, for example 10.0.0.1:7443"));
    }
    Ok(full)
}

fn add(directory: &Path, new: NewContext) -> Result<(), Failure> {
    let name = Name::new(new.name)?.to_string();
    if name == LOCAL {
        return Err(Failure::bad("`local` always means this machine", "choose another name"));
    }
    let mut contexts = Contexts::load(directory)?;
    if contexts.clusters.contains_key(&name) && !new.replace {
        return Err(Failure::conflict(
            format!("there is a saved cluster `{name}` already; nothing was changed"),
            "choose another name, or add --replace",
        ));
    }
    let (address, fingerprint) = (address(&new.address)?, fingerprint(&new.fingerprint)?);
    let token_file =
        match (new.token_file, new.token_stdin) {
            (Some(path), _) => {
                token(&path)?;
                let full = std::path::absolute(&path);
                Some(full.map_err(|e| {
                    Failure::bad(format!("{}: {e}", path.display()), "name the file")
                })?)
            }
            (None, true) => {
                let given = std::io::read_to_string(std::io::stdin()).unwrap_or_default();
                let given = given.trim();
                if given.is_empty() {
                    let hint = "pipe in what `haven token create` printed";
                    return Err(Failure::bad("no token came over standard input", hint));
                }
                let path = own_token(directory, &name);
                write_private(&path, &format!("{given}\n"))?;
                Some(path)
            }
            (None, false) => None,
        };
    contexts.clusters.insert(name.clone(), Saved { address, fingerprint, token_file });
    contexts.save(directory)?;
    out::line(format_args!("cluster {name} saved; speak to it with `haven context use {name}`"));
    Ok(())
}

/// Where a token is kept that came over standard input.
fn own_token(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.token"))
}

fn remove(directory: &Path, name: &str) -> Result<(), Failure> {
    let mut contexts = Contexts::load(directory)?;
    let saved = contexts.get(name)?;
    let own = own_token(directory, name);
    // Only a token that was put here by `add`; a person's own file stays.
    if saved.token_file.as_ref() == Some(&own) {
        let _ = std::fs::remove_file(&own);
    }
    contexts.clusters.remove(name);
    let used = contexts.current.as_deref() == Some(name);
    if used {
        contexts.current = None;
    }
    contexts.save(directory)?;
    let now = if used { "; commands speak to this machine now" } else { "" };
    out::line(format_args!("cluster {name} forgotten{now}"));
    Ok(())
}

/// Runs it.
pub fn run(command: ContextCommand) -> Result<(), Failure> {
    let directory = directory().ok_or_else(|| {
        Failure::bad("neither XDG_CONFIG_HOME nor HOME is set", "set one of them to a directory")
    })?;
    match command {
        ContextCommand::Ls(how) => {
            let lines = lines(&Contexts::load(&directory)?);
            out::print(&render::value(&lines, how.output, |wide| text(&lines, wide)));
            Ok(())
        }
        ContextCommand::Use { name } => {
            let mut contexts = Contexts::load(&directory)?;
            if name != LOCAL {
                contexts.get(&name)?;
            }
            contexts.current = (name != LOCAL).then(|| name.clone());
            contexts.save(&directory)?;
            out::line(format_args!("commands speak to {name} now"));
            Ok(())
        }
        ContextCommand::Add(new) => add(&directory, new),
        ContextCommand::Rm { name } => remove(&directory, &name),
    }
}

#[cfg(test)]
mod tests {
    use super::{NewContext, add, address, lines, own_token, remove, text};
    use crate::context::{Contexts, write_private};

    fn new(name: &str, token_file: Option<std::path::PathBuf>) -> NewContext {
        NewContext {
            name: name.into(),
            address: "10.0.0.1".into(),
            fingerprint: "AB".repeat(32),
            token_file,
            token_stdin: false,
            replace: false,
        }
    }

    #[test]
    fn clusters_are_saved_listed_and_forgotten() {
        // A name of always the same length: the table is as wide as what is in it.
        let home = tempfile::tempdir_in("/tmp").unwrap();
        let token = own_token(home.path(), "prod");
        write_private(&token, "me.secret").unwrap();
        add(home.path(), new("prod", Some(token.clone()))).unwrap();
        add(home.path(), new("test", None)).unwrap();
        let taken = add(home.path(), new("test", None)).unwrap_err();
        let reserved = add(home.path(), new("local", None)).unwrap_err();
        let mut contexts = Contexts::load(home.path()).unwrap();
        contexts.current = Some("prod".into());
        contexts.save(home.path()).unwrap();
        let all = lines(&contexts);
        let shown = format!("{}\n{}\n{taken}{reserved}", text(&all, false), text(&all, true));
        insta::assert_snapshot!(shown.replace(&home.path().display().to_string(), "DIR"));
        remove(home.path(), "prod").unwrap();
        assert!(!token.exists());
        assert_eq!(Contexts::load(home.path()).unwrap().current, None);
        assert_eq!(remove(home.path(), "prod").unwrap_err().code, 3);
    }

    #[test]
    fn addresses() {
        assert_eq!(address("10.0.0.1").unwrap(), "10.0.0.1:7443");
        assert_eq!(address("haven.example:8443").unwrap(), "haven.example:8443");
        for wrong in ["https://x", "x:y", ":7443", "", "a b"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }
}
