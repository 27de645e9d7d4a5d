//! The API's description, OpenAPI 3.1, made from [`table::all`] and the types that go over the wire.
//!
//! It stands in `docs/openapi.json`; `cargo run -p xtask -- openapi` writes that file, and a test fails while it is not
//! what the code gives. Types are described as they are read: a field with a default may be left out of a request, and
//! answers always carry it.

use super::{
    auth::Role,
    table::{self, Gives, Route, SchemaOf, Takes},
};
use haven_model::{Name, api::ProblemBody, object::Kind};
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

const ABOUT: &str = "Everything that `haven` does goes through this API. A caller has a role: `viewer` looks, \
    `operator` changes what runs, `admin` does everything; `x-haven-role` names the least role of each operation. \
    Errors are problems (RFC 9457) that say what is wrong, where, and what to do. A write that rests on a version \
    somebody else has changed meanwhile is refused with 409. Every write stands in the audit log.";

/// The description as a file: pretty, keys in order.
///
/// # Panics
/// Never: it is plain data.
#[must_use]
pub fn text() -> String {
    let mut text = serde_json::to_string_pretty(&document()).expect("a document is plain data");
    text.push('\n');
    text
}

/// The description.
#[must_use]
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for route in table::all() {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.to_ascii_lowercase()] = operation;
    }
    let problem = generator.subschema_for::<ProblemBody>();
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Haven",
            "summary": "A cluster of servers that keeps services running when servers die.",
            "description": ABOUT,
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{
            "url": "https://{host}:7443",
            "description": "Any host of the cluster; its certificate is signed by the cluster's own authority.",
            "variables": {"host": {"default": "localhost", "description": "A host's address"}},
        }],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "responses": {"Problem": {
                "description": "What is wrong, where, and what to do.",
                "content": {"application/problem+json": {"schema": problem}},
            }},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token made with `haven token create`.",
                },
                "host": {
                    "type": "mutualTLS",
                    "description": "A host's certificate; hosts are admins to each other.",
                },
            },
        },
    });
    sorted(document)
}

/// The same with all keys in order, whichever map serde_json was built with.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Value::Object(entries.into_iter().map(|(key, value)| (key, sorted(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut parameters: Vec<Value> =
        path_names(route.path).map(|n| path_parameter(route, n)).collect();
    if let Some(query) = route.query {
        parameters.extend(query_parameters(query, generator));
    }
    let (status, answer) = answer(route.gives, generator);
    let refers = |why: &str| json!({"$ref": "#/components/responses/Problem", "description": why});
    let mut operation = json!({
        "operationId": route.id,
        "summary": route.summary,
        "tags": [route.path.split('/').nth(2).unwrap_or_default()],
        "x-haven-role": route.role,
        "security": if route.role == Role::Anyone { json!([]) } else { json!([{"token": []}, {"host": []}]) },
        "parameters": parameters,
        "responses": {
            status: answer,
            "default": refers("What is wrong, where, and what to do."),
        },
    });
    if route.role > Role::Anyone {
        operation["responses"]["401"] = refers("No token, or one that is wrong or has expired.");
        operation["responses"]["403"] = refers("The token's role does not reach.");
    }
    if route.method != "GET" {
        let why =
            "It does not fit what there is now, or somebody else was quicker; nothing was changed.";
        operation["responses"]["409"] = refers(why);
    }
    if route.path.contains("{name}") {
        operation["responses"]["404"] = refers("There is no such thing.");
    }
    let body = match route.takes {
        Takes::Nothing => return operation,
        Takes::Json(schema) => json!({"application/json": {"schema": schema(generator)}}),
        Takes::Bytes => json!({"application/octet-stream": {}}),
    };
    if matches!(route.takes, Takes::Json(_)) {
        operation["responses"]["413"] = refers("The body is too large.");
        operation["responses"]["422"] = refers("The body says something that cannot be.");
    }
    operation["requestBody"] = json!({"required": true, "content": body});
    operation
}

fn answer(gives: Gives, generator: &mut SchemaGenerator) -> (&'static str, Value) {
    let with = |about: &str, media: &str, schema: Value| json!({"description": about, "content": {media: schema}});
    match gives {
        Gives::Nothing => ("204", json!({"description": "Done."})),
        Gives::Json(schema) => {
            ("200", with("Done.", "application/json", json!({"schema": schema(generator)})))
        }
        Gives::Bytes => ("200", with("The bytes.", "application/octet-stream", json!({}))),
        Gives::Events(schema) => {
            let event = json!({"schema": {"type": "string"}, "x-haven-data": schema(generator)});
            let about =
                "A stream that does not end; the data of each event is JSON, see `x-haven-data`.";
            ("200", with(about, "text/event-stream", event))
        }
        Gives::Upgrade => (
            "101",
            json!({"description": "From here on bytes go both ways (`Upgrade: haven-console`)."}),
        ),
    }
}

/// What stands in braces in a path.
pub(super) fn path_names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

fn path_parameter(route: &Route, name: &str) -> Value {
    let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
    let (schema, about) = match name {
        "kind" => (json!({"type": "string", "enum": kinds}), "the kind of the object"),
        "action" => (
            json!({"type": "string", "enum": ["start", "stop", "reset"]}),
            "what to do with the VM",
        ),
        "part" => (
            json!({"type": "string", "enum": ["disk", "kernel", "initrd"]}),
            "which part of the image the file is",
        ),
        "replicas" => {
            (json!({"type": "integer", "minimum": 0, "maximum": 500}), "how many members")
        }
        "sha256" => (
            json!({"type": "string", "pattern": "^[0-9a-f]{64}$"}),
            "SHA-256 of the file, lower-case hexadecimal",
        ),
        _ => (
            name_schema(),
            if route.id.ends_with("Token") { "the token's name" } else { "the name" },
        ),
    };
    json!({"name": name, "in": "path", "required": true, "description": about, "schema": schema})
}

fn name_schema() -> Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Name>();
    for unwanted in ["$schema", "title", "description"] {
        schema.remove(unwanted);
    }
    schema.to_value()
}

/// One parameter for every field of a type.
fn query_parameters(query: SchemaOf, generator: &mut SchemaGenerator) -> Vec<Value> {
    let schema = query(generator).to_value();
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let fields = schema["properties"].as_object().into_iter().flatten();
    let parameter = |(name, field): (&String, &Value)| {
        let mut field = field.clone();
        let about = field.as_object_mut().and_then(|field| field.remove("description"));
        // A parameter that may be left out is not `null` when it is.
        if let Some(first) = field["type"].as_array().and_then(|types| types.first().cloned()) {
            field["type"] = first;
        }
        json!({
            "name": name,
            "in": "query",
            "required": required.contains(&name.as_str()),
            "description": about,
            "schema": field,
        })
    };
    fields.map(parameter).collect()
}
