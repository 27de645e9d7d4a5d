//! The lab's power driver against a controller that answers as told, on loopback. The real one is asked by the drill.

use super::{LabPower, PowerConfig, PowerDriver, PowerError, PowerState};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

const ON: &str = "200 OK\r\n\r\n{\"PowerState\":\"On\"}";
const OFF: &str = "200 OK\r\n\r\n{\"PowerState\":\"Off\"}";
const NONSENSE: &str = "200 OK\r\n\r\n<html>Off</html>";
const TAKEN: &str = "204 No Content\r\n\r\n";

/// Gives one answer after another, the last one for ever; `None` is silence. What it was asked can be read.
async fn controller(
    answers: &'static [Option<&'static str>],
) -> (PowerConfig, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("it is bound");
    let (tell, asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut silent = Vec::new();
        for number in 0.. {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut text = vec![0; 4096];
            let read = stream.read(&mut text).await.expect("a question");
            let _ = tell.send(String::from_utf8_lossy(&text[..read]).into_owned());
            match answers[number.min(answers.len() - 1)] {
                Some(answer) => {
                    let answer = format!("HTTP/1.0 {answer}");
                    stream.write_all(answer.as_bytes()).await.expect("somebody listens");
                }
                None => silent.push(stream),
            }
        }
    });
    let url = format!("http://{address}/redfish/v1/Systems/host1");
    (PowerConfig { url, user: "lab".into(), password: "secret".into() }, asked)
}

fn says(error: &PowerError, url: &str, what: &str) {
    let said = error.to_string();
    assert!(
        said.starts_with(&format!("the power controller {url} ")) && said.contains(what),
        "{said}"
    );
}

#[tokio::test]
async fn off_counts_once_it_was_read_back() {
    let (power, mut asked) = controller(&[Some(TAKEN), Some(ON), Some(ON), Some(OFF)]).await;
    LabPower.power_off(&power).await.unwrap();
    let first = asked.recv().await.unwrap();
    let line = "POST /redfish/v1/Systems/host1/Actions/ComputerSystem.Reset HTTP/1.0\r\n";
    assert!(first.starts_with(line), "{first}");
    assert!(first.contains("\r\nAuthorization: Basic bGFiOnNlY3JldA==\r\n"), "{first}");
    assert!(first.ends_with(r#"{"ResetType":"ForceOff"}"#), "{first}");
    for _ in 0..3 {
        let read = asked.recv().await.unwrap();
        assert!(read.starts_with("GET /redfish/v1/Systems/host1 HTTP/1.0\r\n"), "{read}");
    }
    assert!(asked.try_recv().is_err(), "it is asked no more");
}

#[tokio::test]
async fn a_host_whose_power_stays_on_is_not_off() {
    let (power, _asked) = controller(&[Some(TAKEN), Some(ON)]).await;
    let error = LabPower.power_off(&power).await.unwrap_err();
    says(&error, &power.url, "still tells that the power is on");
}

#[tokio::test]
async fn an_answer_without_a_power_state_is_none() {
    let (power, _asked) = controller(&[Some(ON), Some(NONSENSE)]).await;
    assert_eq!(LabPower.state(&power).await.unwrap(), PowerState::On);
    says(&LabPower.state(&power).await.unwrap_err(), &power.url, "tells no power state");
    let (power, _asked) = controller(&[Some(TAKEN), Some(NONSENSE)]).await;
    assert!(LabPower.power_off(&power).await.is_err(), "taken is not off");
}

#[tokio::test]
async fn a_refusal_silence_and_a_wrong_address_are_told_apart() {
    let (power, _asked) = controller(&[Some("401 Unauthorized\r\n\r\n{}")]).await;
    says(&LabPower.power_off(&power).await.unwrap_err(), &power.url, "check the host's power user");
    let (power, _asked) = controller(&[None]).await;
    let begin = Instant::now();
    says(&LabPower.state(&power).await.unwrap_err(), &power.url, "did not answer within 1s");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let gone = PowerConfig { url: "http://127.0.0.1:1/".into(), ..power.clone() };
    says(&LabPower.state(&gone).await.unwrap_err(), &gone.url, "cannot be reached");
    let other = PowerConfig { url: "ipmi://10.0.0.1".into(), ..power };
    says(&LabPower.state(&other).await.unwrap_err(), &other.url, "is not an http:// address");
}
