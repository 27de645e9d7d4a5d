//! For tests of the API: one host with a real etcd on loopback, the live copy and the router. Every answer that a test
//! gets is compared with the API's description.

use super::{
    ApiState, InviteFacts, LocalHost,
    auth::{Role, make_token},
    openapi::document,
    routes::router,
    serve::{Duplex, MakeCaller, answer},
    table,
};
use crate::manager::{effects::Power, promises::Promises};
use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{StatusCode, header},
};
use haven_model::{
    Bytes, Name, Object, Observations, PoolSpec, PowerProblem, PowerSpec, PowerState, RbdSpec,
    Snapshot,
    api::{BackupFiles, BackupList, JoinAnswer, JoinRequest},
    backup::Backup,
    image::ImageFile,
    keys,
    volume::VolumeRef,
};
use haven_store::{
    clock::Clock,
    contact::Contact,
    live::{LiveConfig, LiveCopy},
    pki::{Authority, PkiDir},
    raw::{EtcdStore, Op, StoreConfig},
    seal::ClusterKey,
    server::{MemberConfig, command},
};
use http_body_util::BodyExt;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Child,
    sync::watch,
};
use tokio_util::sync::CancellationToken;

/// An etcd of one test; it ends with it.
struct Etcd {
    child: Child,
    url: String,
    _data: tempfile::TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        // Its directory goes next, so it must be gone.
        while matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Etcd {
    /// The command that a host runs, with all its limits and timers; only addresses and certificates are the test's
    /// own. Of a flag that is given twice etcd takes the second.
    fn start() -> Option<Self> {
        let data = tempfile::tempdir().unwrap();
        let [url, peer] = [(), ()].map(|()| format!("http://127.0.0.1:{}", free_port()));
        let mut command = command(&MemberConfig {
            name: "host1".into(),
            address: Ipv4Addr::LOCALHOST,
            data: data.path().join("data"),
            log: data.path().join("log"),
            pki: PkiDir(data.path().join("pki")),
            initial_cluster: format!("host1={peer}"),
            existing: false,
        });
        command
            .arg(format!("--listen-client-urls={url}"))
            .arg(format!("--advertise-client-urls={url}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .args(["--cert-file=", "--key-file=", "--trusted-ca-file=", "--client-cert-auth=false"])
            .args(["--peer-cert-file=", "--peer-key-file=", "--peer-trusted-ca-file="])
            .arg("--peer-client-cert-auth=false")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        match command.spawn() {
            Ok(child) => Some(Self { child, url, _data: data }),
            Err(_) => {
                println!("skipped: needs etcd");
                None
            }
        }
    }

    /// Nothing when it ended at once: somebody else took its port in between.
    async fn store(&mut self) -> Option<EtcdStore> {
        let config = StoreConfig { endpoints: vec![self.url.clone()], tls: None };
        let store = EtcdStore::connect(config).await.unwrap();
        let begin = Instant::now();
        while let Err(error) = store.get("ready").await {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return None;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "etcd does not answer: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Some(store)
    }
}

async fn etcd() -> Option<(Etcd, EtcdStore)> {
    for _ in 0..5 {
        let mut etcd = Etcd::start()?;
        if let Some(store) = etcd.store().await {
            return Some((etcd, store));
        }
    }
    panic!("etcd ended 5 times as soon as it was started");
}

/// What every target holds: a backup of a VM that was there once.
fn kept(vm: &str) -> Backup {
    serde_json::from_value(serde_json::json!({
        "id": "20261130T021500Z", "vm": vm, "vmUid": "u-1", "atMs": 1, "endedMs": 2, "by": "schedule",
        "moment": "running", "object": {
            "labels": {"app": "shop"},
            "spec": {"memory": "256MiB", "disks": [{"name": "root", "size": "1GiB", "pool": "local", "image": "tiny"}]},
        },
        "disks": [{"name": "root", "size": "1GiB", "index": "", "used": "0B", "read": "0B", "stored": "0B"}],
    }))
    .unwrap()
}

/// A host on which nothing runs, and which takes in every file and every host.
struct Nothing;

#[async_trait]
impl LocalHost for Nothing {
    async fn import(
        &self,
        mut from: Box<dyn AsyncRead + Send + Unpin>,
        _: Option<String>,
    ) -> Result<ImageFile, String> {
        let mut file = Vec::new();
        from.read_to_end(&mut file).await.map_err(|error| error.to_string())?;
        if file.is_empty() {
            return Err("the file is empty".into());
        }
        Ok(ImageFile { sha256: "0".repeat(64), size: Bytes(file.len() as u64) })
    }
    async fn disk_format(&self, _: &ImageFile) -> Result<String, String> {
        Ok("raw".into())
    }
    async fn pieces(&self, _: &VolumeRef, _: u64, count: u64) -> Result<Vec<u8>, String> {
        Ok(vec![0; usize::try_from(count * 32).unwrap_or(0)])
    }
    async fn kept(&self, _: &VolumeRef, _: &str, _: &str, _: u64) -> Result<Vec<u8>, String> {
        Ok(vec![0; 16])
    }
    async fn check_ceph(&self, _: &Name, rbd: &RbdSpec) -> Result<String, String> {
        match rbd.pool.as_str() {
            "nopool" => Err("Ceph has no pool nopool; correct `pool`, or make it".into()),
            _ => {
                Ok(if rbd.monitors.iter().any(|at| at.contains("elsewhere")) { "f2" } else { "f1" }
                    .into())
            }
        }
    }
    async fn check_filer(&self, pool: &PoolSpec, _: bool) -> Result<String, String> {
        let at = pool.place();
        match at.contains("nowhere") {
            true => Err(format!("nobody answers at {at}; correct it")),
            false => Ok(at.split(" of ").next().unwrap_or_default().replace('/', "-")),
        }
    }
    async fn mark_target(&self, _: &Name) -> Result<(), String> {
        Ok(())
    }
    async fn backups(&self, _: &Name, vm: Option<&Name>) -> Result<BackupList, String> {
        let mut list = BackupList { backups: vec![kept("old")], unreadable: Vec::new() };
        list.backups.retain(|backup| vm.is_none_or(|vm| backup.vm == *vm));
        Ok(list)
    }
    async fn backup_files(
        &self,
        _: &Name,
        _: &Name,
        _: &str,
        _: Option<&str>,
    ) -> Result<BackupFiles, String> {
        Ok(BackupFiles::default())
    }
    async fn backup_file(
        &self,
        _: &Name,
        _: &Name,
        _: &str,
        at: &str,
    ) -> Result<(u64, Box<dyn AsyncRead + Send + Unpin>), String> {
        match at.strip_prefix("root:/etc/") {
            Some(_) => Ok((4, Box::new(&b"once"[..]))),
            None => Err(format!("`{at}` is no place of a file")),
        }
    }
    async fn remove_backup(&self, _: &Name, _: &Name, _: &str) -> Result<(), String> {
        Ok(())
    }
    fn blob(&self, _: &str) -> Option<PathBuf> {
        None
    }
    fn console(&self, vm: &str) -> PathBuf {
        PathBuf::from("/nonexistent").join(vm)
    }
    fn log(&self, vm: &str) -> PathBuf {
        PathBuf::from("/nonexistent").join(vm)
    }
    fn disks_in(&self, _vm: &str) -> Option<std::path::PathBuf> {
        None
    }
    fn way_in(&self, vm: &str) -> Result<Box<dyn super::serve::Duplex>, String> {
        Err(format!("no process waits for {vm}"))
    }
    async fn admit(&self, request: &JoinRequest) -> Result<JoinAnswer, String> {
        Ok(JoinAnswer {
            certificate: format!("PEM for {}", request.host),
            ca: "PEM".into(),
            ca_key: "PEM".into(),
            heartbeat_key: "00".into(),
            endpoints: vec!["https://10.0.0.1:7379".into()],
        })
    }
    async fn relay(&self, _: Ipv4Addr, _: &str) -> Result<Box<dyn Duplex>, String> {
        Err("there is no other host".into())
    }
    async fn fetch(&self, _: Ipv4Addr, _: &str) -> Result<Vec<u8>, String> {
        Err("there is no other host".into())
    }
}

#[async_trait]
impl Power for Nothing {
    async fn state(&self, _: &Name, power: &PowerSpec) -> Result<PowerState, PowerProblem> {
        match power.user.as_str() {
            "nobody" => Err(PowerProblem { message: "no such user".into(), hint: "ask".into() }),
            _ => Ok(PowerState::On),
        }
    }
    async fn off(&self, _: &Name, _: &PowerSpec) -> Result<(), PowerProblem> {
        panic!("the API switches nothing off")
    }
}

/// The API of one host, until it is dropped.
pub struct World {
    /// What the API stands on.
    pub state: ApiState,
    app: Router,
    tokens: BTreeMap<Role, String>,
    document: Value,
    cancel: CancellationToken,
    _etcd: Option<Etcd>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body; null when it is empty or no JSON.
    pub body: Value,
}

impl Answer {
    /// The body of an answer that went well.
    pub fn ok(self) -> Value {
        assert!(self.status.is_success(), "{}: {}", self.status, self.body);
        self.body
    }
}

impl World {
    /// Nothing when the machine has no etcd; then it has said so.
    pub async fn start() -> Option<Self> {
        let (etcd, store) = etcd().await?;
        let cancel = CancellationToken::new();
        let config = LiveConfig {
            prefix: keys::ROOT.into(),
            observed: vec![keys::LEASES.into(), keys::MANAGER.into()],
        };
        let live =
            LiveCopy::<Snapshot>::spawn(store.clone(), config, Clock::real(), cancel.clone());
        let state = ApiState {
            me: name("host1"),
            store,
            live: live.state(),
            seen: Arc::new(Observations::default),
            promises: Promises::new(Clock::real(), Contact::new(Clock::real())),
            local: Arc::new(Nothing),
            power: Arc::new(Nothing),
            secrets: Some(ClusterKey::derive(&Authority::create("test").unwrap()).unwrap()),
            invite: Arc::new(InviteFacts { fingerprint: "f".repeat(64) }),
        };
        let mut tokens = BTreeMap::new();
        for role in [Role::Viewer, Role::Operator, Role::Admin] {
            let of = name(&format!("{role:?}").to_lowercase());
            let (token, _) = make_token(&state, &of, role, false, 3_600_000).await.unwrap();
            tokens.insert(role, token);
        }
        let app = router(state.clone());
        Some(Self { state, app, tokens, document: document(), cancel, _etcd: Some(etcd) })
    }

    /// Another host on the same store, with a copy of its own that somebody else keeps current or not.
    pub fn with_copy(&self, live: watch::Receiver<Arc<Snapshot>>) -> Self {
        let state = ApiState { live, ..self.state.clone() };
        let (tokens, document) = (self.tokens.clone(), self.document.clone());
        let app = router(state.clone());
        Self { state, app, tokens, document, cancel: CancellationToken::new(), _etcd: None }
    }

    /// Another host on the same store, with another key of secrets or none.
    pub fn with_secrets(&self, secrets: Option<ClusterKey>) -> Self {
        let mut other = self.with_copy(self.state.live.clone());
        other.state.secrets = secrets;
        other.app = router(other.state.clone());
        other
    }

    /// What ends this world's tasks.
    pub fn cancel(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// The token of somebody with a role.
    pub fn token(&self, role: Role) -> Option<&str> {
        self.tokens.get(&role).map(String::as_str)
    }

    /// Asks as somebody from afar, with or without a token.
    pub async fn ask(
        &self,
        token: Option<&str>,
        method: &str,
        path: &str,
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let from = "192.0.2.7".to_owned();
        let make = MakeCaller::Remote { state: self.state.clone(), from, host: None };
        let response = answer(&self.app, &make, request.body(body.into()).unwrap()).await;
        let (parts, body) = response.into_parts();
        let media = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let media = media.unwrap_or_default().to_owned();
        let bytes = if media == "text/event-stream" {
            Default::default()
        } else {
            body.collect().await.unwrap().to_bytes()
        };
        let body = serde_json::from_slice(&bytes).unwrap_or_default();
        self.compare(method, path, parts.status, &media, &body);
        Answer { status: parts.status, body }
    }

    /// Asks as an operator.
    pub async fn operate(&self, method: &str, path: &str, body: impl Into<Body>) -> Answer {
        self.ask(self.token(Role::Operator), method, path, body).await
    }

    /// Applies a manifest as an operator.
    pub async fn apply(&self, text: &str) -> Answer {
        let files = serde_json::json!({"files": [{"name": "test.yaml", "text": text}]});
        self.operate("POST", "/v1/apply", files.to_string()).await
    }

    /// Writes an object as the manager would.
    pub async fn put(&self, object: &Object) {
        let op = Op::Put(keys::object(&object.reference()), object.to_store().into());
        self.state.store.txn(vec![], vec![op]).await.unwrap();
    }

    /// Makes hosts, as `haven join` does.
    pub async fn hosts(&self, names: &[&str]) {
        for host in names {
            let meta = haven_model::Meta::new(name(host), format!("u-{host}"), 1);
            let spec = serde_json::from_value(serde_json::json!({"address": "10.88.0.1"})).unwrap();
            self.put(&Object::Host(haven_model::object::Stored { meta, spec })).await;
        }
    }

    /// They say that they understand all that this version does.
    pub async fn speak(&self, names: &[&str]) {
        self.speak_up_to(names, haven_model::host::SPEAKS).await;
    }

    /// They say that they understand so much.
    pub async fn speak_up_to(&self, names: &[&str], speaks: u32) {
        for host in names {
            let status = serde_json::json!({
                "session": 1, "speaks": speaks, "cpus": 8, "memory": "16GiB",
            });
            let put = Op::Put(keys::host_status(&name(host)), status.to_string().into());
            self.state.store.txn(vec![], vec![put]).await.unwrap();
        }
    }

    /// An answer must be what the description says.
    fn compare(&self, method: &str, path: &str, status: StatusCode, media: &str, body: &Value) {
        let what = format!("{method} {path} gave {status} {body}");
        if !status.is_success() && status != StatusCode::SWITCHING_PROTOCOLS {
            assert_eq!(media, "application/problem+json", "{what}");
            let schema = &self.document["components"]["schemas"]["ProblemBody"];
            conforms(&self.document, schema, body).unwrap_or_else(|why| panic!("{what}: {why}"));
            assert_eq!(body["status"], status.as_u16(), "{what}");
            let said = |field: &str| body[field].as_str().is_some_and(|text| !text.is_empty());
            assert!(said("detail"), "{what}: it does not say what is wrong");
            assert!(said("hint"), "{what}: no hint what to do");
            return;
        }
        let asked = path.split('?').next().unwrap_or_default();
        let fits = |pattern: &str| {
            let (a, b) = (pattern.split('/'), asked.split('/'));
            a.clone().count() == b.clone().count()
                && a.zip(b).all(|(a, b)| a == b || a.starts_with('{'))
        };
        // Of those that fit the one with the fewest braces, as the router takes it.
        let fitting = table::all().filter(|r| r.method == method && fits(r.path));
        let route = fitting.min_by_key(|r| r.path.matches('{').count());
        let route = route.unwrap_or_else(|| panic!("{what}, and it is not in the table"));
        let operation = &self.document["paths"][route.path][method.to_ascii_lowercase()];
        let described = &operation["responses"][status.as_str()];
        assert!(described.is_object(), "{what}: this status is not described");
        if let Some(described) = described["content"].as_object() {
            assert!(described.contains_key(media), "{what}: {media} is not described");
            let schema = &described[media]["schema"];
            if media == "application/json" {
                conforms(&self.document, schema, body)
                    .unwrap_or_else(|why| panic!("{what}: {why}"));
            }
        }
    }
}

/// A name.
pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Whether a value is as a schema says; knows the words that schemars writes.
pub fn conforms(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(to) = schema["$ref"].as_str() {
        let target = document.pointer(to.trim_start_matches('#')).ok_or("a dead reference")?;
        conforms(document, target, value)?;
    }
    let all = |list: &Value| -> Vec<Result<(), String>> {
        list.as_array().into_iter().flatten().map(|s| conforms(document, s, value)).collect()
    };
    all(&schema["allOf"]).into_iter().collect::<Result<(), _>>()?;
    for choice in ["anyOf", "oneOf"] {
        let results = all(&schema[choice]);
        if !results.is_empty() && results.iter().all(Result::is_err) {
            return Err(format!("{value} is none of {choice}: {results:?}"));
        }
    }
    if schema.get("const").is_some_and(|wanted| wanted != value) {
        return Err(format!("{value} is not {}", schema["const"]));
    }
    if schema["enum"].as_array().is_some_and(|of| !of.contains(value)) {
        return Err(format!("{value} is none of {}", schema["enum"]));
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    let is = |of: &Value| match of.as_str().unwrap_or_default() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "null" => value.is_null(),
        _ => value.is_number(),
    };
    if !types.is_empty() && !types.iter().any(is) {
        return Err(format!("{value} is not of type {}", schema["type"]));
    }
    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
        let schema = schema["prefixItems"].get(i).unwrap_or(&schema["items"]);
        conforms(document, schema, item)?;
    }
    fields(document, schema, value)
}

fn fields(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let Some(given) = value.as_object() else { return Ok(()) };
    for wanted in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        given.get(wanted).ok_or_else(|| format!("`{wanted}` is missing in {value}"))?;
    }
    // The only pattern of fields that schemars writes here is that of names.
    let by_name = schema["patternProperties"].as_object().and_then(|of| of.values().next());
    for (field, value) in given {
        let named = by_name.filter(|_| Name::new(field.as_str()).is_ok());
        match schema["properties"].get(field).or(named) {
            Some(schema) => conforms(document, schema, value)?,
            None if schema["additionalProperties"] == false => {
                return Err(format!("`{field}` is not described"));
            }
            None => conforms(document, &schema["additionalProperties"], value)?,
        }
    }
    Ok(())
}
