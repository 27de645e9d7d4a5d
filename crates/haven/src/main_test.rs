//! The command line as a whole: every command has its place, its example, its completion and its man page.

use super::{Cli, command, completions, finish, help::PILLARS, man};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use std::collections::BTreeSet;

/// All commands that people see, with their paths.
fn walk<'a>(command: &'a Command, path: &str, found: &mut Vec<(String, &'a Command, bool)>) {
    let path = format!("{path} {}", command.get_name()).trim().to_owned();
    let below: Vec<&Command> =
        command.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set()).collect();
    found.push((path.clone(), command, below.is_empty()));
    below.into_iter().for_each(|sub| walk(sub, &path, found));
}

#[test]
fn the_command_line_is_sound_and_every_command_has_an_example() {
    Cli::command().debug_assert();
    let all = command();
    let mut found = Vec::new();
    walk(&all, "", &mut found);
    let leaves: Vec<_> = found.iter().filter(|(_, _, leaf)| *leaf).collect();
    let missing: Vec<&String> = leaves
        .iter()
        .filter(|(path, leaf, _)| {
            let help = (*leaf).clone().render_long_help().to_string();
            // An example is one only when it shows this very command.
            !help
                .split_once("Example")
                .is_some_and(|(_, examples)| examples.contains(path.as_str()))
        })
        .map(|(path, _, _)| path)
        .collect();
    assert!(missing.is_empty(), "without an Example of their own: {missing:?}");
    assert!(leaves.len() > 50, "{}", leaves.len());
}

#[test]
fn every_list_and_show_takes_an_output() {
    let all = command();
    let mut found = Vec::new();
    walk(&all, "", &mut found);
    let others = ["status", "events", "incidents", "explain", "audit", "version", "get"];
    let without: Vec<&String> = found
        .iter()
        .filter(|(path, of, _)| {
            // The lab's list is the lab's own.
            let looks = ["ls", "show"].contains(&of.get_name()) && path != "haven lab ls";
            (looks || others.contains(&of.get_name()))
                && !of.get_arguments().any(|a| a.get_long() == Some("output"))
        })
        .map(|(path, _, _)| path)
        .collect();
    assert!(without.is_empty(), "without -o: {without:?}");
}

#[test]
fn every_argument_says_what_it_is() {
    let all = command();
    let mut found = Vec::new();
    walk(&all, "", &mut found);
    let silent: Vec<String> = found
        .iter()
        .filter(|(path, _, _)| !path.starts_with("haven lab"))
        .flat_map(|(path, of, _)| {
            let silent = of.get_arguments().filter(|a| a.get_help().is_none());
            silent.map(move |a| format!("{path} {}", a.get_id()))
        })
        .collect();
    assert!(silent.is_empty(), "without a word: {silent:?}");
}

#[test]
fn help_has_every_command_under_its_pillar() {
    let all = Cli::command();
    let there: BTreeSet<&str> =
        all.get_subcommands().filter(|c| !c.is_hide_set()).map(Command::get_name).collect();
    let grouped: Vec<&str> = PILLARS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    assert_eq!(grouped.len(), there.len(), "{grouped:?} {there:?}");
    assert_eq!(grouped.into_iter().collect::<BTreeSet<_>>(), there);
    insta::assert_snapshot!(command().render_help());
}

#[test]
fn completions_know_every_command() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let text = completions(shell);
        for word in ["network", "incidents", "uncordon", "context", "token-stdin"] {
            assert!(text.contains(word), "{shell}: {word}");
        }
    }
    let bash = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(bash.path(), completions(Shell::Bash)).unwrap();
    let read = std::process::Command::new("bash").arg("-n").arg(bash.path()).status().unwrap();
    assert!(read.success());
}

#[test]
fn every_command_has_a_man_page_with_its_example() {
    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().join("share/man1");
    let pages = man(&into).unwrap();
    let mut all = Cli::command();
    all.build();
    let mut found = Vec::new();
    walk(&all, "", &mut found);
    assert_eq!(pages, found.len());
    for (path, _, leaf) in found {
        let page = into.join(format!("{}.1", path.replace(' ', "-")));
        let text = std::fs::read_to_string(&page).unwrap_or_else(|e| panic!("{page:?}: {e}"));
        assert!(!leaf || text.contains("Examples:"), "{path}");
    }
    // A file in the way is said so.
    std::fs::write(directory.path().join("file"), "").unwrap();
    assert_eq!(man(&directory.path().join("file/x")).unwrap_err().code, 2);
}

#[test]
fn input_that_hangs_does_not_keep_the_process_from_ending() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (finished, hangs) = std::sync::mpsc::channel::<()>();
    let began = std::time::Instant::now();
    finish(runtime, async {
        tokio::task::spawn_blocking(move || hangs.recv_timeout(std::time::Duration::from_secs(5)));
        // It has begun; one that has not is dropped without waiting.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    });
    assert!(began.elapsed() < std::time::Duration::from_secs(2), "{:?}", began.elapsed());
    drop(finished);
}
