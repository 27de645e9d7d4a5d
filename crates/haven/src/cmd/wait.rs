//! Waiting for what was asked for.

use crate::{failure::Failure, out};
use haven_client::{Client, ClientError};
use haven_model::{
    Object, ObjectRef, UpdateStrategy,
    api::{Applied, CHANGED, Item},
    object::Kind,
    vm::pending_words,
};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Whether an object is as it was asked for: the daemon has seen that spec, and what runs is made from it. A service
/// whose members are all ready may still consist of old ones; `updated` tells.
fn done(item: &Item, generation: u64) -> bool {
    if item.object.meta().generation < generation {
        return false;
    }
    match &item.object {
        Object::Service(service) => {
            let all = format!("{0}/{0}", service.spec.replicas);
            item.state == format!("{all} ready") && item.columns.get("updated") == Some(&all)
        }
        Object::Vm(vm) if vm.spec.running => item.state == "ready",
        Object::Vm(_) => item.state == "stopped",
        _ => true,
    }
}

/// What is to be said of a VM that runs on as it was before it was changed: nobody asked for its restart, so that is
/// not waited for.
fn pending(item: &Item) -> Option<String> {
    let parts: Vec<String> = item.columns.get(CHANGED)?.split(", ").map(str::to_owned).collect();
    Some(pending_words(&item.object.meta().name, &parts))
}

/// In words, what an object that is not done is at.
fn at(item: &Item, generation: u64) -> String {
    if item.object.meta().generation < generation {
        return "the change is not seen yet".into();
    }
    match item.columns.get("updated") {
        Some(updated) if item.object.kind() == Kind::Service => {
            let step = item.columns.get("step").filter(|_| is_staged(item));
            let step = step.map(|step| format!("; {step}")).unwrap_or_default();
            format!("{}; updated {updated}{step}", item.state)
        }
        _ => item.state.clone(),
    }
}

/// Whether a service is updated in stages, so that it says for what the next one waits.
fn is_staged(item: &Item) -> bool {
    matches!(&item.object, Object::Service(service) if service.spec.update.strategy != UpdateStrategy::Rolling)
}

/// What was applied, and the generation of each that is wanted.
pub fn asked(applied: &[Applied]) -> Result<Vec<(ObjectRef, u64)>, Failure> {
    applied.iter().map(|one| Ok((one.object.parse()?, one.generation))).collect()
}

/// Waits until VMs are ready and services have all their members from the current template. A change that a running VM
/// takes up at its next start is told, not waited for.
pub async fn ready(
    client: &Client,
    asked: &[(ObjectRef, u64)],
    patience: Duration,
) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut said = String::new();
    loop {
        let (missing, later) = look(client, asked).await?;
        let Some((what, state)) = missing else {
            later.iter().for_each(out::line);
            out::line(format_args!("all of it runs after {:.1} s", begin.elapsed().as_secs_f64()));
            return Ok(());
        };
        let now = format!("waiting for {what}: {state}");
        if now != said {
            out::line(&now);
            said = now;
        }
        if begin.elapsed() > patience {
            let why = client.explain(&what).await.unwrap_or_default().join("\n    ");
            let message =
                format!("{what} is not ready after {} s: {state}\n    {why}", patience.as_secs());
            let hint = format!("it goes on by itself; `haven explain {what}` tells how it is");
            return Err(Failure::failed(message.trim_end(), hint));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The last of the objects that is not done, and what is to be said of the others.
async fn look(
    client: &Client,
    asked: &[(ObjectRef, u64)],
) -> Result<(Option<(ObjectRef, String)>, Vec<String>), Failure> {
    let (mut missing, mut later) = (None, Vec::new());
    for (what, generation) in asked {
        if !matches!(what.kind, Kind::Vm | Kind::Service) {
            continue;
        }
        match client.object(what).await {
            Ok(item) if done(&item, *generation) => later.extend(pending(&item)),
            Ok(item) => missing = Some((what.clone(), at(&item, *generation))),
            // The live copy of that daemon may lag behind what was just written.
            Err(ClientError::Refused(body)) if body.status == 404 => {
                missing = Some((what.clone(), "not seen yet".into()));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((missing, later))
}

/// Waits until nothing is left of what was deleted.
pub async fn gone(
    client: &Client,
    references: &[ObjectRef],
    patience: Duration,
) -> Result<(), Failure> {
    let begin = Instant::now();
    for one in references {
        loop {
            match client.object(one).await {
                Ok(_) if begin.elapsed() > patience => {
                    let why = client.explain(one).await.unwrap_or_default().join("\n    ");
                    let seconds = patience.as_secs();
                    return Err(Failure::failed(
                        format!("{one} is still there after {seconds} s\n    {why}").trim_end(),
                        "what still uses it must go first",
                    ));
                }
                Ok(_) => tokio::time::sleep(PAUSE).await,
                Err(ClientError::Refused(body)) if body.status == 404 => break,
                Err(error) => return Err(error.into()),
            }
        }
        out::line(format_args!("{one} gone"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{at, done, pending};
    use haven_model::{api::Item, manifest::parse};

    fn item(text: &str, generation: u64, state: &str, updated: &str) -> Item {
        let mut object = parse(&[("x".into(), text.into())]).unwrap().remove(0).object;
        object.meta_mut().generation = generation;
        let columns = [("updated".to_owned(), updated.to_owned())].into();
        let warning = String::new();
        Item { resource_version: 7, object, state: state.into(), host: None, columns, warning }
    }

    fn service(generation: u64, state: &str, updated: &str) -> Item {
        let text = "kind: Service\nname: a\nreplicas: 3\ntemplate:\n  spec:\n    memory: 1GiB\n";
        item(text, generation, state, updated)
    }

    #[test]
    fn a_service_is_done_only_when_the_new_template_runs() {
        assert!(done(&service(2, "3/3 ready", "3/3"), 2));
        // The daemon has not seen the change.
        assert!(!done(&service(1, "3/3 ready", "3/3"), 2));
        // It has, and nothing has begun: all old members are ready.
        assert!(!done(&service(2, "3/3 ready", "0/3, 3 going"), 2));
        // Under way, and at its end with an old one left.
        assert!(!done(&service(2, "4/3 ready", "1/3, 3 going"), 2));
        assert!(!done(&service(2, "3/3 ready", "3/3, 1 going"), 2));
        // Somebody changed it again meanwhile: that counts, too.
        assert!(done(&service(3, "3/3 ready", "3/3"), 2));
        assert_eq!(at(&service(1, "3/3 ready", "3/3"), 2), "the change is not seen yet");
        let words = at(&service(2, "3/3 ready", "1/3, 2 going"), 2);
        assert_eq!(words, "3/3 ready; updated 1/3, 2 going");
    }

    #[test]
    fn a_running_vm_that_was_changed_is_done_and_the_change_is_told() {
        let mut vm = item("kind: VM\nname: web\nmemory: 1GiB\n", 2, "ready", "");
        assert!(pending(&vm).is_none());
        vm.columns.insert("changed".into(), "cpus, networks".into());
        assert!(done(&vm, 2));
        assert_eq!(
            pending(&vm).unwrap(),
            "web was changed (cpus, networks): that takes effect at its next start; run `haven vm reset web`, or stop and start it"
        );
    }

    #[test]
    fn a_vm_is_done_when_it_does_what_was_asked() {
        let runs = "kind: VM\nname: a\nmemory: 1GiB\n";
        let rests = "kind: VM\nname: a\nmemory: 1GiB\nrunning: false\n";
        assert!(done(&item(runs, 2, "ready", ""), 2));
        assert!(!done(&item(runs, 1, "ready", ""), 2));
        assert!(!done(&item(rests, 2, "ready", ""), 2));
        assert!(done(&item(rests, 2, "stopped", ""), 2));
    }
}
