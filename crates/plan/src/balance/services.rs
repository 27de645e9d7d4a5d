//! The members of a service: as many as wanted, all from the current template, replaced as its strategy says.
//!
//! Each plan takes the steps that keep the limits now; what is left follows when the store shows their effect.

use super::rollout::Rollout;
use crate::work::{Work, service_ref};
use haven_model::{
    Action, Name, Observations, ServiceSpec, Snapshot, UpdateStrategy, service::Promote,
    vm::fnv1a as fnv,
};

/// Plans the members of every service.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (name, service) in &snapshot.services {
        if service.meta.deleting {
            end(work, name, service.revision);
        } else {
            let rollout = Rollout::of(snapshot, work.seen, name, service);
            rollout.carry_out(work, &rollout.stage());
        }
    }
}

/// A short name for a template, the same wherever it is computed (FNV-1a).
#[must_use]
pub fn template_hash(spec: &ServiceSpec) -> String {
    let text =
        serde_json::to_string(&(&spec.template, &spec.check, spec.restarts)).unwrap_or_default();
    format!("{:08x}", fnv(&text) as u32)
}

fn end(work: &mut Work<'_>, name: &Name, revision: i64) {
    let rollout = Rollout::of(work.snapshot, work.seen, name, &work.snapshot.services[name]);
    for member in rollout.members() {
        member.delete(work, format!("{} goes with its service {name}", member.name));
    }
    if rollout.is_empty() && !work.snapshot.frontends.contains_key(name) {
        let action =
            Action::RemoveObject { object: service_ref(name), expected_revision: revision };
        work.act(service_ref(name), format!("{name} was deleted and has no member left"), action);
    }
}

/// How far the update of a service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is done and waited for, in words; none when there is nothing to replace.
    pub step: Option<String>,
    /// Who gets how much, in words; none while all members share evenly.
    pub traffic: Option<String>,
}

/// How far the update of a service is.
#[must_use]
pub fn progress(snapshot: &Snapshot, seen: &Observations, name: &Name) -> Option<Progress> {
    let service = snapshot.services.get(name).filter(|service| !service.meta.deleting)?;
    let rollout = Rollout::of(snapshot, seen, name, service);
    let replaces = rollout.old().next().is_some();
    let step = replaces.then(|| rollout.stage().step);
    Some(Progress { step, traffic: rollout.traffic_words() })
}

/// The template of a service that a person may promote now.
///
/// # Errors
/// Why there is nothing to promote, and what is to be done, in words.
pub fn promotable(
    snapshot: &Snapshot,
    seen: &Observations,
    name: &Name,
) -> Result<String, (String, String)> {
    let Some(service) = snapshot.services.get(name) else {
        return Err((
            format!("there is no service `{name}`"),
            "`haven service ls` lists them".into(),
        ));
    };
    let rollout = Rollout::of(snapshot, seen, name, service);
    let update = &service.spec.update;
    let refuse = |why: &str, hint: String| Err((why.to_owned(), hint));
    let show = format!("`haven service show {name}` tells how far it is");
    if rollout.old().next().is_none() {
        let hint = format!("apply a changed template first; {show}");
        return refuse(&format!("all members of {name} are made from its template already"), hint);
    }
    match update.strategy {
        UpdateStrategy::Rolling => {
            refuse(&format!("{name} is updated by `rolling`, which waits for nobody"), show)
        }
        _ if rollout.is_let_in() => refuse(
            &format!("the new template of {name} is let in already; the update goes on"),
            show,
        ),
        UpdateStrategy::BlueGreen if update.promote.unwrap_or_default() == Promote::Automatic => {
            let hint = "write `promote: manual` if a person shall decide".into();
            refuse(&format!("{name} switches by itself once all new members are ready"), hint)
        }
        _ if !rollout.stage().promotable => {
            let hint = format!("wait until they are; {show}");
            refuse(&format!("the new members of {name} are not all ready yet"), hint)
        }
        _ => Ok(rollout.template.clone()),
    }
}
