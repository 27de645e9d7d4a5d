//! What all objects that people write have in common.

use crate::{
    backup::TargetSpec,
    certificate::{CertificateSpec, SEALED},
    error::ModelError,
    host::HostSpec,
    image::ImageSpec,
    name::Name,
    name::ObjectRef,
    network::NetworkSpec,
    pool::PoolSpec,
    service::ServiceSpec,
    tolerant,
    vm::VmSpec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{collections::BTreeMap, fmt, sync::Arc};

/// The kinds of objects that people write.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Kind {
    /// A server of the cluster.
    Host,
    /// Where volumes live.
    Pool,
    /// What disks are made from.
    Image,
    /// What VMs are plugged into.
    Network,
    /// What a frontend proves itself with.
    Certificate,
    /// Where backups go.
    Target,
    /// A virtual machine.
    #[serde(rename = "VM")]
    Vm,
    /// N like VMs behind an address.
    Service,
}

impl Kind {
    /// All kinds, in the order in which they must exist for one another.
    pub const ALL: [Kind; 8] = [
        Kind::Host,
        Kind::Pool,
        Kind::Image,
        Kind::Network,
        Kind::Certificate,
        Kind::Target,
        Kind::Vm,
        Kind::Service,
    ];

    /// The kind as it stands in references and keys.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Host => "host",
            Kind::Pool => "pool",
            Kind::Image => "image",
            Kind::Network => "network",
            Kind::Certificate => "certificate",
            Kind::Target => "target",
            Kind::Vm => "vm",
            Kind::Service => "service",
        }
    }
}
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
impl std::str::FromStr for Kind {
    type Err = ModelError;
    /// Accepts `vm`, `VM`, `vms`, `Service`, `services` and so on.
    fn from_str(text: &str) -> Result<Self, ModelError> {
        let lower = text.to_ascii_lowercase();
        let singular = lower.strip_suffix('s').unwrap_or(&lower);
        Kind::ALL
            .into_iter()
            .find(|kind| kind.as_str() == lower || kind.as_str() == singular)
            .ok_or_else(|| ModelError::BadKind { text: text.to_owned() })
    }
}

/// What the cluster keeps about every object beside its spec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// Its name, unique within its kind.
    pub name: Name,
    /// Told apart from an object of the same name that was deleted. UUID version 7.
    pub uid: String,
    /// Counts changes of the spec, from 1.
    pub generation: u64,
    /// Free words for selection and spread rules.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Who made it: the service, for a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<ObjectRef>,
    /// Set when somebody deleted it; it ends when nothing of it is left.
    #[serde(default, skip_serializing_if = "is_false")]
    pub deleting: bool,
    /// When it was made, wall clock, milliseconds since 1970.
    #[serde(default)]
    pub created_ms: i64,
    /// The whole record, when a newer version wrote fields into it that this one does not know: they are kept when the
    /// object is written again.
    #[serde(skip)]
    pub whole: Option<Arc<Value>>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

impl Meta {
    /// The meta of a new object.
    #[must_use]
    pub fn new(name: Name, uid: String, created_ms: i64) -> Self {
        Self {
            name,
            uid,
            generation: 1,
            labels: BTreeMap::new(),
            owner: None,
            deleting: false,
            created_ms,
            whole: None,
        }
    }

    /// The service that this is a member of, if any.
    #[must_use]
    pub fn member_of(&self) -> Option<&ObjectRef> {
        self.owner.as_ref().filter(|owner| owner.kind == Kind::Service)
    }
}

/// A spec with its meta: what stands in the store under one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Stored{T}")]
pub struct Stored<T> {
    /// Common to all kinds.
    pub meta: Meta,
    /// What is wanted.
    pub spec: T,
}

impl<T: Serialize + DeserializeOwned> Stored<T> {
    fn to_store(&self) -> Result<Vec<u8>, serde_json::Error> {
        let Some(whole) = &self.meta.whole else { return serde_json::to_vec(self) };
        let known: Self = tolerant::read(&serde_json::to_vec(whole)?)?;
        let mut now = serde_json::to_value(self)?;
        tolerant::put_back(&mut now, whole, &serde_json::to_value(known)?);
        serde_json::to_vec(&now)
    }
}

/// An object of any kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind")]
pub enum Object {
    /// A server of the cluster.
    Host(Stored<HostSpec>),
    /// Where volumes live.
    Pool(Stored<PoolSpec>),
    /// What disks are made from.
    Image(Stored<ImageSpec>),
    /// What VMs are plugged into.
    Network(Stored<NetworkSpec>),
    /// What a frontend proves itself with.
    Certificate(Stored<CertificateSpec>),
    /// Where backups go.
    Target(Stored<TargetSpec>),
    /// A virtual machine.
    #[serde(rename = "VM")]
    Vm(Stored<VmSpec>),
    /// N like VMs behind an address.
    Service(Stored<ServiceSpec>),
}

/// Runs the same expression on the inner `Stored<_>` of every variant.
macro_rules! each {
    ($object:expr, $inner:ident => $body:expr) => {
        match $object {
            Object::Host($inner) => $body,
            Object::Pool($inner) => $body,
            Object::Image($inner) => $body,
            Object::Network($inner) => $body,
            Object::Certificate($inner) => $body,
            Object::Target($inner) => $body,
            Object::Vm($inner) => $body,
            Object::Service($inner) => $body,
        }
    };
}

impl Object {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Object::Host(_) => Kind::Host,
            Object::Pool(_) => Kind::Pool,
            Object::Image(_) => Kind::Image,
            Object::Network(_) => Kind::Network,
            Object::Certificate(_) => Kind::Certificate,
            Object::Target(_) => Kind::Target,
            Object::Vm(_) => Kind::Vm,
            Object::Service(_) => Kind::Service,
        }
    }
    /// Its meta.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        each!(self, stored => &stored.meta)
    }
    /// Its meta, to change.
    pub fn meta_mut(&mut self) -> &mut Meta {
        each!(self, stored => &mut stored.meta)
    }
    /// `kind/name`.
    #[must_use]
    pub fn reference(&self) -> ObjectRef {
        ObjectRef::new(self.kind(), self.meta().name.clone())
    }
    /// The JSON that stands in the store: meta and spec, and what a newer version wrote that this one does not know.
    ///
    /// # Panics
    /// Never: specs hold only values that JSON can express.
    #[must_use]
    pub fn to_store(&self) -> Vec<u8> {
        each!(self, stored => stored.to_store()).expect("specs are plain data")
    }
    /// The object as people may see it: where a secret stands it says [`SEALED`].
    #[must_use]
    pub fn without_secrets(mut self) -> Self {
        match &mut self {
            Object::Certificate(certificate) => certificate.spec.key = SEALED.into(),
            Object::Target(target) => {
                if let Some(s3) = &mut target.spec.s3 {
                    s3.secret_key = SEALED.into();
                }
            }
            Object::Pool(pool) => {
                if let Some(rbd) = &mut pool.spec.rbd {
                    rbd.key = SEALED.into();
                }
            }
            Object::Host(host) => {
                if let Some(power) = &mut host.spec.power
                    && !power.password.is_empty()
                {
                    power.password = SEALED.into();
                }
            }
            _ => {}
        }
        self
    }
    /// Whether two objects want the same, whatever their generations.
    #[must_use]
    pub fn same_spec(&self, other: &Object) -> bool {
        let labels = self.meta().labels == other.meta().labels;
        labels
            && match (self, other) {
                (Object::Host(a), Object::Host(b)) => a.spec == b.spec,
                (Object::Pool(a), Object::Pool(b)) => a.spec == b.spec,
                (Object::Image(a), Object::Image(b)) => a.spec == b.spec,
                (Object::Network(a), Object::Network(b)) => a.spec == b.spec,
                (Object::Certificate(a), Object::Certificate(b)) => a.spec == b.spec,
                (Object::Target(a), Object::Target(b)) => a.spec == b.spec,
                (Object::Vm(a), Object::Vm(b)) => a.spec == b.spec,
                (Object::Service(a), Object::Service(b)) => a.spec == b.spec,
                _ => false,
            }
    }
}
