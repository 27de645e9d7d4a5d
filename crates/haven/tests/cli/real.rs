//! The command line against the real API over a real etcd. No manager and no agent: nothing is ever started.

use crate::{Ended, Person};
use async_trait::async_trait;
use haven_control::{
    api::{ApiState, InviteFacts, LocalHost, serve},
    manager::{effects::Power, promises::Promises},
};
use haven_model::{
    Bytes, HostSpec, Meta, Name, Object, ObjectRef, PowerProblem, PowerSpec, PowerState, Snapshot,
    api::{BackupFiles, BackupList, JoinAnswer, JoinRequest},
    image::ImageFile,
    keys,
    object::{Kind, Stored},
    volume::VolumeRef,
};
use haven_store::{
    clock::Clock,
    contact::Contact,
    live::{LiveConfig, LiveCopy},
    pki::{self, Authority},
    raw::{EtcdStore, Identity, Op, StoreConfig},
    seal::ClusterKey,
};
use sha2::{Digest, Sha256};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_util::sync::CancellationToken;

/// A host that takes in images and has nothing else.
struct OnlyImages;

#[async_trait]
impl LocalHost for OnlyImages {
    async fn import(
        &self,
        mut from: Box<dyn AsyncRead + Send + Unpin>,
        expected: Option<String>,
    ) -> Result<ImageFile, String> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).await.map_err(|error| error.to_string())?;
        let sha256: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        match expected {
            Some(other) if other != sha256 => Err(format!("{sha256} is not {other}")),
            _ => Ok(ImageFile { sha256, size: Bytes(bytes.len() as u64) }),
        }
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
    async fn check_ceph(&self, _: &Name, _: &haven_model::RbdSpec) -> Result<String, String> {
        Err("there is no Ceph cluster in tests of the command line".into())
    }
    async fn check_filer(&self, _: &haven_model::PoolSpec, _: bool) -> Result<String, String> {
        Err("there is no filer in tests of the command line".into())
    }
    async fn mark_target(&self, _: &Name) -> Result<(), String> {
        Ok(())
    }
    async fn backups(&self, _: &Name, _: Option<&Name>) -> Result<BackupList, String> {
        Ok(BackupList::default())
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
    fn console(&self, _: &str) -> PathBuf {
        "/nowhere".into()
    }
    fn log(&self, _: &str) -> PathBuf {
        "/nowhere".into()
    }
    fn disks_in(&self, _: &str) -> Option<PathBuf> {
        None
    }
    fn way_in(&self, vm: &str) -> Result<Box<dyn haven_control::api::serve::Duplex>, String> {
        Err(format!("no process waits for {vm}"))
    }
    async fn admit(&self, _: &JoinRequest) -> Result<JoinAnswer, String> {
        Err("not here".into())
    }
    async fn relay(&self, _: Ipv4Addr, _: &str) -> Result<Box<dyn serve::Duplex>, String> {
        Err("not here".into())
    }
    async fn fetch(&self, _: Ipv4Addr, _: &str) -> Result<Vec<u8>, String> {
        Err("not here".into())
    }
}

#[async_trait]
impl Power for OnlyImages {
    async fn state(&self, _: &Name, _: &PowerSpec) -> Result<PowerState, PowerProblem> {
        Err(PowerProblem { message: "not here".into(), hint: "elsewhere".into() })
    }
    async fn off(&self, _: &Name, _: &PowerSpec) -> Result<(), PowerProblem> {
        Err(PowerProblem { message: "not here".into(), hint: "elsewhere".into() })
    }
}

/// An etcd with the API over it.
pub struct Api {
    etcd: Child,
    directory: TempDir,
    far: Far,
    _runtime: tokio::runtime::Runtime,
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.etcd.kill();
        let _ = self.etcd.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn etcd(directory: &TempDir) -> (Child, String) {
    let url = || format!("http://127.0.0.1:{}", free_port());
    let (client, peer) = (url(), url());
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.path().join("etcd"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (child, client)
}

/// What a person far away needs to know.
struct Far {
    address: String,
    fingerprint: String,
}

/// The API for people far away, with a cluster's certificates.
fn serve_far(api: ApiState, cancel: CancellationToken) -> Far {
    let authority = Authority::create("test").unwrap();
    let (key, request) = pki::request("host1").unwrap();
    let certificate = authority.sign(&request, "host1", &[[127, 0, 0, 1].into()]).unwrap();
    let ca = authority.certificate;
    let fingerprint = pki::fingerprint(&ca).unwrap();
    let tls = pki::server_config(&Identity { ca, certificate, key }).unwrap();
    let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    tokio::spawn(async move {
        serve::serve_tls(address, Arc::new(tls), api, cancel).await.unwrap();
    });
    Far { address: address.to_string(), fingerprint }
}

async fn serve(endpoint: String, socket: PathBuf) -> Far {
    let config = StoreConfig { endpoints: vec![endpoint], tls: None };
    let store = EtcdStore::connect(config).await.unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let host = Stored {
        meta: Meta::new(Name::new("host1").unwrap(), "u".into(), 0),
        spec: HostSpec {
            address: [10, 0, 0, 1].into(),
            power: None,
            cordoned: false,
            witness: false,
            reserved_memory: Bytes::mib(512),
        },
    };
    let key = keys::object(&ObjectRef::new(Kind::Host, host.meta.name.clone()));
    let put = || vec![Op::Put(key.clone(), Object::Host(host.clone()).to_store().into())];
    while store.txn(vec![], put()).await.is_err() {
        assert!(Instant::now() < until, "etcd does not answer");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let cancel = CancellationToken::new();
    let live = LiveConfig { prefix: keys::ROOT.into(), observed: vec![keys::LEASES.into()] };
    let live = LiveCopy::<Snapshot>::spawn(store.clone(), live, Clock::real(), cancel.clone());
    let mut state = live.state();
    state.wait_for(|snapshot| !snapshot.hosts.is_empty()).await.unwrap();
    let api = ApiState {
        me: Name::new("host1").unwrap(),
        store,
        live: live.state(),
        seen: Arc::new(Default::default),
        promises: Promises::new(Clock::real(), Contact::new(Clock::real())),
        local: Arc::new(OnlyImages),
        power: Arc::new(OnlyImages),
        secrets: Some(ClusterKey::derive(&Authority::create("test").unwrap()).unwrap()),
        invite: Arc::new(InviteFacts::default()),
    };
    let far = serve_far(api.clone(), cancel.clone());
    tokio::spawn(async move {
        serve::serve_unix(&socket, api, cancel).await.unwrap();
        drop(live);
    });
    far
}

impl Api {
    /// None where it cannot be had.
    pub fn start() -> Option<Self> {
        let there = Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_ok();
        if !there || !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root and etcd");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (etcd, endpoint) = etcd(&directory);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let far = runtime.block_on(serve(endpoint, directory.path().join("api.sock")));
        let api = Self { etcd, directory, far, _runtime: runtime };
        let until = Instant::now() + Duration::from_secs(5);
        while !api.socket().exists() {
            assert!(Instant::now() < until, "the API does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(api)
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }
}

/// Runs it until it does what is wanted: the live copy may lag behind what was just written.
pub fn until(person: &Person, args: &[&str], wanted: impl Fn(&Ended) -> bool) -> Ended {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let ended = person.run(args);
        if wanted(&ended) || Instant::now() > end {
            return ended;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Commands with what they print, as a person sees it; those of `wanted` are repeated until their word is there.
pub fn transcript(person: &Person, steps: &[(&[&str], &str)]) -> String {
    let mut text = String::new();
    for (args, wanted) in steps {
        let ended = until(person, args, |e| e.out.contains(wanted) || e.err.contains(wanted));
        text.push_str(&format!("$ haven {}\n{}{}", args.join(" "), ended.out, ended.err));
        if ended.code != 0 {
            text.push_str(&format!("(exit {})\n", ended.code));
        }
    }
    text.replace(&person.home.path().display().to_string(), "HOME")
}

#[test]
fn objects_are_made_listed_and_never_made_twice() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let create = ["vm", "create", "web", "--memory", "128MiB", "--network", "front=10.77.0.9"];
    let create = [&create[..], &["--disk", "root:1GiB:fast", "--label", "tier=web"]].concat();
    let text = transcript(
        &person,
        &[
            (&["network", "create", "front", "--subnet", "10.77.0.0/24"], "created"),
            (&["pool", "create", "fast", "--driver", "local", "--path", "/fast"], "created"),
            (&["pool", "create", "bad", "--driver", "local", "--path", "fast"], "absolute"),
            (&["network", "ls"], "front"),
            (&["pool", "ls"], "fast"),
            (&create, "created"),
            (&["vm", "ls"], "web"),
            (&create, "exists already"),
            (&["network", "create", "front", "--subnet", "10.78.0.0/24"], "exists already"),
            (&["network", "create", "second", "--subnet", "10.77.0.128/25"], "overlaps"),
            (&["network", "create", "x", "--subnet", "10.79.0.0/24", "--bridge", "br0"], "overlay"),
            (&["vm", "show", "web", "-o", "yaml"], "kind"),
            (&["vm", "show", "web"], "name"),
            (&["get", "vm/none"], "no vm/none"),
            (&["network", "show", "front"], "front"),
            (&["vm", "stop", "web"], "stopped"),
            (&["delete", "vm/web"], "deleting"),
            (&["vm", "ls"], "deleting"),
        ],
    );
    insta::assert_snapshot!(text);
}

#[test]
fn hosts_tokens_and_images() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let disk = person.file("disk.raw", "abc");
    let sum = "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD";
    assert_eq!(person.run(&["token", "create", "ci", "--role", "operator"]).code, 0);
    let again = person.run(&["token", "create", "ci", "--role", "viewer"]);
    assert_eq!(again.code, 4, "{}", again.err);
    let tokens = person.run(&["token", "ls", "-o", "json"]);
    let tokens: serde_json::Value = serde_json::from_str(&tokens.out).unwrap();
    assert_eq!((&tokens[0]["name"], &tokens[0]["role"]), (&"ci".into(), &"operator".into()));
    assert!(tokens[0].get("hash").is_none() && tokens.as_array().unwrap().len() == 1);
    let text = transcript(
        &person,
        &[
            (&["token", "rm", "ci"], "ended"),
            (&["token", "rm", "ci"], "no token"),
            (&["token", "ls"], "NAME"),
            (&["host", "cordon", "host1"], "cordoned"),
            (&["host", "cordon", "host1"], "already"),
            (&["host", "uncordon", "host1"], "again"),
            (&["host", "cordon", "host9"], "no host"),
            (&["host", "ls"], "host1"),
            (&["image", "import", "small", &disk, "--checksum", sum], "imported"),
            (&["image", "ls"], "small"),
            (&["image", "import", "small", "--kernel", "/nowhere"], "cannot be read"),
            (&["image", "import", "Small", &disk], "not a valid name"),
            (&["incidents", "ls"], "NUMBER"),
            (&["incidents", "show", "7"], "no incident"),
            (&["events"], "TIME"),
        ],
    );
    insta::assert_snapshot!(text);
    let audit = person.run(&["audit", "-o", "json"]);
    assert!(audit.out.contains("POST /v1/tokens/ci"), "{}", audit.out);
}

/// A web server that has a disk, and one that breaks off; ends with the test's process.
fn web_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            let n = std::io::Read::read(&mut stream, &mut head).unwrap();
            let head = String::from_utf8_lossy(&head[..n]).into_owned();
            let (status, length) = match head.split_whitespace().nth(1) {
                Some("/disk.raw") => ("200 OK", 3),
                Some("/broken.raw") => ("200 OK", 10),
                _ => ("404 Not Found", 3),
            };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\nabc");
            std::io::Write::write_all(&mut stream, answer.as_bytes()).unwrap();
        }
    });
    port
}

#[test]
fn images_come_from_the_web_whole_or_not_at_all() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let server = format!("http://127.0.0.1:{}", web_server());
    let [disk, broken, missing] =
        ["disk", "broken", "missing"].map(|file| format!("{server}/{file}.raw"));
    let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let other = "0".repeat(64);
    let text = transcript(
        &person,
        &[
            (&["image", "import", "web", &missing], "404"),
            (&["image", "import", "web", &broken], "broke off"),
            (&["image", "import", "web", &disk, "--checksum", &other], "is not"),
            (&["image", "import", "web", "ftp://127.0.0.1/disk.raw"], "ftp"),
            (&["image", "ls"], ""),
            (&["image", "import", "web", &disk, "--checksum", sum], "imported"),
            (&["image", "ls"], "web"),
        ],
    );
    insta::assert_snapshot!(text.replace(&server, "http://SERVER"));
}

#[test]
fn an_edit_never_overwrites_what_came_meanwhile() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let manifest = person.file("n.yaml", "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n");
    assert_eq!(person.run(&["apply", "-f", &manifest]).code, 0);
    until(&person, &["network", "show", "front"], |e| e.code == 0);
    // While this editor is open, somebody else applies another version, and the daemon sees it.
    let other =
        person.file("o.yaml", "kind: Network\nname: front\nsubnet: 10.77.0.0/24\nmtu: 9000\n");
    let binary = env!("CARGO_BIN_EXE_haven");
    let script = format!(
        "#!/bin/sh\n{binary} apply -f {other} > {other}.log 2>&1\nuntil {binary} network show front | grep -q 9000; do sleep 0.05; done\nsed -i 's/mtu: 1450/mtu: 1400/' \"$1\"\n"
    );
    let editor = person.file("editor.sh", &script);
    let person = person.with("EDITOR", &format!("sh {editor}"));
    let ended = person.run(&["edit", "network/front"]);
    assert_eq!(ended.code, 4, "{}", ended.err);
    for word in ["+mtu: 9000", "+mtu: 1400", "changed meanwhile", "haven-edit-"] {
        assert!(ended.err.contains(word), "{word}: {}", ended.err);
    }
    let now = person.run(&["network", "show", "front", "-o", "yaml"]);
    assert!(now.out.contains("mtu: 9000"), "{}", now.out);
    // Without anybody else it is written.
    let person = person.with("EDITOR", "sed -i 's/mtu: 9000/mtu: 1400/'");
    let ended = person.run(&["edit", "network/front"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "network/front changed\n"), "{}", ended.err);
}

#[test]
fn a_saved_cluster_is_reached_from_afar_with_its_fingerprint_and_a_token() {
    let Some(api) = Api::start() else { return };
    let local = Person::at(&api.socket());
    let token = local.run(&["token", "create", "me", "--role", "viewer"]).out;
    let person = Person::anybody();
    let add = |name: &str, fingerprint: &str, token: &str| {
        let address = api.far.address.as_str();
        let args = ["context", "add", name, "--address", address, "--fingerprint", fingerprint];
        let ended = person.say(token, &[&args[..], &["--token-stdin"]].concat());
        assert_eq!(ended.code, 0, "{}", ended.err);
    };
    // As openssl prints it.
    let upper = api.far.fingerprint.to_uppercase();
    let pairs: Vec<&str> = (0..32).map(|i| &upper[2 * i..2 * i + 2]).collect();
    add("good", &pairs.join(":"), &token);
    add("other", &"ab".repeat(32), &token);
    add("forged", &api.far.fingerprint, "me.wrong");
    assert_eq!(person.run(&["context", "use", "good"]).code, 0);
    let hosts = person.run(&["host", "ls"]);
    assert!(hosts.code == 0 && hosts.out.contains("host1"), "{}", hosts.err);
    let viewer = person.run(&["host", "cordon", "host1"]);
    let other = person.run(&["--context", "other", "host", "ls"]);
    let forged = person.run(&["--context", "forged", "host", "ls"]);
    assert_eq!((viewer.code, other.code, forged.code), (1, 5, 1));
    let said = format!("{}{}{}", viewer.err, other.err, forged.err);
    insta::assert_snapshot!(said.replace(&api.far.address, "HOST1"));
}
