//! Redfish (DMTF DSP0266): the three requests that switch a system off, and nothing more of it.
//!
//! One connection per request: requests are few, and a controller that hangs is noticed at once.

use super::{driver::PowerDriver, trust};
use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::STANDARD};
use haven_model::{PowerProblem, PowerSpec, PowerState};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::Instant,
};

/// Where every Redfish service begins.
const ROOT: &str = "/redfish/v1";
/// The collection of systems.
const SYSTEMS: &str = "/redfish/v1/Systems";
/// An answer holds so many bytes at most.
const MOST: usize = 1 << 20;

/// Speaks to management controllers.
pub struct Redfish {
    /// How long one request may take.
    pub request: Duration,
    /// How long after the command the power must read as off.
    pub settle: Duration,
    /// The pause between two reads.
    pub pause: Duration,
}

impl Default for Redfish {
    /// Real controllers take up to some seconds for an answer.
    fn default() -> Self {
        Self {
            request: Duration::from_secs(5),
            settle: Duration::from_secs(15),
            pause: Duration::from_millis(50),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// One controller as it is asked.
struct Controller<'a> {
    power: &'a PowerSpec,
    uri: Uri,
    within: Duration,
}

/// An answer.
struct Answer {
    status: StatusCode,
    body: Value,
}

impl<'a> Controller<'a> {
    fn new(power: &'a PowerSpec, within: Duration) -> Result<Self, PowerProblem> {
        let bad = |_| {
            problem(
                power,
                "is no address",
                "write `https://ADDRESS` or the whole address of a system",
            )
        };
        let uri: Uri = power.url.parse().map_err(bad)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            let hint = "write `https://ADDRESS` or the whole address of a system";
            return Err(problem(power, "is not an https:// or http:// address", hint));
        }
        Ok(Self { power, uri, within })
    }

    fn fail(&self, what: impl std::fmt::Display, hint: &str) -> PowerProblem {
        problem(self.power, what, hint)
    }

    fn host(&self) -> &str {
        self.uri.host().unwrap_or_default().trim_matches(['[', ']'])
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, PowerProblem> {
        let tls = self.uri.scheme_str() == Some("https");
        let port = self.uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let hint = "check its address and that this host reaches its network; a controller without power does not answer";
        let stream = TcpStream::connect((self.host(), port)).await;
        let stream =
            stream.map_err(|error| self.fail(format!("cannot be reached ({error})"), hint))?;
        if !tls {
            return Ok(Box::new(stream));
        }
        let trust_hint =
            "give `fingerprint`, or `ca`; `insecure: true` takes whatever certificate comes";
        let (config, came) =
            trust::config(self.power).map_err(|what| self.fail(what, trust_hint))?;
        let name = rustls::pki_types::ServerName::try_from(self.host().to_owned())
            .map_err(|_| self.fail("is no address that a certificate can name", "check it"))?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        match connector.connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => {
                let came = came.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Err(match came {
                    Some(came) => self.fail(
                        format!("shows a certificate that is not trusted ({error}); its SHA-256 is {came}"),
                        "compare that with what the controller's own console shows; if it is the same, put it into `power.fingerprint` of the host's spec",
                    ),
                    None => self.fail(
                        format!("speaks no TLS that can be understood ({error})"),
                        "check the port, and that TLS 1.2 or 1.3 is switched on there",
                    ),
                })
            }
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Answer, PowerProblem> {
        let stream = self.connect().await?;
        let broken = |error: hyper::Error| {
            self.fail(
                format!("broke the connection off ({error})"),
                "check that its address is one of Redfish",
            )
        };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let connection = tokio::spawn(connection);
        let login = STANDARD.encode(format!("{}:{}", self.power.user, self.power.password));
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", authority.rsplit('@').next().unwrap_or_default())
            .header("authorization", format!("Basic {login}"))
            .header("accept", "application/json")
            .header("content-type", "application/json")
            .header("connection", "close")
            .body(Full::new(Bytes::from(body)))
            .map_err(|_| self.fail("is no address", "check `power.url`"))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let read = Limited::new(response.into_body(), MOST).collect().await;
        connection.abort();
        let hint = "check that its address is one of Redfish";
        let read =
            read.map_err(|error| self.fail(format!("gave half an answer ({error})"), hint))?;
        let body = serde_json::from_slice(&read.to_bytes()).unwrap_or_default();
        Ok(Answer { status, body })
    }

    async fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Answer, PowerProblem> {
        let answer = tokio::time::timeout(self.within, self.exchange(method, path, body)).await;
        let late = || {
            let hint = "it may hang, or be without power: look at it from another machine";
            self.fail(format!("did not answer within {:?}", self.within), hint)
        };
        answer.map_err(|_| late())?
    }

    /// A resource.
    async fn get(&self, path: &str) -> Result<Value, PowerProblem> {
        let answer = self.ask(Method::GET, path, Vec::new()).await?;
        if answer.status.is_success() { Ok(answer.body) } else { Err(self.refusal(path, &answer)) }
    }

    /// What an answer that is not one of success says.
    fn refusal(&self, path: &str, answer: &Answer) -> PowerProblem {
        let said = &answer.body["error"];
        let said =
            said["@Message.ExtendedInfo"][0]["Message"].as_str().or(said["message"].as_str());
        let said = said.map(|said| format!(": {said}")).unwrap_or_default();
        let status = answer.status.as_u16();
        match status {
            401 | 403 => self.fail(
                format!("refuses the user `{}` or its password (status {status}){said}", self.power.user),
                "give `power.user` and `power.password` of a user that may switch the power",
            ),
            404 => self.fail(
                format!("has no `{path}` (status 404){said}"),
                "leave the path out of `power.url` to have its only system, or take it from /redfish/v1/Systems",
            ),
            300..=399 => self.fail(
                format!("leads elsewhere (status {status})"),
                "give the address that it leads to; most answer at https:// only",
            ),
            _ => self.fail(
                format!("answered with status {status}{said}"),
                "look into the controller's own log",
            ),
        }
    }

    /// The path of the system: the one that the address names, or the only one.
    async fn system(&self) -> Result<String, PowerProblem> {
        let path = self.uri.path().trim_end_matches('/');
        if !["", ROOT, SYSTEMS, "/redfish"].contains(&path) {
            return Ok(path.to_owned());
        }
        let all = self.get(SYSTEMS).await?;
        let members: Vec<&str> = all["Members"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|member| member["@odata.id"].as_str())
            .collect();
        match members[..] {
            [only] if only.starts_with('/') => Ok(only.trim_end_matches('/').to_owned()),
            [] => Err(self.fail("has no system", "check that its address is one of Redfish")),
            _ => Err(self.fail(
                format!("has several systems: {}", members.join(", ")),
                "put the path of this host's one into `power.url`",
            )),
        }
    }

    fn power_of(&self, system: &Value) -> Result<PowerState, PowerProblem> {
        // While it is switched it says `PoweringOn` or `PoweringOff`, and has power still.
        match system["PowerState"].as_str() {
            Some("Off") => Ok(PowerState::Off),
            Some("On" | "PoweringOn" | "PoweringOff" | "Paused") => Ok(PowerState::On),
            Some(other) => Err(self.fail(
                format!("tells a power state that is not known: `{other}`"),
                "look at the host with the controller's own console",
            )),
            None => Err(self.fail(
                "tells no power state",
                "`power.url` must be the address of a system, as /redfish/v1/Systems lists them",
            )),
        }
    }

    /// The path to which a reset is sent.
    fn target(&self, path: &str, system: &Value) -> Result<String, PowerProblem> {
        let action = &system["Actions"]["#ComputerSystem.Reset"];
        let allowed = action["ResetType@Redfish.AllowableValues"].as_array();
        if allowed.is_some_and(|allowed| !allowed.iter().any(|one| one == "ForceOff")) {
            return Err(self.fail(
                "does not offer `ForceOff`",
                "switch this host by a fence agent instead: `driver: agent`",
            ));
        }
        // A path on the same controller and nothing else: the password goes there.
        let given = action["target"].as_str().filter(|target| target.starts_with('/'));
        Ok(given.map_or_else(|| format!("{path}/Actions/ComputerSystem.Reset"), str::to_owned))
    }
}

fn problem(power: &PowerSpec, what: impl std::fmt::Display, hint: &str) -> PowerProblem {
    PowerProblem {
        message: format!("the power controller {} {what}", power.url),
        hint: hint.into(),
    }
}

#[async_trait]
impl PowerDriver for Redfish {
    async fn state(&self, power: &PowerSpec) -> Result<PowerState, PowerProblem> {
        let controller = Controller::new(power, self.request)?;
        let path = controller.system().await?;
        controller.power_of(&controller.get(&path).await?)
    }

    async fn off(&self, power: &PowerSpec) -> Result<(), PowerProblem> {
        let controller = Controller::new(power, self.request)?;
        let path = controller.system().await?;
        let target = controller.target(&path, &controller.get(&path).await?)?;
        let body = json!({"ResetType": "ForceOff"}).to_string().into_bytes();
        let answer = controller.ask(Method::POST, &target, body).await?;
        let refused = (!answer.status.is_success()).then(|| controller.refusal(&target, &answer));
        let begin = Instant::now();
        loop {
            // Many refuse to switch off what is off already: what counts is what is read now.
            match (controller.power_of(&controller.get(&path).await?)?, &refused) {
                (PowerState::Off, _) => return Ok(()),
                (PowerState::On, Some(refused)) => return Err(refused.clone()),
                (PowerState::On, None) => {}
            }
            if begin.elapsed() >= self.settle {
                let what = format!(
                    "took the command, and tells {:?} later that the power is on",
                    self.settle
                );
                return Err(
                    controller.fail(what, "look at the host with the controller's own console")
                );
            }
            tokio::time::sleep(self.pause).await;
        }
    }
}
