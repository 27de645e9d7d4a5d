//! Against a server that speaks S3: that of `HAVEN_S3_TEST` (`http://HOST:PORT`, which takes any keys and in which
//! buckets are made without a signature), or `moto_server`, which `./check` installs. Without either nothing is tested.

use super::repository_test::{back_up, exercise, noise};
use super::*;
use std::process::{Child, Command, Stdio};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

struct Server {
    endpoint: String,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn server() -> Option<Server> {
    if let Ok(endpoint) = std::env::var("HAVEN_S3_TEST") {
        return Some(Server { endpoint, child: None });
    }
    let program = std::env::var("HOME").unwrap_or_default() + "/.cache/haven/moto/bin/moto_server";
    if !std::path::Path::new(&program).exists() {
        println!("skipped: needs moto_server, which `./check` installs");
        return None;
    }
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let mut command = Command::new(program);
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let server = Server { endpoint: format!("http://127.0.0.1:{port}"), child: Some(child) };
    for _ in 0..300 {
        if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            return Some(server);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("moto_server does not listen");
}

async fn make_bucket(endpoint: &str, bucket: &str) {
    let host = endpoint.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).await.unwrap();
    let request = format!(
        "PUT /{bucket} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

fn place(endpoint: &str, bucket: &str, prefix: Option<&str>) -> S3Place {
    S3Place {
        endpoint: endpoint.into(),
        bucket: bucket.into(),
        prefix: prefix.map(Into::into),
        region: "us-east-1".into(),
        access_key: "key".into(),
        secret_key: "secret".into(),
        ca: None,
    }
}

fn open(place: S3Place) -> Repository {
    Repository::open(&Place::S3(place)).unwrap()
}

#[tokio::test]
async fn a_bucket() {
    let Some(server) = server().await else { return };
    let bucket = format!("haven-{}", uuid::Uuid::new_v4());
    let nowhere = open(place(&server.endpoint, &bucket, None));
    let failure = nowhere.create(1).await.unwrap_err();
    assert!(failure.what.contains("there is no such bucket"), "{failure}");

    make_bucket(&server.endpoint, &bucket).await;
    let repository = open(place(&server.endpoint, &bucket, Some("some/where/")));
    let failure = repository.ready().await.unwrap_err();
    assert!(failure.what.contains("is not a place of backups"), "{failure}");
    repository.create(1).await.unwrap();
    repository.create(2).await.unwrap();
    exercise(&repository).await;

    // Below it is another's; beside it is not.
    let failure = open(place(&server.endpoint, &bucket, None)).create(1).await.unwrap_err();
    assert!(failure.what.contains("`some/where/"), "{failure}");
    let beside = open(place(&server.endpoint, &bucket, Some("some/wher")));
    beside.create(1).await.unwrap();
    assert_eq!(beside.list(None).await.unwrap(), Listed::default());
    back_up(&beside, "web", "1", &[noise(3, 10)]).await;
    let names = repository.list(None).await.unwrap().backups;
    assert!(names.iter().all(|backup| backup.id != "1"));
}

#[tokio::test]
async fn nobody_answers() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let repository = open(place(&format!("http://{free}"), "bucket", None));
    let failure = repository.ready().await.unwrap_err();
    assert!(failure.what.contains("it does not answer"), "{failure}");
    assert!(!failure.what.contains("secret"), "{failure}");
}

/// Answers every request so.
async fn answering(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    endpoint
}

#[tokio::test]
async fn what_servers_say() {
    const DENIED: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    const KEYS: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 45\r\nConnection: close\r\n\r\n<Error><Code>InvalidAccessKeyId</Code></Error>";
    for (answer, words) in [(DENIED, "check the keys"), (KEYS, "it does not know these keys")] {
        let repository = open(place(&answering(answer).await, "bucket", None));
        let failure = repository.ready().await.unwrap_err();
        assert!(failure.what.contains(words), "{failure}");
    }
}

#[test]
fn what_is_no_bucket() {
    let open = |place| Repository::open(&Place::S3(place)).unwrap_err().what;
    assert!(open(place("10.0.0.1:9000", "b", None)).contains("is no endpoint"));
    let mut wrong = place("https://h", "b", None);
    wrong.ca = Some("nothing".into());
    assert!(open(wrong).contains("has no certificate in PEM"));
    assert!(open(place("http://h", "b", Some("a//b"))).contains("cannot be a prefix"));
    let shown = format!("{:?}", Place::S3(place("http://h", "b", None)));
    assert!(!shown.contains("secret"), "{shown}");
}
