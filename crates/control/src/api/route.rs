//! What there is to say of one route.

use super::{ApiState, auth::Role};
use axum::routing::MethodRouter;
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

/// The schema of this type, by its name.
pub(super) fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Query parameters stand one by one in the description, so their type is no component of it.
pub(super) fn fields<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    T::json_schema(generator)
}
