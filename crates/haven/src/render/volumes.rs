//! Disks of VMs.

use super::{fields, monitor::time, table};
use haven_model::{Bytes, api::VolumeView, vm::DiskState};

/// How it stands towards its guest.
fn state(view: &VolumeView) -> String {
    let is = match view.state {
        DiskState::Attached => "attached",
        DiskState::Detached => "detached",
        DiskState::Off => "not running",
        DiskState::Changing => "changing",
        DiskState::NextStart => "changes at the next start",
    };
    match view.message.as_str() {
        "" => is.to_owned(),
        message => format!("{is}: {message}"),
    }
}

/// On how many hosts it is, of how many.
fn replicas(view: &VolumeView) -> String {
    let counted = view.replicas.iter().filter(|replica| replica.counted).count();
    match view.replicas.len() {
        0 => String::new(),
        all if all == counted => format!("whole on {all}"),
        all => format!("whole on {counted} of {all}"),
    }
}

/// A line for each.
pub fn volumes(all: &[VolumeView]) -> String {
    let row = |view: &VolumeView| {
        let host = |of: &haven_model::api::ReplicaLine| {
            if of.counted { of.host.to_string() } else { format!("({})", of.host) }
        };
        let hosts: Vec<String> = view.replicas.iter().map(host).collect();
        let state = VolumeView { message: String::new(), ..view.clone() };
        vec![
            view.name.to_string(),
            view.size.to_string(),
            view.pool.to_string(),
            if view.encrypted { "yes".to_owned() } else { String::new() },
            self::state(&state),
            replicas(view),
            hosts.join(" "),
        ]
    };
    let head = ["name", "size", "pool", "encrypted", "state", "replicas", "hosts"];
    table(&head, all.iter().map(row).collect())
}

/// One, with each of its replicas.
pub fn volume(view: &VolumeView) -> String {
    let owner = view.owner.as_ref().map(ToString::to_string).unwrap_or_default();
    let mut about = vec![
        ("name", view.name.to_string()),
        ("size", view.size.to_string()),
        ("pool", view.pool.to_string()),
        ("encrypted", if view.encrypted { "yes" } else { "no" }.to_owned()),
        ("state", state(view)),
        ("its VM is on", owner),
    ];
    let Some(volume) = &view.volume else { return fields(&about) };
    about.push(("replicas", replicas(view)));
    about.push(("runs", volume.run.to_string()));
    let head = fields(&about);
    let line = |of: &haven_model::api::ReplicaLine| {
        let counts = if of.counted { "counts" } else { "does not count" };
        vec![of.host.to_string(), counts.to_owned(), of.is.clone()]
    };
    let lines = view.replicas.iter().map(line).collect();
    let last = view.check.as_ref().map(|check| match &check.outcome {
        Some(outcome) => format!("\ncompared {}: {}\n", time(outcome.at_ms), outcome.message),
        None => format!(
            "\nits replicas are being compared: {} of {} so far\n",
            Bytes::mib(check.done.0 >> 20),
            view.size
        ),
    });
    format!("{head}\n{}{}", table(&["host", "replica", ""], lines), last.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::{volume, volumes};
    use haven_model::{
        Bytes,
        api::{ReplicaLine, VolumeView},
        vm::DiskState,
        volume::Volume,
    };

    #[test]
    fn where_a_disk_is_and_what_it_lacks_is_said() {
        let name = |text: &str| haven_model::Name::new(text).unwrap();
        let line = |host: &str, counted: bool, is: &str| ReplicaLine {
            host: name(host),
            counted,
            is: is.into(),
        };
        let hosts = [name("host1"), name("host2")];
        let view = VolumeView {
            name: "db.data".to_owned().try_into().unwrap(),
            size: Bytes::gib(10),
            pool: name("disks"),
            encrypted: false,
            state: DiskState::Attached,
            message: String::new(),
            owner: Some(name("host1")),
            replicas: vec![
                line("host1", true, "its VM's own"),
                line("host2", false, "its host is away"),
            ],
            volume: Some(Volume::new("u1".into(), name("disks"), Bytes::gib(10), hosts)),
            check: None,
        };
        let spare = VolumeView {
            name: "db.logs".to_owned().try_into().unwrap(),
            pool: name("fast"),
            encrypted: true,
            state: DiskState::Changing,
            message: "its guest has not let its disk `logs` go yet".into(),
            replicas: Vec::new(),
            volume: None,
            ..view.clone()
        };
        insta::assert_snapshot!(volume(&spare), @r"
        name          db.logs
        size          10GiB
        pool          fast
        encrypted     yes
        state         changing: its guest has not let its disk `logs` go yet
        its VM is on  host1
        ");
        insta::assert_snapshot!(volumes(&[view.clone(), spare]), @r"
        NAME     SIZE   POOL   ENCRYPTED  STATE     REPLICAS         HOSTS
        db.data  10GiB  disks             attached  whole on 1 of 2  host1 (host2)
        db.logs  10GiB  fast   yes        changing
        ");
        insta::assert_snapshot!(volume(&view), @r"
        name          db.data
        size          10GiB
        pool          disks
        encrypted     no
        state         attached
        its VM is on  host1
        replicas      whole on 1 of 2
        runs          0

        HOST   REPLICA
        host1  counts          its VM's own
        host2  does not count  its host is away
        ");
    }
}
