//! All that Haven asks QEMU for and reads from it stands in the schema of the real QEMU.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod inside;

use haven_host::vm::commands::{
    ADD_DEVICE, COMMANDS, DISK_DEVICE, DISK_PROPERTIES, EVENTS, OUT_OF_BAND, PANIC, STATES,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

/// What is used wherever there is a choice: by what disks are sent and served, and who may.
const VARIANTS: [&str; 14] = [
    "luks",
    "qcow2",
    "nbd",
    "nfs",
    "rbd",
    "secret",
    "tls-creds-psk",
    "null-co",
    "blkdebug",
    "block-node",
    "file",
    "quorum",
    "copy-before-write",
    "snapshot-access",
];

/// What QEMU says of itself.
struct Schema {
    greeting: Value,
    entries: BTreeMap<String, Value>,
}

impl Schema {
    fn of_qemu() -> Self {
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-S", "-machine", "none", "-display", "none", "-nodefaults", "-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut to = qemu.stdin.take().unwrap();
        let mut from = BufReader::new(qemu.stdout.take().unwrap()).lines();
        let mut next =
            || -> Value { serde_json::from_str(&from.next().unwrap().unwrap()).unwrap() };
        let greeting = next();
        writeln!(to, r#"{{"execute": "qmp_capabilities"}}"#).unwrap();
        next();
        writeln!(to, r#"{{"execute": "query-qmp-schema"}}"#).unwrap();
        let schema = next();
        writeln!(to, r#"{{"execute": "quit"}}"#).unwrap();
        qemu.wait().unwrap();
        let entries = schema["return"].as_array().unwrap().iter();
        let entries = entries.map(|e| (e["name"].as_str().unwrap().to_owned(), e.clone()));
        Self { greeting, entries: entries.collect() }
    }

    fn of_kind(&self, name: &str, kind: &str) -> Result<&Value, String> {
        let entry = self.entries.get(name).filter(|entry| entry["meta-type"] == kind);
        entry.ok_or_else(|| format!("QEMU has no {kind} `{name}`"))
    }

    /// The members of the type that an entry names; of its elements, if it is a list.
    fn members(&self, entry: &Value, what: &str) -> &[Value] {
        let mut kind = &self.entries[entry[what].as_str().unwrap()];
        if let Some(element) = kind["element-type"].as_str() {
            kind = &self.entries[element];
        }
        kind["members"].as_array().map_or(&[], Vec::as_slice)
    }

    /// The members that a type has beside, by the value of one of them (`driver`, `type`): those of the variant that Haven
    /// uses.
    fn of_variant(&self, entry: &Value, what: &str) -> Vec<&Value> {
        let mut kind = &self.entries[entry[what].as_str().unwrap()];
        if let Some(element) = kind["element-type"].as_str() {
            kind = &self.entries[element];
        }
        let variants = kind["variants"].as_array().into_iter().flatten();
        let used = variants.filter(|variant| VARIANTS.iter().any(|one| variant["case"] == *one));
        let members = used
            .filter_map(|variant| self.entries[variant["type"].as_str()?]["members"].as_array());
        members.flatten().collect()
    }

    /// `field` may be a path: `stats.rd_operations`.
    fn has(&self, entry: &Value, what: &str, field: &str) -> Result<(), String> {
        let (first, rest) = field.split_once('.').unzip();
        let name = first.unwrap_or(field);
        let mut members = self.members(entry, what).iter().chain(self.of_variant(entry, what));
        let member = members.find(|member| member["name"] == name);
        let member =
            member.ok_or_else(|| format!("{} has no `{name}` in {what}", entry["name"]))?;
        rest.map_or(Ok(()), |rest| self.has(member, "type", rest))
    }

    /// The words that a field can have.
    fn words(&self, entry: &Value, what: &str, field: &str) -> Vec<&str> {
        let members = self.members(entry, what);
        let member = members.iter().find(|member| member["name"] == field).unwrap();
        let kind = &self.entries[member["type"].as_str().unwrap()];
        kind["members"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect()
    }

    /// Everything that is wrong with a command.
    fn command(&self, command: &haven_host::vm::commands::Command) -> Result<(), String> {
        let entry = self.of_kind(command.name(), "command")?;
        let of_device = |argument: &&&str| {
            command.name() == ADD_DEVICE.name() && DISK_PROPERTIES.contains(*argument)
        };
        for argument in command.arguments().iter().filter(|argument| !of_device(argument)) {
            self.has(entry, "arg-type", argument)?;
        }
        for member in self.members(entry, "arg-type") {
            let name = member["name"].as_str().unwrap();
            // A member without a default must be given.
            if member.get("default").is_none() && !command.arguments().contains(&name) {
                return Err(format!("`{}` must have the argument `{name}`", command.name()));
            }
        }
        for field in command.reads() {
            self.has(entry, "ret-type", field)?;
        }
        if command.out_of_band() && entry["allow-oob"] != true {
            return Err(format!("`{}` cannot go out-of-band", command.name()));
        }
        Ok(())
    }
}

#[test]
fn what_haven_says_qemu_understands() {
    if !inside::inside("what_haven_says_qemu_understands") {
        return;
    }
    let schema = Schema::of_qemu();
    let help = Command::new("qemu-system-x86_64")
        .args(["-device", &format!("{DISK_DEVICE},help")])
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for property in DISK_PROPERTIES {
        assert!(help.contains(&format!("  {property}=")), "{DISK_DEVICE} has no `{property}`");
    }
    let offers = schema.greeting["QMP"]["capabilities"].as_array().unwrap();
    assert!(offers.iter().any(|offer| offer == OUT_OF_BAND));
    for command in COMMANDS {
        schema.command(command).unwrap();
    }
    for event in EVENTS {
        let entry = schema.of_kind(event.name(), "event").unwrap();
        for field in event.reads() {
            schema.has(entry, "arg-type", field).unwrap();
        }
    }
    let status = schema.of_kind("query-status", "command").unwrap();
    let mut known: Vec<&str> = STATES.iter().map(|(word, _)| *word).collect();
    let mut words = schema.words(status, "ret-type", "status");
    known.sort_unstable();
    words.sort_unstable();
    assert_eq!(known, words);
    let shutdown = schema.of_kind("SHUTDOWN", "event").unwrap();
    assert!(schema.words(shutdown, "arg-type", "reason").contains(&PANIC));
    println!("{} commands and {} events agree with QEMU", COMMANDS.len(), EVENTS.len());
    // The test would notice: a name that QEMU does not have is no command.
    assert!(schema.of_kind("no-such-command", "command").is_err());
}
