//! The API's description is whole, and the file that is checked in is what the code gives.

use super::{
    openapi::{document, path_names, text},
    table::{self, Takes},
};
use serde_json::Value;
use std::collections::BTreeSet;

#[test]
fn the_checked_in_file_is_what_the_code_gives() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
    let file = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        file == text(),
        "docs/openapi.json is not what the code gives; write it with `cargo run -p xtask -- openapi`"
    );
}

#[test]
fn the_description_has_every_route_and_no_other() {
    let document = document();
    let mut described = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            described.insert((method.to_uppercase(), path.clone()));
        }
    }
    let routed: BTreeSet<_> =
        table::all().map(|r| (r.method.to_owned(), r.path.to_owned())).collect();
    assert_eq!(described, routed);
    assert_eq!(routed.len(), table::all().count(), "a route stands twice in the table");
}

#[test]
fn every_operation_says_all_there_is_to_know() {
    let document = document();
    let mut ids = BTreeSet::new();
    for route in table::all() {
        let operation = &document["paths"][route.path][route.method.to_ascii_lowercase()];
        assert!(ids.insert(operation["operationId"].to_string()), "{} is given twice", route.id);
        assert_eq!(operation["summary"], route.summary);
        assert_eq!(operation["x-haven-role"], format!("{:?}", route.role).to_lowercase());
        let empty = Vec::new();
        let parameters = operation["parameters"].as_array().unwrap_or(&empty);
        for name in path_names(route.path) {
            let parameter = parameters.iter().find(|p| p["name"] == name && p["in"] == "path");
            assert!(parameter.is_some(), "{}: {name} is not described", route.path);
        }
        for parameter in parameters {
            assert!(parameter["description"].is_string(), "{}: {parameter}", route.path);
        }
        assert_eq!(operation["requestBody"].is_null(), matches!(route.takes, Takes::Nothing));
        assert_eq!(operation["responses"]["default"]["$ref"], "#/components/responses/Problem");
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn walk(value: &Value, document: &Value, seen: &mut usize) {
        if let Some(to) = value["$ref"].as_str() {
            let pointer = to.strip_prefix('#').expect("references stay within the document");
            assert!(document.pointer(pointer).is_some(), "{to} leads nowhere");
            *seen += 1;
        }
        match value {
            Value::Object(map) => map.values().for_each(|v| walk(v, document, seen)),
            Value::Array(items) => items.iter().for_each(|v| walk(v, document, seen)),
            _ => {}
        }
    }
    let (document, mut seen) = (document(), 0);
    walk(&document, &document, &mut seen);
    assert!(seen > 50, "{seen}");
}
