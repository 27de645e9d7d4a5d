//! Manifests: apply, diff, get, delete, edit.

use crate::{
    connect::connect,
    failure::Failure,
    render::{self, Output},
};
use clap::Subcommand;
use haven_client::{Client, ClientError};
use haven_model::{
    ObjectRef,
    api::{Applied, ManifestFile},
    object::Kind,
};
use std::{
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ObjectsCommand {
    /// Make the cluster match manifests
    #[command(
        after_help = "Examples:\n  haven apply -f examples/hello.yaml --wait\n  haven apply -f manifests/ --dry-run\n  cat x.yaml | haven apply -f -"
    )]
    Apply {
        /// A file, a directory, or - for standard input
        #[arg(short, long, required = true)]
        file: Vec<PathBuf>,
        /// Only say what would happen
        #[arg(long)]
        dry_run: bool,
        /// Wait until all of it runs
        #[arg(long)]
        wait: bool,
        /// How long, seconds
        #[arg(long, default_value_t = 180)]
        timeout: u64,
    },
    /// Show what apply would change; exit code 1 when it would
    #[command(after_help = "Examples:\n  haven diff -f examples/hello.yaml")]
    Diff {
        /// A file, a directory, or - for standard input
        #[arg(short, long, required = true)]
        file: Vec<PathBuf>,
    },
    /// List objects of a kind, or show one
    #[command(after_help = "Examples:\n  haven get vms\n  haven get service/hello -o yaml")]
    Get {
        /// KIND or KIND/NAME
        what: String,
        /// How
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Delete objects
    #[command(
        after_help = "Examples:\n  haven delete service/hello\n  haven delete vm/web-1 --wait"
    )]
    Delete {
        /// KIND/NAME
        #[arg(required = true)]
        what: Vec<String>,
        /// Wait until nothing of it is left
        #[arg(long)]
        wait: bool,
    },
    /// Change an object in an editor
    #[command(after_help = "Examples:\n  haven edit service/hello")]
    Edit {
        /// KIND/NAME
        what: String,
    },
}

fn bad(error: &impl ToString) -> Failure {
    Failure::bad(error.to_string(), "")
}

/// Reads manifests.
fn read(paths: &[PathBuf]) -> Result<Vec<ManifestFile>, Failure> {
    let mut files = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(|e| bad(&e))?;
            files.push(ManifestFile { name: "-".into(), text });
        } else if path.is_dir() {
            let mut inside: Vec<PathBuf> = std::fs::read_dir(path)
                .map_err(|e| bad(&e))?
                .flatten()
                .map(|entry| entry.path())
                .filter(|p| p.extension().is_some_and(|e| e == "yaml" || e == "yml"))
                .collect();
            inside.sort();
            files.extend(read(&inside)?);
        } else {
            files.push(one(path)?);
        }
    }
    Ok(files)
}

fn one(path: &Path) -> Result<ManifestFile, Failure> {
    let size = std::fs::metadata(path).map_or(0, |m| m.len());
    if size > haven_model::manifest::LARGEST as u64 {
        return Err(Failure::bad(
            format!("{} is {size} bytes long, more than a manifest may be", path.display()),
            "apply it in several steps; images are imported with `haven image import`",
        ));
    }
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::bad(format!("{} cannot be read: {e}", path.display()), "check the path")
    })?;
    Ok(ManifestFile { name: path.display().to_string(), text })
}

fn reference(what: &str) -> Result<ObjectRef, Failure> {
    what.parse().map_err(|e: haven_model::ModelError| bad(&e))
}

/// Runs it.
pub async fn run(command: ObjectsCommand) -> Result<(), Failure> {
    match command {
        ObjectsCommand::Apply { file, dry_run, wait, timeout } => {
            let files = read(&file)?;
            let client = connect().await?;
            let applied = client.apply(files, dry_run).await?;
            for one in &applied {
                println!(
                    "{:<24} {}{}",
                    one.object,
                    one.outcome,
                    if dry_run { " (dry run)" } else { "" }
                );
            }
            if wait && !dry_run {
                wait_for(&client, &applied, Duration::from_secs(timeout)).await?;
            }
        }
        ObjectsCommand::Diff { file } => {
            let applied = connect().await?.apply(read(&file)?, true).await?;
            let changed: Vec<&Applied> =
                applied.iter().filter(|a| a.outcome != "unchanged").collect();
            for one in &changed {
                print!("{}", diff(one));
            }
            if !changed.is_empty() {
                std::process::exit(1);
            }
        }
        ObjectsCommand::Get { what, output } => {
            let client = connect().await?;
            let items = if what.contains('/') {
                vec![client.object(&reference(&what)?).await?]
            } else {
                let kind: Kind = what.parse().map_err(|e: haven_model::ModelError| bad(&e))?;
                client.list(kind).await?
            };
            print!("{}", render::items(&items, output));
        }
        ObjectsCommand::Delete { what, wait } => {
            let references = what.iter().map(|w| reference(w)).collect::<Result<Vec<_>, _>>()?;
            let client = connect().await?;
            for one in &references {
                client.delete(one).await?;
                println!("{one:<24} deleting");
            }
            if wait {
                wait_gone(&client, &references).await?;
            }
        }
        ObjectsCommand::Edit { what } => edit(&reference(&what)?).await?,
    }
    Ok(())
}

/// Waits until nothing is left of what was deleted.
async fn wait_gone(client: &Client, references: &[ObjectRef]) -> Result<(), Failure> {
    for one in references {
        loop {
            match client.object(one).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                Err(ClientError::Refused(body)) if body.status == 404 => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// A unified view of one change.
fn diff(one: &Applied) -> String {
    let (before, after): (Vec<&str>, Vec<&str>) =
        (one.before.lines().collect(), one.after.lines().collect());
    let mut text = format!("{} ({})\n", one.object, one.outcome);
    before.iter().filter(|l| !after.contains(l)).for_each(|l| text.push_str(&format!("- {l}\n")));
    after.iter().filter(|l| !before.contains(l)).for_each(|l| text.push_str(&format!("+ {l}\n")));
    text
}

async fn edit(what: &ObjectRef) -> Result<(), Failure> {
    let client = connect().await?;
    let item = client.object(what).await?;
    let path = std::env::temp_dir().join(format!("haven-edit-{}.yaml", std::process::id()));
    std::fs::write(&path, haven_model::manifest::to_yaml(&item.object)).map_err(|e| bad(&e))?;
    let editor = std::env::var("EDITOR").unwrap_or_else(|_| "vi".into());
    let result = loop {
        let status = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("{editor} {}", path.display()))
            .status();
        if !status.is_ok_and(|s| s.success()) {
            break Err(Failure::bad(
                format!("the editor `{editor}` failed; nothing was changed"),
                "set EDITOR",
            ));
        }
        match client.apply(vec![one(&path)?], false).await {
            Ok(applied) => {
                applied.iter().for_each(|one| println!("{:<24} {}", one.object, one.outcome));
                break Ok(());
            }
            Err(error) => {
                let failure = Failure::from(error);
                eprint!("{failure}");
                if !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
                    break Err(failure);
                }
            }
        }
    };
    let _ = std::fs::remove_file(path);
    result
}

/// Waits until VMs are ready and services have all their members.
pub async fn wait_for(
    client: &Client,
    applied: &[Applied],
    patience: Duration,
) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut said = String::new();
    loop {
        let mut missing = None;
        for one in applied {
            let what = reference(&one.object)?;
            if !matches!(what.kind, Kind::Vm | Kind::Service) {
                continue;
            }
            let item = match client.object(&what).await {
                Ok(item) => item,
                // The live copy of that daemon may lag behind what was just written.
                Err(ClientError::Refused(body)) if body.status == 404 => {
                    missing = Some((what, "not seen yet".into()));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let done = match &item.object {
                haven_model::Object::Service(s) => {
                    item.state == format!("{0}/{0} ready", s.spec.replicas)
                }
                haven_model::Object::Vm(vm) => item.state == "ready" || !vm.spec.running,
                _ => true,
            };
            if !done {
                missing = Some((what, item.state));
            }
        }
        let Some((what, state)) = missing else {
            println!("all of it runs after {:.1} s", begin.elapsed().as_secs_f64());
            return Ok(());
        };
        let now = format!("waiting for {what}: {state}");
        if now != said {
            println!("{now}");
            said = now;
        }
        if begin.elapsed() > patience {
            let why = client.explain(&what).await?.join("\n    ");
            return Err(Failure::other(anyhow::anyhow!(
                "{what} is not ready after {} s: {state}\n    {why}",
                patience.as_secs()
            )));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
