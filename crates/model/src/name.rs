//! Names of objects and references to them.

use crate::{error::ModelError, object::Kind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The name of an object: a DNS label of at most 40 characters, so that it can be a guest's host name and, with a
/// suffix for service members, still is one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(
    with = "String",
    extend("pattern" = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "minLength" = 1, "maxLength" = NAME_MAX)
)]
pub struct Name(String);

/// The longest name allowed, in characters.
pub const NAME_MAX: usize = 40;

impl Name {
    /// Checks and makes a name.
    ///
    /// # Errors
    /// [`ModelError::BadName`] when it is empty, too long, or not a lower-case DNS label.
    pub fn new(text: impl Into<String>) -> Result<Self, ModelError> {
        let text = text.into();
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let ends_well = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if text.len() <= NAME_MAX
            && text.chars().all(allowed)
            && ends_well(text.chars().next())
            && ends_well(text.chars().last())
        {
            Ok(Self(text))
        } else {
            Err(ModelError::BadName { name: text })
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}
impl TryFrom<String> for Name {
    type Error = ModelError;
    fn try_from(text: String) -> Result<Self, ModelError> {
        Self::new(text)
    }
}
impl std::str::FromStr for Name {
    type Err = ModelError;
    fn from_str(text: &str) -> Result<Self, ModelError> {
        Self::new(text)
    }
}
impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// One object, written `kind/name` everywhere a person reads it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[A-Za-z]+/[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
pub struct ObjectRef {
    /// What kind of object.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
}

impl ObjectRef {
    /// Makes a reference.
    #[must_use]
    pub fn new(kind: Kind, name: Name) -> Self {
        Self { kind, name }
    }
}
impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.kind, self.name))
    }
}
impl fmt::Debug for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
impl From<ObjectRef> for String {
    fn from(object: ObjectRef) -> Self {
        object.to_string()
    }
}
impl TryFrom<String> for ObjectRef {
    type Error = ModelError;
    fn try_from(text: String) -> Result<Self, ModelError> {
        text.parse()
    }
}
impl std::str::FromStr for ObjectRef {
    type Err = ModelError;
    fn from_str(text: &str) -> Result<Self, ModelError> {
        let bad = || ModelError::BadReference { text: text.to_owned() };
        let (kind, name) = text.split_once('/').ok_or_else(bad)?;
        Ok(Self { kind: kind.parse()?, name: Name::new(name)? })
    }
}
