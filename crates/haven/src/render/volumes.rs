//! Mirrored disks.

use super::{fields, monitor::time, table};
use haven_model::{Bytes, api::VolumeView};

/// On how many hosts it is, of how many.
fn state(view: &VolumeView) -> String {
    let counted = view.replicas.iter().filter(|replica| replica.counted).count();
    match view.replicas.len() {
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
        vec![
            view.name.to_string(),
            view.volume.size.to_string(),
            view.volume.pool.to_string(),
            state(view),
            hosts.join(" "),
        ]
    };
    table(&["name", "size", "pool", "state", "hosts"], all.iter().map(row).collect())
}

/// One, with each of its replicas.
pub fn volume(view: &VolumeView) -> String {
    let head = fields(&[
        ("name", view.name.to_string()),
        ("size", view.volume.size.to_string()),
        ("pool", view.volume.pool.to_string()),
        ("state", state(view)),
        ("its VM is on", view.owner.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("runs", view.volume.run.to_string()),
    ]);
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
            view.volume.size
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
            owner: Some(name("host1")),
            replicas: vec![
                line("host1", true, "its VM's own"),
                line("host2", false, "its host is away"),
            ],
            volume: Volume::new("u1".into(), name("disks"), Bytes::gib(10), hosts),
            check: None,
        };
        insta::assert_snapshot!(volumes(std::slice::from_ref(&view)), @r"
        NAME     SIZE   POOL   STATE            HOSTS
        db.data  10GiB  disks  whole on 1 of 2  host1 (host2)
        ");
        insta::assert_snapshot!(volume(&view), @r"
        name          db.data
        size          10GiB
        pool          disks
        state         whole on 1 of 2
        its VM is on  host1
        runs          0

        HOST   REPLICA
        host1  counts          its VM's own
        host2  does not count  its host is away
        ");
    }
}
