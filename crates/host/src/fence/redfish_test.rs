//! The Redfish driver against a controller that answers as told, on loopback, with and without TLS.

use super::{driver::PowerDriver, redfish::Redfish};
use haven_model::{PowerProblem, PowerSpec, PowerState};
use haven_store::testing::{Signed, Signer};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};

const ON: &str = "200 OK\r\n\r\n{\"PowerState\":\"On\"}";
const OFF: &str = "200 OK\r\n\r\n{\"PowerState\":\"Off\"}";
const NONSENSE: &str = "200 OK\r\n\r\n<html>Off</html>";
const TAKEN: &str = "204 No Content\r\n\r\n";

/// One that is done sooner than those of real controllers.
fn driver() -> Redfish {
    Redfish {
        request: Duration::from_secs(1),
        settle: Duration::from_millis(300),
        pause: Duration::from_millis(20),
    }
}

/// Head and body of a request.
async fn question(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut text = String::new();
    loop {
        let mut part = vec![0; 4096];
        let read = stream.read(&mut part).await.unwrap_or(0);
        text += &String::from_utf8_lossy(&part[..read]);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            if read == 0 {
                return text;
            }
            continue;
        };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if read == 0 || body.len() >= length.and_then(|l| l.parse().ok()).unwrap_or(0) {
            return text;
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Both for T {}

/// Gives one answer after another, the last one for ever; `None` is silence. What it was asked can be read.
async fn controller(
    answers: &'static [Option<&'static str>],
    tls: Option<&Signed>,
) -> (PowerSpec, UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, asked) = unbounded_channel();
    let acceptor = tls.map(|signed| {
        let chain = vec![CertificateDer::from_pem_slice(signed.leaf.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        tokio_rustls::TlsAcceptor::from(Arc::new(config))
    });
    let scheme = if tls.is_some() { "https" } else { "http" };
    tokio::spawn(async move {
        let (mut silent, mut number) = (Vec::new(), 0);
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream: Box<dyn Both> = match &acceptor {
                None => Box::new(stream),
                Some(acceptor) => match acceptor.accept(stream).await {
                    Ok(stream) => Box::new(stream),
                    // The certificate was not trusted: no question came, so no answer is used up.
                    Err(_) => continue,
                },
            };
            let _ = tell.send(question(&mut stream).await);
            match answers[number.min(answers.len() - 1)] {
                Some(answer) => {
                    let _ = stream.write_all(format!("HTTP/1.0 {answer}").as_bytes()).await;
                    let _ = stream.shutdown().await;
                }
                None => silent.push(stream),
            }
            number += 1;
        }
    });
    let url = format!("{scheme}://{address}/redfish/v1/Systems/host1");
    (PowerSpec::redfish(&url, "lab", "secret"), asked)
}

fn says(problem: &PowerProblem, url: &str, what: &str) {
    let said = &problem.message;
    assert!(
        said.starts_with(&format!("the power controller {url} ")) && said.contains(what),
        "{said}"
    );
    assert!(!problem.hint.is_empty() && !said.contains("secret"), "{problem:?}");
}

#[tokio::test]
async fn off_counts_once_it_was_read_back() {
    let answers = &[Some(ON), Some(TAKEN), Some(ON), Some(ON), Some(OFF)];
    let (power, mut asked) = controller(answers, None).await;
    driver().off(&power).await.unwrap();
    assert!(asked.recv().await.unwrap().starts_with("GET /redfish/v1/Systems/host1 HTTP/1.1\r\n"));
    let command = asked.recv().await.unwrap();
    let line = "POST /redfish/v1/Systems/host1/Actions/ComputerSystem.Reset HTTP/1.1\r\n";
    assert!(command.starts_with(line), "{command}");
    assert!(command.contains("\r\nauthorization: Basic bGFiOnNlY3JldA==\r\n"), "{command}");
    assert!(command.ends_with(r#"{"ResetType":"ForceOff"}"#), "{command}");
    for _ in 0..3 {
        let read = asked.recv().await.unwrap();
        assert!(read.starts_with("GET /redfish/v1/Systems/host1 HTTP/1.1\r\n"), "{read}");
    }
    assert!(asked.try_recv().is_err(), "it is asked no more");
}

#[tokio::test]
async fn a_host_whose_power_stays_on_is_not_off() {
    let (power, _asked) = controller(&[Some(ON), Some(TAKEN), Some(ON)], None).await;
    let problem = driver().off(&power).await.unwrap_err();
    says(&problem, &power.url, "later that the power is on");
}

#[tokio::test]
async fn a_refused_command_is_no_failure_where_the_power_is_off_already() {
    const REFUSED: &str = "409 Conflict\r\n\r\n{\"error\":{\"message\":\"the system is off\"}}";
    let (power, _asked) = controller(&[Some(OFF), Some(REFUSED), Some(OFF)], None).await;
    driver().off(&power).await.unwrap();
    let (power, _asked) = controller(&[Some(ON), Some(REFUSED), Some(ON)], None).await;
    let problem = driver().off(&power).await.unwrap_err();
    says(&problem, &power.url, "status 409: the system is off");
}

#[tokio::test]
async fn an_answer_without_a_power_state_is_none() {
    let (power, _asked) = controller(&[Some(ON), Some(NONSENSE)], None).await;
    assert_eq!(driver().state(&power).await.unwrap(), PowerState::On);
    says(&driver().state(&power).await.unwrap_err(), &power.url, "tells no power state");
    let (power, _asked) = controller(&[Some(ON), Some(TAKEN), Some(NONSENSE)], None).await;
    assert!(driver().off(&power).await.is_err(), "taken is not off");
    const GOING: &str = "200 OK\r\n\r\n{\"PowerState\":\"PoweringOff\"}";
    let (power, _asked) = controller(&[Some(GOING)], None).await;
    assert_eq!(driver().state(&power).await.unwrap(), PowerState::On, "it has power still");
}

#[tokio::test]
async fn the_only_system_is_found_and_its_own_target_is_used() {
    const ONE: &str =
        "200 OK\r\n\r\n{\"Members\":[{\"@odata.id\":\"/redfish/v1/Systems/437XR1138R2\"}]}";
    const SYSTEM: &str = "200 OK\r\n\r\n{\"PowerState\":\"On\",\"Actions\":{\"#ComputerSystem.Reset\":\
        {\"target\":\"/redfish/v1/Systems/437XR1138R2/Actions/Reset.1\",\"ResetType@Redfish.AllowableValues\":[\"On\",\"ForceOff\"]}}}";
    const TWO: &str = "200 OK\r\n\r\n{\"Members\":[{\"@odata.id\":\"/a\"},{\"@odata.id\":\"/b\"}]}";
    const SOFT: &str = "200 OK\r\n\r\n{\"PowerState\":\"On\",\"Actions\":{\"#ComputerSystem.Reset\":\
        {\"ResetType@Redfish.AllowableValues\":[\"GracefulShutdown\"]}}}";
    const AWAY: &str = "200 OK\r\n\r\n{\"PowerState\":\"On\",\"Actions\":{\"#ComputerSystem.Reset\":\
        {\"target\":\"https://10.0.0.66/collect\"}}}";
    let root = |power: &PowerSpec, path: &str| PowerSpec {
        url: power.url.replace("/redfish/v1/Systems/host1", path),
        ..power.clone()
    };
    let (power, mut asked) =
        controller(&[Some(ONE), Some(SYSTEM), Some(TAKEN), Some(OFF)], None).await;
    driver().off(&root(&power, "/redfish/v1/")).await.unwrap();
    assert!(asked.recv().await.unwrap().starts_with("GET /redfish/v1/Systems HTTP/1.1\r\n"));
    assert!(asked.recv().await.unwrap().starts_with("GET /redfish/v1/Systems/437XR1138R2 HTTP"));
    let line = "POST /redfish/v1/Systems/437XR1138R2/Actions/Reset.1 HTTP";
    assert!(asked.recv().await.unwrap().starts_with(line));
    let (power, _asked) = controller(&[Some(TWO)], None).await;
    let power = root(&power, "");
    says(&driver().state(&power).await.unwrap_err(), &power.url, "has several systems: /a, /b");
    let (power, mut asked) = controller(&[Some(SOFT)], None).await;
    says(&driver().off(&power).await.unwrap_err(), &power.url, "does not offer `ForceOff`");
    assert!(asked.recv().await.unwrap().starts_with("GET") && asked.try_recv().is_err());
    // The password goes to the same controller, whatever it says.
    let (power, mut asked) = controller(&[Some(AWAY), Some(TAKEN), Some(OFF)], None).await;
    driver().off(&power).await.unwrap();
    asked.recv().await.unwrap();
    assert!(asked.recv().await.unwrap().starts_with("POST /redfish/v1/Systems/host1/Actions/"));
}

#[tokio::test]
async fn a_refusal_silence_and_a_wrong_address_are_told_apart() {
    let (power, _asked) = controller(&[Some("401 Unauthorized\r\n\r\n{}")], None).await;
    says(
        &driver().off(&power).await.unwrap_err(),
        &power.url,
        "refuses the user `lab` or its password",
    );
    let (power, _asked) = controller(&[Some("404 Not Found\r\n\r\n{}")], None).await;
    says(
        &driver().state(&power).await.unwrap_err(),
        &power.url,
        "has no `/redfish/v1/Systems/host1`",
    );
    let moved = "308 Permanent Redirect\r\nLocation: https://10.0.0.66/\r\n\r\n";
    let (power, mut asked) = controller(Box::leak(Box::new([Some(moved)])), None).await;
    says(&driver().state(&power).await.unwrap_err(), &power.url, "leads elsewhere");
    assert!(asked.recv().await.is_some() && asked.try_recv().is_err(), "it is not followed");
    let (power, _asked) = controller(&[None], None).await;
    let begin = Instant::now();
    says(&driver().state(&power).await.unwrap_err(), &power.url, "did not answer within 1s");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let gone = PowerSpec { url: "http://127.0.0.1:1/".into(), ..power.clone() };
    says(&driver().state(&gone).await.unwrap_err(), &gone.url, "cannot be reached");
    let other = PowerSpec { url: "ipmi://10.0.0.1".into(), ..power };
    says(&driver().state(&other).await.unwrap_err(), &other.url, "is not an https://");
}

#[tokio::test]
async fn no_password_goes_to_a_controller_whose_certificate_is_not_the_expected_one() {
    let ca = Signer::new("Authority of the controllers");
    let signed = ca.sign("bmc1", 90);
    let der = CertificateDer::from_pem_slice(signed.leaf.as_bytes()).unwrap();
    let hex: Vec<String> = Sha256::digest(&der).iter().map(|b| format!("{b:02X}")).collect();
    let (power, mut asked) = controller(&[Some(ON)], Some(&signed)).await;
    let state = async |power: &PowerSpec| driver().state(power).await;
    // Nothing says what to expect.
    says(&state(&power).await.unwrap_err(), &power.url, "has no `fingerprint`, `ca` or `insecure`");
    // Another one comes: it is told which, so that a person can compare.
    let other = PowerSpec { fingerprint: Some("0".repeat(64)), ..power.clone() };
    let problem = state(&other).await.unwrap_err();
    says(&problem, &power.url, &hex.concat().to_lowercase());
    let stranger = Signer::new("Another authority");
    let wrong_ca = PowerSpec { ca: Some(stranger.certificate.clone()), ..power.clone() };
    says(&state(&wrong_ca).await.unwrap_err(), &power.url, "is not trusted");
    let no_ca = PowerSpec { ca: Some("nothing".into()), ..power.clone() };
    says(&state(&no_ca).await.unwrap_err(), &power.url, "`ca` holds no certificate");
    assert!(asked.try_recv().is_err(), "nobody has asked it anything yet");
    // The expected one, in each of the three ways.
    for good in [
        PowerSpec { fingerprint: Some(hex.join(":")), ..power.clone() },
        PowerSpec { ca: Some(ca.certificate.clone()), ..power.clone() },
        PowerSpec { insecure: true, ..power.clone() },
    ] {
        assert_eq!(state(&good).await.unwrap(), PowerState::On);
    }
}
