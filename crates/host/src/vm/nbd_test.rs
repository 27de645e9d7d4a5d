//! The NBD client against QEMU's server, and against a peer that follows a script.

use super::{
    nbd::{Nbd, Refused},
    views::Extent,
};
use std::{
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_millis(100);

fn there(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok()
}

fn has_qemu() -> bool {
    let all = there("qemu-storage-daemon") && there("qemu-img") && there("qemu-io");
    if !all {
        println!(
            "skipped: needs qemu-storage-daemon, from the package qemu-system-x86, and qemu-utils"
        );
    }
    all
}

fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{program} {arguments:?}: {said}");
}

/// A storage daemon, ended with its test.
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(directory: &Path, arguments: &[String]) -> Self {
        let socket = directory.join("nbd");
        let at = format!("addr.type=unix,addr.path={}", socket.display());
        let child = Command::new("qemu-storage-daemon")
            .args(["--nbd-server", &at])
            .args(arguments)
            .spawn()
            .unwrap();
        Self { child, socket }
    }

    async fn stream(&mut self) -> UnixStream {
        for _ in 0..500 {
            if let Ok(stream) = UnixStream::connect(&self.socket).await {
                return stream;
            }
            assert_eq!(self.child.try_wait().unwrap(), None, "it has ended");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody listens at {}", self.socket.display());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn all(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// A sparse file: 0x11 in the second MiB, 0x22 in the last 64 KiB.
fn sparse(directory: &Path, size: u64) -> String {
    let path = directory.join("raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(&vec![0x11; MIB as usize], MIB).unwrap();
    file.write_all_at(&[0x22; 65_536], size - 65_536).unwrap();
    path.display().to_string()
}

async fn whole_status(nbd: &mut Nbd<UnixStream>) -> Vec<Extent> {
    let (mut at, mut found): (u64, Vec<Extent>) = (0, Vec::new());
    while at < nbd.size() {
        let length = u32::try_from((nbd.size() - at).min(1 << 30)).unwrap();
        for extent in nbd.status(at, length).await.unwrap() {
            at += extent.length;
            match found.last_mut() {
                Some(last) if (last.zero, last.dirty) == (extent.zero, extent.dirty) => {
                    last.length += extent.length;
                }
                _ => found.push(extent),
            }
        }
    }
    assert_eq!(at, nbd.size(), "no more than what was asked for");
    found
}

fn extent(length: u64, zero: bool, dirty: bool) -> Extent {
    Extent { length, zero, dirty }
}

#[tokio::test]
async fn a_sparse_file_is_read_and_its_holes_are_told() {
    if !has_qemu() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (size, file) = (100 * MIB, sparse(directory.path(), 100 * MIB));
    let mut daemon = Daemon::start(
        directory.path(),
        &all(&[
            "--blockdev",
            &format!("file,node-name=f,filename={file},discard=unmap"),
            "--blockdev",
            "raw,node-name=n,file=f,discard=unmap",
            "--export",
            "nbd,id=e,node-name=n,name=disk,writable=on",
            "--export",
            "nbd,id=r,node-name=n,name=look",
        ]),
    );
    let mut nbd = Nbd::connect(daemon.stream().await, "disk", None).await.unwrap();
    assert_eq!(nbd.size(), size);
    let want = [
        extent(MIB, true, true),
        extent(MIB, false, true),
        extent(98 * MIB - 65_536, true, true),
        extent(65_536, false, true),
    ];
    assert_eq!(whole_status(&mut nbd).await, want);
    assert_eq!(nbd.status(0, 65_536).await.unwrap(), [extent(65_536, true, true)]);

    // All of it: more than one request may read, and with holes.
    let mut bytes = vec![0xff; size as usize];
    nbd.read(0, &mut bytes).await.unwrap();
    assert!(bytes == std::fs::read(&file).unwrap(), "it is not what is in the file");
    let mut across = vec![0xff; 10];
    nbd.read(MIB - 5, &mut across).await.unwrap();
    assert_eq!(across, [0, 0, 0, 0, 0, 0x11, 0x11, 0x11, 0x11, 0x11]);
    nbd.read(size, &mut []).await.unwrap();

    assert!(nbd.trim(MIB, 1 << 19).await.unwrap());
    assert_eq!(nbd.status(MIB, 1 << 19).await.unwrap(), [extent(1 << 19, true, true)]);
    for (at, length) in [(size - 5, 10), (size + 1, 1), (u64::MAX, 2)] {
        let refused = nbd.read(at, &mut vec![0; length]).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
    assert!(nbd.status(0, 0).await.is_err());
    nbd.disconnect().await.unwrap();

    let mut look = Nbd::connect(daemon.stream().await, "look", None).await.unwrap();
    assert!(!look.trim(MIB, 65_536).await.unwrap(), "it may not be written to");
    let none = Nbd::connect(daemon.stream().await, "no-such", None).await.err().unwrap();
    assert!(Refused::of(&none).is_some() && none.to_string().contains("no-such"), "{none}");
    let none = Nbd::connect(daemon.stream().await, "disk", Some("none")).await.err().unwrap();
    assert_eq!(none.kind(), io::ErrorKind::NotFound);
    assert!(none.to_string().contains("qemu:dirty-bitmap:none"), "{none}");
}

#[tokio::test]
async fn what_changed_since_a_bitmap_began_is_told() {
    if !has_qemu() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let disk = directory.path().join("disk").display().to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &disk, "3T"]);
    run("qemu-io", &["-c", "write -P 0x11 0 2M", &disk]);
    run("qemu-img", &["bitmap", "--add", "-g", "65536", &disk, "hb-1"]);
    run("qemu-io", &["-c", "write -P 0x22 1M 64k", "-c", "write -z 2T 1M", &disk]);
    let mut daemon = Daemon::start(
        directory.path(),
        &all(&[
            "--blockdev",
            &format!("file,node-name=f,filename={disk},read-only=on"),
            "--blockdev",
            "qcow2,node-name=n,file=f,read-only=on",
            "--export",
            "nbd,id=e,node-name=n,name=disk,bitmaps.0=hb-1",
        ]),
    );
    let mut nbd = Nbd::connect(daemon.stream().await, "disk", Some("hb-1")).await.unwrap();
    let (begin, tib) = (2 * MIB, 1_u64 << 40);
    let want = [
        extent(MIB, false, false),
        extent(65_536, false, true),
        extent(begin - MIB - 65_536, false, false),
        extent(2 * tib - begin, true, false),
        extent(MIB, true, true),
        extent(tib - MIB, true, false),
    ];
    assert_eq!(whole_status(&mut nbd).await, want);
    let mut bytes = [0; 2];
    nbd.read(MIB - 1, &mut bytes).await.unwrap();
    assert_eq!(bytes, [0x11, 0x22]);

    let mut plain = Nbd::connect(daemon.stream().await, "disk", None).await.unwrap();
    let want = [extent(2 * MIB, false, true), extent(3 * tib - 2 * MIB, true, true)];
    assert_eq!(whole_status(&mut plain).await, want);
}

#[tokio::test]
async fn a_view_stays_as_it_was_and_what_is_trimmed_is_refused_afterwards() {
    if !has_qemu() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let file = sparse(directory.path(), 4 * MIB);
    let kept = directory.path().join("kept");
    std::fs::File::create(&kept).unwrap().set_len(4 * MIB).unwrap();
    let mut daemon = Daemon::start(
        directory.path(),
        &all(&[
            "--blockdev",
            &format!("file,node-name=d0,filename={file}"),
            "--blockdev",
            &format!("file,node-name=bt0,filename={},discard=unmap", kept.display()),
            "--blockdev",
            "copy-before-write,node-name=bc0,file=d0,target=bt0,on-cbw-error=break-snapshot,discard=unmap",
            "--blockdev",
            "snapshot-access,node-name=bs0,file=bc0,discard=unmap",
            "--export",
            "nbd,id=guest,node-name=bc0,name=guest,writable=on",
            "--export",
            "nbd,id=view,node-name=bs0,name=view,writable=on",
        ]),
    );
    let mut view = Nbd::connect(daemon.stream().await, "view", None).await.unwrap();
    let guest = format!("nbd+unix:///guest?socket={}", daemon.socket.display());
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x33 0 2M", &guest]);
    let mut bytes = vec![0xff; 2 * MIB as usize];
    view.read(0, &mut bytes).await.unwrap();
    assert!(bytes == [vec![0; MIB as usize], vec![0x11; MIB as usize]].concat());

    assert!(view.trim(MIB, 1 << 20).await.unwrap());
    let mut bytes = vec![0; 65_536];
    for at in [MIB, MIB - 32_768] {
        let refused = view.read(at, &mut bytes).await.unwrap_err();
        assert!(Refused::of(&refused).is_some_and(|refused| refused.code == 22), "{refused}");
    }
    let refused = view.status(0, 2 << 20).await.unwrap_err();
    assert!(Refused::of(&refused).is_some(), "{refused}");
    // The connection is as good as before.
    view.read(0, &mut bytes).await.unwrap();
    assert!(!view.status(0, 1 << 20).await.unwrap().is_empty());
}

/// A server that follows a script.
struct Peer(UnixStream);

impl Peer {
    async fn says(&mut self, bytes: &[u8]) {
        // The client may be gone.
        let _ = self.0.write_all(bytes).await;
    }
    async fn hears(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).await.unwrap();
        bytes
    }
    /// The option that is asked for, with its data.
    async fn option(&mut self) -> (u32, Vec<u8>) {
        let head = self.hears(16).await;
        assert_eq!(&head[..8], b"IHAVEOPT");
        let length = u32::from_be_bytes(head[12..].try_into().unwrap());
        (u32::from_be_bytes(head[8..12].try_into().unwrap()), self.hears(length as usize).await)
    }
    async fn answers(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.says(&option_answer(option, kind, data)).await;
    }
    /// The handshake of an export of 1 MiB: contexts 7 and 8.
    async fn opens(&mut self, bitmap: bool) {
        self.says(b"NBDMAGICIHAVEOPT\0\x03").await;
        assert_eq!(self.hears(4).await, [0, 0, 0, 3]);
        assert_eq!(self.option().await, (8, Vec::new()));
        self.answers(8, 1, b"").await;
        assert_eq!(self.option().await.0, 10);
        self.answers(10, 4, b"\0\0\0\x07base:allocation").await;
        if bitmap {
            self.answers(10, 4, b"\0\0\0\x08qemu:dirty-bitmap:hb").await;
        }
        self.answers(10, 1, b"").await;
        assert_eq!(self.option().await.0, 7);
        let told = [&[0, 0][..], &MIB.to_be_bytes(), &[0, 0x21]].concat();
        self.answers(7, 3, &told).await;
        self.answers(7, 3, b"\0\x03\0\0\0\x01\0\0\x10\0\0\x01\0\0").await;
        self.answers(7, 1, b"").await;
    }
    /// The kind and the cookie of a request.
    async fn request(&mut self) -> (u8, [u8; 8]) {
        let head = self.hears(28).await;
        assert_eq!(&head[..4], &[0x25, 0x60, 0x95, 0x13]);
        (head[7], head[8..16].try_into().unwrap())
    }
}

fn option_answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for number in [option, kind, data.len() as u32] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

fn part(done: bool, kind: u16, cookie: [u8; 8], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x66, 0x8e, 0x33, 0xef, 0, u8::from(done)];
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie);
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    data(offset, &length.to_be_bytes())
}

fn numbers(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

/// A connection whose server sends to the first request what `answer` makes of its cookie, and ends.
async fn scripted(
    bitmap: Option<&str>,
    answer: impl FnOnce([u8; 8]) -> Vec<u8> + Send + 'static,
) -> Nbd<UnixStream> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bits = bitmap.is_some();
    tokio::spawn(async move {
        let mut peer = Peer(theirs);
        peer.opens(bits).await;
        let (_, cookie) = peer.request().await;
        peer.says(&answer(cookie)).await;
    });
    Nbd::connect(ours, "x", bitmap).await.unwrap()
}

/// What comes of a read of 8 bytes at 16.
async fn read(
    answer: impl FnOnce([u8; 8]) -> Vec<u8> + Send + 'static,
) -> (io::Result<Vec<u8>>, Nbd<UnixStream>) {
    let mut nbd = scripted(None, answer).await;
    let mut bytes = vec![0xff; 8];
    let done = nbd.read(16, &mut bytes).await;
    (done.map(|()| bytes), nbd)
}

#[tokio::test]
async fn a_read_comes_in_parts_of_any_order() {
    let (bytes, _) = read(|cookie| {
        let parts = [
            part(false, 1, cookie, &data(22, b"yz")),
            part(false, 2, cookie, &hole(18, 4)),
            part(false, 1, cookie, &data(16, b"ab")),
            part(true, 0, cookie, b""),
        ];
        parts.concat()
    })
    .await;
    assert_eq!(bytes.unwrap(), b"ab\0\0\0\0yz");
}

#[tokio::test]
async fn a_read_that_is_not_what_was_asked_for_is_an_error() {
    type Script = fn([u8; 8]) -> Vec<u8>;
    let scripts: &[(&str, Script)] = &[
        ("twice, or one not at all", |cookie| {
            let first = part(false, 1, cookie, &data(16, b"abcde"));
            [first, part(true, 1, cookie, &data(20, b"efgh"))].concat()
        }),
        ("twice, or one not at all", |cookie| part(true, 1, cookie, &data(17, b"bcdefgh"))),
        ("not send all", |cookie| part(true, 1, cookie, &data(16, b"abc"))),
        ("not send all", |cookie| part(true, 0, cookie, b"")),
        ("nobody asked for", |cookie| part(true, 1, cookie, &data(16, b"abcdefghi"))),
        ("nobody asked for", |cookie| part(true, 1, cookie, &data(15, b"abcdefgh"))),
        ("nobody asked for", |cookie| part(true, 2, cookie, &hole(16, u32::MAX))),
        ("nobody asked for", |cookie| part(true, 2, cookie, &hole(u64::MAX, 8))),
        ("nobody asked for", |cookie| part(true, 2, cookie, &hole(16, 0))),
        ("part of kind 1", |cookie| part(true, 1, cookie, &data(16, b""))),
        ("part of kind 0", |cookie| part(false, 0, cookie, b"")),
        ("part of kind 5", |cookie| part(true, 5, cookie, &numbers(&[7, 8, 0]))),
        ("part of kind 77", |cookie| part(true, 77, cookie, b"")),
        ("answered request", |_| part(true, 2, [9; 8], &hole(16, 8))),
        ("began an answer with", |_| vec![7; 20]),
        ("with nothing", |cookie| [b"\x67\x44\x66\x98\0\0\0\0".as_slice(), &cookie].concat()),
        ("ended the connection", |_| Vec::new()),
        ("ended the connection", |cookie| {
            part(true, 1, cookie, &data(16, b"abcdefgh"))[..30].to_vec()
        }),
        ("cut an answer short", |cookie| part(true, 0x8001, cookie, &[0, 0, 0, 5])),
        ("cut the text", |cookie| part(true, 0x8001, cookie, &[0, 0, 0, 5, 0, 9, b'x'])),
        ("error that is none", |cookie| part(true, 0x8001, cookie, &[0; 6])),
        ("are the most", |cookie| {
            let mut part = part(true, 0x8001, cookie, b"");
            part[16..20].fill(0xff);
            part
        }),
    ];
    for (wanted, script) in scripts {
        let (done, mut nbd) = read(script).await;
        let error = done.unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}, not {wanted}");
        assert!(Refused::of(&error).is_none());
        // What follows is not believed.
        let later = nbd.read(0, &mut [0]).await.unwrap_err();
        assert_eq!(later.kind(), io::ErrorKind::NotConnected, "after {wanted}");
    }
}

#[tokio::test]
async fn a_refusal_leaves_the_connection_as_it_was() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = async {
        let mut peer = Peer(theirs);
        peer.opens(false).await;
        let (kind, cookie) = peer.request().await;
        assert_eq!(kind, 0);
        peer.says(&part(false, 1, cookie, &data(0, b"ab"))).await;
        let told = [&[0, 0, 0, 5, 0, 4][..], b"bad\n", &2_u64.to_be_bytes()].concat();
        peer.says(&part(false, 0x8002, cookie, &told)).await;
        peer.says(&part(true, 0, cookie, b"")).await;
        let (kind, cookie) = peer.request().await;
        assert_eq!(kind, 4);
        peer.says(&[b"\x67\x44\x66\x98\0\0\0\x1c".as_slice(), &cookie].concat()).await;
        let (_, cookie) = peer.request().await;
        peer.says(&[b"\x67\x44\x66\x98\0\0\0\0".as_slice(), &cookie].concat()).await;
        let (_, cookie) = peer.request().await;
        peer.says(&part(true, 1, cookie, &data(4, b"cd"))).await;
        assert_eq!(peer.request().await.0, 2);
    };
    let client = async {
        let mut nbd = Nbd::connect(ours, "x", None).await.unwrap();
        let error = nbd.read(0, &mut [0; 4]).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the NBD server refused to read 4 bytes at 0: bad  (error 5)"
        );
        let error = nbd.trim(0, 4).await.unwrap_err();
        assert_eq!(Refused::of(&error).unwrap().code, 28);
        assert!(nbd.trim(0, 4).await.unwrap());
        let mut bytes = [0; 2];
        nbd.read(4, &mut bytes).await.unwrap();
        assert_eq!(&bytes, b"cd");
        nbd.disconnect().await.unwrap();
    };
    tokio::join!(script, client);
}

#[tokio::test]
async fn extents_of_both_contexts_are_laid_over_each_other() {
    let mut nbd = scripted(Some("hb"), |cookie| {
        let parts = [
            part(false, 5, cookie, &numbers(&[8, 10, 0, 10, 1, 900, 0])),
            part(true, 5, cookie, &numbers(&[7, 5, 3, 15, 0, 5, 0, 4000, 2])),
        ];
        parts.concat()
    })
    .await;
    let want = [
        extent(5, true, false),
        extent(5, false, false),
        extent(10, false, true),
        extent(5, false, false),
        extent(75, true, false),
    ];
    assert_eq!(nbd.status(0, 100).await.unwrap(), want);
}

#[tokio::test]
async fn a_status_that_is_not_what_was_asked_for_is_an_error() {
    type Script = fn([u8; 8]) -> Vec<u8>;
    let scripts: &[(&str, Script)] = &[
        ("left out", |cookie| part(true, 5, cookie, &numbers(&[7, 100, 0]))),
        ("left out", |cookie| part(true, 0, cookie, b"")),
        ("left out", |cookie| {
            let first = part(false, 5, cookie, &numbers(&[7, 100, 0]));
            [first, part(true, 5, cookie, &numbers(&[9, 100, 0]))].concat()
        }),
        ("the same of extents twice", |cookie| {
            let first = part(false, 5, cookie, &numbers(&[7, 100, 0]));
            [first.clone(), first].concat()
        }),
        ("no extent", |cookie| part(true, 5, cookie, &numbers(&[7]))),
        ("no bytes", |cookie| part(true, 5, cookie, &numbers(&[7, 0, 0]))),
        ("cut an answer short", |cookie| part(true, 5, cookie, &numbers(&[7, 100]))),
        ("part of kind 1", |cookie| part(true, 1, cookie, &data(0, b"x"))),
        ("are the most", |cookie| {
            let mut part = part(true, 5, cookie, b"");
            part[16..20].fill(0x7f);
            part
        }),
    ];
    for (wanted, script) in scripts {
        let mut nbd = scripted(Some("hb"), script).await;
        let error = nbd.status(0, 100).await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}, not {wanted}");
        assert!(nbd.status(0, 100).await.is_err());
    }
}

#[tokio::test]
async fn a_greeting_that_is_none_is_an_error() {
    let greetings: &[(&str, &[u8])] = &[
        ("does not greet", b"HTTP/1.1 400 Bad Request"),
        ("oldstyle", b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53"),
        ("fixed newstyle", b"NBDMAGICIHAVEOPT\0\0"),
        ("ended the connection", b"NBDMAG"),
        ("ended the connection", b""),
    ];
    for (wanted, greeting) in greetings {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut peer = Peer(theirs);
        peer.says(greeting).await;
        drop(peer);
        let error = Nbd::connect(ours, "x", None).await.err().unwrap();
        assert!(error.to_string().contains(wanted), "{error}, not {wanted}");
    }
}

/// What comes of a connection whose server answers its options with these bytes, whatever they are.
async fn negotiated(answers: Vec<u8>) -> io::Error {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer(theirs);
    peer.says(b"NBDMAGICIHAVEOPT\0\x03").await;
    peer.says(&answers).await;
    peer.0.shutdown().await.unwrap();
    Nbd::connect(ours, "x", None).await.err().unwrap()
}

#[tokio::test]
async fn an_option_that_is_answered_wrongly_is_an_error() {
    let ack = |option: u32| option_answer(option, 1, b"");
    let context = |told: &[u8]| [ack(8), option_answer(10, 4, told), ack(10)].concat();
    let base = b"\0\0\0\x07base:allocation";
    let go = |told: &[u8]| [context(base), option_answer(7, 3, told), ack(7)].concat();
    let export = |size: u64, flags: u16| {
        go(&[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())
    };
    let blocks = |least: u32, most: u32| {
        let sizes = [&[0, 3][..], &numbers(&[least, least, most])].concat();
        let told = [&[0, 0][..], &MIB.to_be_bytes(), &[0, 1]].concat();
        [context(base), option_answer(7, 3, &sizes), option_answer(7, 3, &told), ack(7)].concat()
    };
    let mut long = ack(8);
    long[16..20].fill(0xff);
    let scripts = [
        ("refused to use structured", option_answer(8, 0x8000_0001, b"")),
        ("answered an option with something else", vec![5; 20]),
        ("answered option 8 with one to 9", ack(9)),
        ("are the most", long),
        ("more than 64 answers", many()),
        ("has no `base:allocation`", [ack(8), ack(10)].concat()),
        ("nobody asked for", context(b"\0\0\0\x07base:else")),
        ("cut an answer short", context(b"\0")),
        ("context twice", [ack(8), option_answer(10, 4, base).repeat(2)].concat()),
        ("for contexts with something else", [ack(8), option_answer(10, 9, b"")].concat()),
        ("how large", [context(base), ack(7)].concat()),
        ("an export of", export(u64::MAX, 1)),
        ("an export of", export(MIB, 0)),
        ("cut an answer short", go(b"\0\0\0")),
        ("blocks of 3", blocks(3, 1 << 20)),
        ("blocks of 0", blocks(0, 1 << 20)),
        ("blocks of 4096 to 512", blocks(4096, 512)),
        (
            "refused to open the export `x`: gone away",
            [context(base), option_answer(7, 0x8000_0006, b"gone\naway")].concat(),
        ),
        ("ended the connection", ack(8)),
    ];
    for (wanted, script) in scripts {
        let error = negotiated(script).await;
        assert!(error.to_string().contains(wanted), "{error}, not {wanted}");
    }
}

/// An option that is answered without end.
fn many() -> Vec<u8> {
    let context = [option_answer(8, 1, b""), option_answer(10, 4, b"\0\0\0\x07base:allocation")];
    let go = [option_answer(10, 1, b""), option_answer(7, 3, b"\0\x01").repeat(100)];
    [context.concat(), go.concat()].concat()
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Nbd::connect_within(ours, "x", None, SOON).await.err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer(theirs);
    let connects = Nbd::connect_within(ours, "x", None, SOON);
    let (nbd, ()) = tokio::join!(connects, peer.opens(false));
    let mut nbd = nbd.unwrap();
    let error = nbd.read(0, &mut [0; 4]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    // An answer that comes late does not become that of the next request.
    let (_, cookie) = peer.request().await;
    peer.says(&part(true, 1, cookie, &data(0, b"late"))).await;
    let error = nbd.read(0, &mut [0; 4]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected, "{error}");
}

#[tokio::test]
async fn a_request_that_was_given_up_spoils_no_later_one() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer(theirs);
    let (nbd, ()) = tokio::join!(Nbd::connect(ours, "x", None), peer.opens(false));
    let mut nbd = nbd.unwrap();
    // It may run on any thread.
    let reads = tokio::spawn(async move {
        let given_up = tokio::time::timeout(SOON, nbd.read(0, &mut [0; 4])).await;
        assert!(given_up.is_err());
        nbd
    });
    let mut nbd = reads.await.unwrap();
    assert_eq!(nbd.trim(0, 1).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
}
