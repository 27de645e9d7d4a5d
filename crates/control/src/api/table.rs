//! Every route of the API in one table. The router, the roles and the API's description are made from it and from
//! nothing else, so that none of them can know a route that the others do not.

use super::{
    ApiState,
    auth::Role,
    cluster, migrations, routes,
    routes::{Following, ImportQuery, Latest, NewToken},
};
use axum::routing::{MethodRouter, delete, get, post, put};
use haven_model::{
    Event, Incident,
    api::{
        Applied, ApplyRequest, ClusterItem, Item, JoinAnswer, JoinRequest, MigrationAsked,
        MigrationView, Overview, Page, Secret, TokenLine, Version,
    },
    event::AuditEntry,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

/// Makes the schema of a type.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What a request carries.
#[derive(Clone, Copy)]
pub enum Takes {
    /// No body.
    Nothing,
    /// JSON.
    Json(SchemaOf),
    /// The bytes of a file.
    Bytes,
}

/// What the answer carries when all went well.
#[derive(Clone, Copy)]
pub enum Gives {
    /// 204, no body.
    Nothing,
    /// 200, JSON.
    Json(SchemaOf),
    /// 200, the bytes of a file.
    Bytes,
    /// 200, server-sent events, each with JSON as its data.
    Events(SchemaOf),
    /// 101, bytes both ways.
    Upgrade,
}

/// A route.
pub struct Route {
    /// GET, POST, PUT or DELETE.
    pub method: &'static str,
    /// Its path, with what varies in braces.
    pub path: &'static str,
    /// The least role that reaches it.
    pub role: Role,
    /// Its name for programs.
    pub id: &'static str,
    /// What it is for.
    pub summary: &'static str,
    /// Its query parameters: the fields of this type.
    pub query: Option<SchemaOf>,
    /// What a request carries.
    pub takes: Takes,
    /// What the answer carries.
    pub gives: Gives,
    /// What it does.
    pub handler: fn() -> MethodRouter<ApiState>,
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Query parameters stand one by one in the description, so their type is no component of it.
fn fields<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    T::json_schema(generator)
}

/// Every route.
pub const TABLE: &[Route] = &[
    Route {
        method: "GET",
        path: "/v1/version",
        role: Role::Anyone,
        id: "version",
        summary: "which Haven this is",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Version>),
        handler: || get(routes::version),
    },
    Route {
        method: "POST",
        path: "/v1/join",
        role: Role::Anyone,
        id: "join",
        summary: "a host becomes part of the cluster; its join token is checked",
        query: None,
        takes: Takes::Json(of::<JoinRequest>),
        gives: Gives::Json(of::<JoinAnswer>),
        handler: || post(routes::join),
    },
    Route {
        method: "GET",
        path: "/v1/status",
        role: Role::Viewer,
        id: "status",
        summary: "the cluster on one screen",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Overview>),
        handler: || get(routes::status),
    },
    Route {
        method: "GET",
        path: "/v1/cluster",
        role: Role::Viewer,
        id: "getCluster",
        summary: "the cluster's own spec: timers, fencing, voters",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<ClusterItem>),
        handler: || get(cluster::get),
    },
    Route {
        method: "PUT",
        path: "/v1/cluster",
        role: Role::Admin,
        id: "replaceCluster",
        summary: "replace the cluster's own spec at a version; new timers count without a restart",
        query: None,
        takes: Takes::Json(of::<ClusterItem>),
        gives: Gives::Json(of::<ClusterItem>),
        handler: || put(cluster::replace),
    },
    Route {
        method: "GET",
        path: "/v1/events",
        role: Role::Viewer,
        id: "events",
        summary: "the last events, a page at a time",
        query: Some(fields::<Latest>),
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Page<Event>>),
        handler: || get(routes::events),
    },
    Route {
        method: "GET",
        path: "/v1/events/follow",
        role: Role::Viewer,
        id: "followEvents",
        summary: "events as they come (server-sent; resumes with Last-Event-ID)",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Events(of::<Event>),
        handler: || get(routes::follow),
    },
    Route {
        method: "GET",
        path: "/v1/incidents",
        role: Role::Viewer,
        id: "incidents",
        summary: "the last incidents, a page at a time",
        query: Some(fields::<Latest>),
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Page<Incident>>),
        handler: || get(routes::incidents),
    },
    Route {
        method: "GET",
        path: "/v1/explain/{kind}/{name}",
        role: Role::Viewer,
        id: "explain",
        summary: "what there is to say of an object",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Vec<String>>),
        handler: || get(routes::explain),
    },
    Route {
        method: "GET",
        path: "/v1/audit",
        role: Role::Admin,
        id: "audit",
        summary: "who changed what, the last entries, a page at a time",
        query: Some(fields::<Latest>),
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Page<AuditEntry>>),
        handler: || get(routes::audit_log),
    },
    Route {
        method: "POST",
        path: "/v1/apply",
        role: Role::Operator,
        id: "apply",
        summary: "apply manifests: all of them or none",
        query: None,
        takes: Takes::Json(of::<ApplyRequest>),
        gives: Gives::Json(of::<Vec<Applied>>),
        handler: || post(routes::apply_files),
    },
    Route {
        method: "POST",
        path: "/v1/invite",
        role: Role::Admin,
        id: "invite",
        summary: "make a join token",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Secret>),
        handler: || post(routes::invite),
    },
    Route {
        method: "POST",
        path: "/v1/tokens/{name}",
        role: Role::Admin,
        id: "makeToken",
        summary: "make a token",
        query: Some(fields::<NewToken>),
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Secret>),
        handler: || post(routes::new_token),
    },
    Route {
        method: "GET",
        path: "/v1/tokens",
        role: Role::Admin,
        id: "listTokens",
        summary: "list tokens, without their secrets, in order of their names, a page at a time",
        query: Some(fields::<Following>),
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Page<TokenLine>>),
        handler: || get(routes::tokens),
    },
    Route {
        method: "DELETE",
        path: "/v1/tokens/{name}",
        role: Role::Admin,
        id: "endToken",
        summary: "end a token",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Nothing,
        handler: || delete(routes::end_token),
    },
    Route {
        method: "PUT",
        path: "/v1/import/{name}/{part}",
        role: Role::Operator,
        id: "importImage",
        summary: "import a file of an image",
        query: Some(fields::<ImportQuery>),
        takes: Takes::Bytes,
        gives: Gives::Json(of::<Item>),
        handler: || put(routes::import),
    },
    Route {
        method: "GET",
        path: "/v1/blobs/{sha256}",
        role: Role::Admin,
        id: "blob",
        summary: "a file of an image (for hosts)",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Bytes,
        handler: || get(routes::blob),
    },
    Route {
        method: "GET",
        path: "/v1/objects/{kind}",
        role: Role::Viewer,
        id: "listObjects",
        summary: "list objects, in order of their names, a page at a time",
        query: Some(fields::<Following>),
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Page<Item>>),
        handler: || get(routes::list),
    },
    Route {
        method: "GET",
        path: "/v1/objects/{kind}/{name}",
        role: Role::Viewer,
        id: "getObject",
        summary: "one object",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Item>),
        handler: || get(routes::one),
    },
    Route {
        method: "PUT",
        path: "/v1/objects/{kind}/{name}",
        role: Role::Operator,
        id: "replaceObject",
        summary: "replace an object at a version, or create one at version 0",
        query: None,
        takes: Takes::Json(of::<Item>),
        gives: Gives::Json(of::<Item>),
        handler: || put(routes::replace),
    },
    Route {
        method: "DELETE",
        path: "/v1/objects/{kind}/{name}",
        role: Role::Operator,
        id: "deleteObject",
        summary: "delete an object",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Item>),
        handler: || delete(routes::remove),
    },
    Route {
        method: "POST",
        path: "/v1/vms/{name}/{action}",
        role: Role::Operator,
        id: "actOnVm",
        summary: "start, stop or reset a VM",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Item>),
        handler: || post(routes::act),
    },
    Route {
        method: "POST",
        path: "/v1/vms/{name}/migration",
        role: Role::Operator,
        id: "migrateVm",
        summary: "move a VM to another host while it runs",
        query: None,
        takes: Takes::Json(of::<MigrationAsked>),
        gives: Gives::Json(of::<MigrationView>),
        handler: || post(migrations::migrate),
    },
    Route {
        method: "GET",
        path: "/v1/vms/{name}/migration",
        role: Role::Viewer,
        id: "vmMigration",
        summary: "how the last live migration of a VM stands",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<MigrationView>),
        handler: || get(migrations::show),
    },
    Route {
        method: "DELETE",
        path: "/v1/vms/{name}/migration",
        role: Role::Operator,
        id: "cancelMigration",
        summary: "take a live migration back, as long as the owner has not changed",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<MigrationView>),
        handler: || delete(migrations::cancel),
    },
    Route {
        method: "GET",
        path: "/v1/vms/{name}/incoming",
        role: Role::Admin,
        id: "vmIncoming",
        summary: "the way in for a guest that its owner sends here (upgrade; hosts only)",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Upgrade,
        handler: || get(migrations::incoming),
    },
    Route {
        method: "GET",
        path: "/v1/vms/{name}/console",
        role: Role::Operator,
        id: "vmConsole",
        summary: "a VM's console (upgrade)",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Upgrade,
        handler: || get(routes::console),
    },
    Route {
        method: "GET",
        path: "/v1/vms/{name}/log",
        role: Role::Viewer,
        id: "vmLog",
        summary: "what a VM's console said",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Bytes,
        handler: || get(routes::log),
    },
    Route {
        method: "POST",
        path: "/v1/services/{name}/scale/{replicas}",
        role: Role::Operator,
        id: "scaleService",
        summary: "change the number of members",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Item>),
        handler: || post(routes::scale),
    },
    Route {
        method: "POST",
        path: "/v1/services/{name}/restart",
        role: Role::Operator,
        id: "restartService",
        summary: "replace all members, a few at a time",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Item>),
        handler: || post(routes::restart),
    },
    Route {
        method: "POST",
        path: "/v1/services/{name}/promote",
        role: Role::Operator,
        id: "promoteService",
        summary: "let the new members of a canary or blue-green update into the whole service",
        query: None,
        takes: Takes::Nothing,
        gives: Gives::Json(of::<Item>),
        handler: || post(routes::promote),
    },
];
