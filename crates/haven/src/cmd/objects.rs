//! Manifests: apply, diff, get, delete, edit.

use super::{edit, files, wait};
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How, Output},
};
use clap::{Args, Subcommand};
use haven_client::ClientError;
use haven_model::{ObjectRef, api::Applied, object::Kind};
use std::{path::PathBuf, time::Duration};

/// What is deleted.
#[derive(Debug, Args)]
pub struct Deletion {
    /// KIND/NAME
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    what: Vec<String>,
    /// All objects in a file, a directory, or - for standard input; those not there are passed over
    #[arg(short, long)]
    file: Vec<PathBuf>,
    /// Wait until nothing of it is left
    #[arg(long)]
    wait: bool,
    /// How long, seconds
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

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
    #[command(
        after_help = "Examples:\n  haven diff -f examples/hello.yaml\n  haven get service/hello -o yaml | haven diff -f -"
    )]
    Diff {
        /// A file, a directory, or - for standard input
        #[arg(short, long, required = true)]
        file: Vec<PathBuf>,
    },
    /// List objects of a kind, or show one
    #[command(
        after_help = "Examples:\n  haven get vms\n  haven get service/hello -o yaml\n  haven get cluster"
    )]
    Get {
        /// KIND or KIND/NAME, or `cluster` for the cluster's own spec
        what: String,
        #[command(flatten)]
        how: How,
    },
    /// Delete objects
    #[command(
        after_help = "Examples:\n  haven delete service/hello\n  haven delete vm/web-1 --wait\n  haven delete -f examples/hello.yaml"
    )]
    Delete(Deletion),
    /// Change an object in an editor (VISUAL or EDITOR)
    #[command(
        after_help = "Examples:\n  haven edit service/hello\n  EDITOR=nano haven edit vm/web-1\n  haven edit cluster"
    )]
    Edit {
        /// KIND/NAME, or `cluster` for the cluster's own spec: timers, fencing, voters
        what: String,
    },
}

/// Runs it.
pub async fn run(command: ObjectsCommand) -> Result<(), Failure> {
    match command {
        ObjectsCommand::Apply { file, dry_run, wait, timeout } => {
            let files = files::read(&file)?;
            let client = connect().await?;
            let applied = client.apply(files, dry_run).await?;
            let note = if dry_run { " (dry run)" } else { "" };
            for one in &applied {
                out::line(format_args!("{:<24} {}{note}", one.object, one.outcome));
            }
            out::warn(applied.iter().map(|one| one.warning.as_str()));
            if wait && !dry_run {
                wait::ready(&client, &wait::asked(&applied)?, Duration::from_secs(timeout)).await?;
            }
        }
        ObjectsCommand::Diff { file } => {
            let applied = connect().await?.apply(files::read(&file)?, true).await?;
            let changed: Vec<&Applied> =
                applied.iter().filter(|a| a.outcome != "unchanged").collect();
            changed.iter().for_each(|one| out::print(&diff(one)));
            if !changed.is_empty() {
                return Err(Failure::quiet(1));
            }
        }
        ObjectsCommand::Get { what, how } if what.contains('/') => {
            super::show(&what.parse()?, how.output).await?;
        }
        ObjectsCommand::Get { what, how } if what == edit::CLUSTER => {
            let item = connect().await?.cluster().await?;
            match how.output {
                Output::Json => out::print(&render::json(&item)),
                _ => out::print(&render::yaml(&item.spec)),
            }
        }
        ObjectsCommand::Get { what, how } => {
            let kind: Kind = what.parse()?;
            let items = connect().await?.list(kind).await?;
            out::print(&render::items(&items, how.output));
        }
        ObjectsCommand::Delete(deletion) => delete(&deletion).await?,
        ObjectsCommand::Edit { what } => edit::run(&what).await?,
    }
    Ok(())
}

async fn delete(deletion: &Deletion) -> Result<(), Failure> {
    let from_files = !deletion.file.is_empty();
    let references: Vec<ObjectRef> = if from_files {
        files::to_delete(&files::objects(files::read(&deletion.file)?)?)?
    } else {
        deletion.what.iter().map(|what| what.parse()).collect::<Result<_, _>>()?
    };
    let client = connect().await?;
    for one in &references {
        match client.delete(one).await {
            Ok(_) => out::line(format_args!("{one:<24} deleting")),
            Err(ClientError::Refused(body)) if body.status == 404 && from_files => {
                out::line(format_args!("{one:<24} not there"));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if deletion.wait {
        wait::gone(&client, &references, Duration::from_secs(deletion.timeout)).await?;
    }
    Ok(())
}

/// A unified diff of one change.
fn diff(one: &Applied) -> String {
    let from =
        if one.before.is_empty() { "/dev/null".into() } else { format!("{} now", one.object) };
    unified(&one.before, &one.after, &from, &format!("{} after apply", one.object))
}

/// A unified diff, as `diff -u` prints it.
pub(super) fn unified(before: &str, after: &str, from: &str, to: &str) -> String {
    similar::TextDiff::from_lines(before, after)
        .unified_diff()
        .context_radius(3)
        .header(from, to)
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::diff;
    use haven_model::api::Applied;

    #[test]
    fn a_change_is_a_unified_diff_with_its_surroundings() {
        let before = "kind: VM\nname: web\ncpus: 1\nmemory: 128MiB\nnetworks:\n- network: a\n- network: a\nrestart: always\nrunning: true\n";
        let after = before.replace("- network: a\n- network: a\n", "- network: a\n");
        let changed = Applied {
            object: "vm/web".into(),
            outcome: "changed".into(),
            before: before.into(),
            after,
            generation: 2,
            warning: String::new(),
        };
        let new = Applied { before: String::new(), outcome: "created".into(), ..changed.clone() };
        insta::assert_snapshot!(format!("{}{}", diff(&changed), diff(&new)));
    }
}
