//! Objects: many as a table, one with everything there is to say of it.

use super::{Output, fields, json, table, time};
use haven_model::{
    Object,
    api::{CHANGED, Item},
    manifest::to_yaml,
};
use serde::Serialize;
use std::collections::BTreeMap;

/// The columns that a plain table shows, in this order; wide ones show all.
const PLAIN: [&str; 15] = [
    "address",
    "addresses",
    "updated",
    CHANGED,
    "driver",
    "subnet",
    "path",
    "format",
    "size",
    "subject",
    "names",
    "issuer",
    "ends",
    "used-by",
    "problems",
];

/// What is said of an object beside its name, state and host.
fn columns(item: &Item) -> BTreeMap<String, String> {
    let mut columns = item.columns.clone();
    let mut add = |word: &str, value: String| {
        columns.entry(word.into()).or_insert(value);
    };
    let meta = item.object.meta();
    let labels: Vec<String> = meta.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    add("labels", labels.join(","));
    match &item.object {
        Object::Network(network) => {
            let spec = &network.spec;
            add("driver", format!("{:?}", spec.driver).to_lowercase());
            add("subnet", spec.subnet.to_string());
            add("gateway", spec.gateway().to_string());
            add("nat", if spec.nat { "yes" } else { "no" }.into());
            add("mtu", spec.mtu.to_string());
            add("vni", spec.vni.map(|vni| vni.to_string()).unwrap_or_default());
            add("bridge", spec.bridge.clone().unwrap_or_default());
        }
        Object::Pool(pool) => {
            add("driver", format!("{:?}", pool.spec.driver).to_lowercase());
            add("path", pool.spec.place());
        }
        Object::Image(image) => {
            let size: u64 = image.spec.files().map(|file| file.size.0).sum();
            add("size", format!("{} MiB", size.div_ceil(1 << 20)));
            let direct = image.spec.kernel.is_some().then(|| "kernel".to_owned());
            add("format", image.spec.format.clone().or(direct).unwrap_or_default());
        }
        Object::Host(host) => add("cordoned", if host.spec.cordoned { "yes" } else { "" }.into()),
        Object::Vm(vm) => {
            add("owner", vm.meta.owner.as_ref().map(ToString::to_string).unwrap_or_default())
        }
        Object::Certificate(_) | Object::Target(_) | Object::Service(_) => {}
    }
    columns
}

/// A list of objects.
pub fn items(items: &[Item], output: Output) -> String {
    match output {
        Output::Json => json(items),
        Output::Yaml => {
            let documents: Vec<String> = items.iter().map(|i| to_yaml(&i.object)).collect();
            documents.join("---\n")
        }
        Output::Table | Output::Wide => lines(items, output == Output::Wide),
    }
}

fn lines(items: &[Item], wide: bool) -> String {
    let said: Vec<BTreeMap<String, String>> = items.iter().map(columns).collect();
    let used = |word: &str| said.iter().any(|of| of.get(word).is_some_and(|v| !v.is_empty()));
    let mut words: Vec<&str> = PLAIN.into_iter().filter(|word| used(word)).collect();
    if wide {
        let more: std::collections::BTreeSet<&str> =
            said.iter().flat_map(|of| of.keys().map(String::as_str)).collect();
        words.extend(more.into_iter().filter(|word| !PLAIN.contains(word) && used(word)));
    }
    let (state, host) =
        (items.iter().any(|i| !i.state.is_empty()), items.iter().any(|i| i.host.is_some()));
    let mut head = vec!["name"];
    head.extend(state.then_some("state"));
    head.extend(host.then_some("host"));
    head.extend(&words);
    let rows = items.iter().zip(&said).map(|(item, of)| {
        let mut row = vec![item.object.meta().name.to_string()];
        row.extend(state.then(|| item.state.clone()));
        row.extend(host.then(|| item.host.as_ref().map(ToString::to_string).unwrap_or_default()));
        row.extend(words.iter().map(|word| of.get(*word).cloned().unwrap_or_default()));
        row
    });
    table(&head, rows.collect())
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    item: &'a Item,
    #[serde(skip_serializing_if = "<[Item]>::is_empty")]
    members: &'a [Item],
    explain: &'a [String],
}

/// One object: what it is, its members if it is a service, and what there is to say of it.
pub fn shown(item: &Item, members: &[Item], explain: &[String], output: Output) -> String {
    match output {
        Output::Json => return json(&Shown { item, members, explain }),
        Output::Yaml => return to_yaml(&item.object),
        Output::Table | Output::Wide => {}
    }
    let meta = item.object.meta();
    let said = columns(item);
    let mut words = vec![
        ("name", meta.name.to_string()),
        ("state", item.state.clone()),
        ("host", item.host.as_ref().map(ToString::to_string).unwrap_or_default()),
    ];
    words.extend(PLAIN.iter().filter_map(|word| Some((*word, said.get(*word)?.clone()))));
    let more = said.iter().filter(|(word, _)| !PLAIN.contains(&word.as_str()));
    words.extend(more.map(|(word, value)| (word.as_str(), value.clone())));
    if output == Output::Wide {
        words.push(("uid", meta.uid.clone()));
        words.push(("created", time(meta.created_ms)));
        words.push(("generation", meta.generation.to_string()));
        words.push(("version", item.resource_version.to_string()));
    }
    let mut text = fields(&words);
    if !members.is_empty() {
        text.push_str(&format!("\n{}", lines(members, output == Output::Wide)));
    }
    if !explain.is_empty() {
        text.push('\n');
        explain.iter().for_each(|line| text.push_str(&format!("{line}\n")));
    }
    text
}
