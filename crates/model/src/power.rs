//! Power: how a host is switched off from outside, and what is read of it.

use crate::Name;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// What switches a host's power.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerKind {
    /// Its management controller (BMC), over Redfish.
    #[default]
    Redfish,
    /// A program of the fence-agents project.
    Agent,
}

impl fmt::Display for PowerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PowerKind::Redfish => "redfish",
            PowerKind::Agent => "agent",
        })
    }
}

/// Where and how a host's power is controlled. `url`, `user` and `password` are always written: versions before the
/// drivers read nothing without `url`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PowerSpec {
    /// What switches it.
    #[serde(skip_serializing_if = "is_redfish")]
    pub driver: PowerKind,
    /// `redfish`: the system's address, for example `https://bmc1/redfish/v1/Systems/1`; without a path the only system
    /// that the controller has.
    pub url: String,
    /// User there.
    pub user: String,
    /// Password there. It stands sealed in the store, and `sealed` is all that is ever shown of it; written so, or left
    /// out, the one that is there is kept.
    pub password: String,
    /// `redfish` over https: PEM of the authority that signed the controller's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// `redfish` over https: SHA-256 of the controller's certificate, hexadecimal, with or without colons.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// `redfish` over https: take whatever certificate comes. Whoever stands in between learns the password.
    #[serde(skip_serializing_if = "is_false")]
    pub insecure: bool,
    /// `agent`: the program, for example `fence_ipmilan`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// `agent`: the controller's address, given to the agent as `ip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// `agent`: what else it is told, as `fence_… --help` names it on standard input, for example `lanplus: "1"`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_redfish(kind: &PowerKind) -> bool {
    *kind == PowerKind::Redfish
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

/// The password may stand in the clear until it is sealed.
impl fmt::Debug for PowerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerSpec")
            .field("driver", &self.driver)
            .field("at", &self.at())
            .finish_non_exhaustive()
    }
}

/// Hexadecimal in lower case without colons, if a text is a SHA-256.
#[must_use]
pub fn plain_fingerprint(text: &str) -> Option<String> {
    let plain: String =
        text.trim().chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect();
    (plain.len() == 64 && plain.bytes().all(|b| b.is_ascii_hexdigit())).then_some(plain)
}

/// Whether a name is one of a fence agent: nothing else is ever run.
#[must_use]
pub fn is_agent(name: &str) -> bool {
    let rest = name.strip_prefix("fence_").unwrap_or_default();
    !rest.is_empty()
        && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Why an option cannot be given to an agent, if it cannot. Agents run as root, and who may write a spec is not root of
/// the hosts: nothing that names a program to run or a file to write goes through.
#[must_use]
pub fn option_refused(key: &str) -> Option<String> {
    const OWN: [&str; 8] =
        ["action", "option", "ip", "ipaddr", "username", "login", "password", "passwd"];
    let known = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
    let ends = |ends: &[&str]| ends.iter().any(|end| key.ends_with(end));
    if key.is_empty() || !key.bytes().all(known) {
        return Some(format!("`{key}` is no name of an option"));
    }
    if OWN.contains(&key) {
        return Some(format!("`{key}` is given by `address`, `user` and `password`, or by Haven"));
    }
    if key.contains("passw") || key.contains("secret") {
        return Some(format!("`{key}` is a secret, and options are not sealed; `password` is"));
    }
    if ends(&["path", "script", "logfile", "log_file", "status_file", "debug_file"])
        || key.starts_with("debug")
        || key == "ssh_options"
    {
        return Some(format!("`{key}` could run a program or write a file as root of the hosts"));
    }
    None
}

/// One thing that is wrong with a spec: the field, what, and what to do.
pub type Wrong = (&'static str, String, &'static str);

impl PowerSpec {
    /// What is wrong with it, whatever it is to switch.
    #[must_use]
    pub fn problems(&self) -> Vec<Wrong> {
        let mut wrong = match self.driver {
            PowerKind::Redfish => self.redfish_problems(),
            PowerKind::Agent => self.agent_problems(),
        };
        let breaks = |text: &String| text.contains(['\n', '\r', '\0']);
        if [&self.user, &self.password].into_iter().any(breaks) {
            let what = "`user` and `password` hold no line breaks".to_owned();
            wrong.push(("power", what, "write them without"));
        }
        wrong
    }

    fn redfish_problems(&self) -> Vec<Wrong> {
        let mut wrong: Vec<Wrong> = Vec::new();
        let https = self.url.starts_with("https://");
        if !https && !self.url.starts_with("http://") {
            let what = format!("`url` is `{}`, which is not an https:// address", self.url);
            wrong.push(("url", what, "write `https://ADDRESS` of the management controller"));
        }
        if self.agent.is_some() || self.address.is_some() || !self.options.is_empty() {
            let what = "`agent`, `address` and `options` are of the driver `agent`".to_owned();
            wrong.push(("driver", what, "write `driver: agent`, or leave them out"));
        }
        let ways = [self.ca.is_some(), self.fingerprint.is_some(), self.insecure];
        match ways.iter().filter(|way| **way).count() {
            0 if https => wrong.push((
                "url",
                "nothing says how the controller's certificate is verified".to_owned(),
                "give `fingerprint` (its SHA-256) or `ca` (PEM); `insecure: true` takes any",
            )),
            0 | 1 => {}
            _ => wrong.push((
                "power",
                "`ca`, `fingerprint` and `insecure` exclude each other".to_owned(),
                "keep one of them",
            )),
        }
        if self.fingerprint.as_deref().is_some_and(|text| plain_fingerprint(text).is_none()) {
            let what = "`fingerprint` is not a SHA-256: 64 hexadecimal digits".to_owned();
            wrong.push(("fingerprint", what, "take the SHA-256 of the controller's certificate"));
        }
        wrong
    }

    fn agent_problems(&self) -> Vec<Wrong> {
        let mut wrong: Vec<Wrong> = Vec::new();
        let agent = self.agent.as_deref().unwrap_or_default();
        if !is_agent(agent) {
            let what = format!("`agent` is `{agent}`, which is no name of a fence agent");
            wrong.push(("agent", what, "write one like `fence_ipmilan`"));
        }
        if !self.url.is_empty() || self.ca.is_some() || self.fingerprint.is_some() || self.insecure
        {
            let what = "`url`, `ca`, `fingerprint` and `insecure` are of the driver `redfish`";
            wrong.push(("driver", what.to_owned(), "give `address`, and the rest in `options`"));
        }
        let breaks = |text: &String| text.contains(['\n', '\r', '\0']);
        if self.address.iter().chain(self.options.values()).any(breaks) {
            let what = "`address` and `options` hold no line breaks".to_owned();
            wrong.push(("options", what, "write them without"));
        }
        let hint = "the agent's manual page names its options as they go to standard input";
        let refused = self.options.keys().filter_map(|key| option_refused(key));
        wrong.extend(refused.map(|what| ("options", what, hint)));
        wrong
    }

    /// A Redfish controller, as versions before the drivers wrote it.
    #[must_use]
    pub fn redfish(url: &str, user: &str, password: &str) -> Self {
        let (url, user, password) = (url.to_owned(), user.to_owned(), password.to_owned());
        Self { url, user, password, ..Self::default() }
    }

    /// What is asked, in words.
    #[must_use]
    pub fn at(&self) -> String {
        match self.driver {
            PowerKind::Redfish => self.url.clone(),
            PowerKind::Agent => [&self.agent, &self.address]
                .into_iter()
                .flatten()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(" at "),
        }
    }

    /// Whether two differ in nothing but the password. Only then a password that is there may go where the new one
    /// says: whoever may write a spec could have it sent to an address of their own otherwise.
    #[must_use]
    pub fn same_place(&self, other: &Self) -> bool {
        let without = |spec: &Self| Self { password: String::new(), ..spec.clone() };
        without(self) == without(other)
    }
}

/// Whether a host has power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerState {
    /// It has.
    On,
    /// It has not.
    Off,
}

impl fmt::Display for PowerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PowerState::On => "on",
            PowerState::Off => "off",
        })
    }
}

/// Why a power controller did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PowerProblem {
    /// What is wrong, and where.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl fmt::Display for PowerProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.hint)
    }
}

/// What one host read of another's power.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PowerReading {
    /// The host that asked.
    pub from: Name,
    /// Whether it manages the cluster now: it is the one that would switch the power off.
    #[serde(default)]
    pub manages: bool,
    /// What it read; none when that failed.
    pub state: Option<PowerState>,
    /// Why it could not be read.
    pub problem: Option<PowerProblem>,
    /// How long it took, milliseconds.
    pub took_ms: u64,
}

/// Whether a host could be switched off, as `haven host fence test` found it. Nothing was switched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FenceTest {
    /// Which host.
    pub host: Name,
    /// What would switch it.
    pub driver: PowerKind,
    /// Where that is.
    pub at: String,
    /// What each of the other hosts read, the manager first.
    pub readings: Vec<PowerReading>,
}

#[cfg(test)]
mod tests {
    use super::{PowerKind, PowerSpec, is_agent};

    #[test]
    fn what_earlier_versions_wrote_is_read_and_they_can_read_what_is_written() {
        let old = r#"{"url":"http://x","user":"u","password":"p"}"#;
        let spec: PowerSpec = serde_json::from_str(old).unwrap();
        assert_eq!(spec, PowerSpec::redfish("http://x", "u", "p"));
        assert_eq!(serde_json::to_string(&spec).unwrap(), old);
        let agent = PowerSpec {
            driver: PowerKind::Agent,
            agent: Some("fence_ipmilan".into()),
            ..PowerSpec::default()
        };
        let written = serde_json::to_value(&agent).unwrap();
        assert_eq!(
            written,
            serde_json::json!({"driver": "agent", "url": "", "user": "", "password": "", "agent": "fence_ipmilan"})
        );
    }

    #[test]
    fn a_password_is_never_printed_and_stays_with_its_place() {
        let spec = PowerSpec::redfish("http://x", "u", "geheim");
        assert!(!format!("{spec:?}").contains("geheim"));
        assert!(spec.same_place(&PowerSpec::redfish("http://x", "u", "other")));
        assert!(!spec.same_place(&PowerSpec::redfish("http://y", "u", "geheim")));
        assert!(!spec.same_place(&PowerSpec { insecure: true, ..spec.clone() }));
    }

    #[test]
    fn what_is_wrong_with_a_spec_is_told_by_field() {
        let fields = |spec: &PowerSpec| -> Vec<&str> {
            spec.problems().into_iter().map(|(field, ..)| field).collect()
        };
        let good = PowerSpec::redfish("http://10.0.0.9", "u", "p");
        assert!(fields(&good).is_empty());
        let tls = PowerSpec { url: "https://10.0.0.9".into(), ..good.clone() };
        assert_eq!(fields(&tls), ["url"], "nothing verifies its certificate");
        let colons = vec!["AB"; 32].join(":");
        let pinned = PowerSpec { fingerprint: Some(colons), ..tls.clone() };
        assert!(fields(&pinned).is_empty());
        assert_eq!(fields(&PowerSpec { insecure: true, ..pinned.clone() }), ["power"]);
        assert_eq!(fields(&PowerSpec { fingerprint: Some("ab".into()), ..tls }), ["fingerprint"]);
        assert_eq!(fields(&PowerSpec { address: Some("x".into()), ..good }), ["driver"]);
        let agent = PowerSpec {
            driver: PowerKind::Agent,
            agent: Some("fence_ipmilan".into()),
            address: Some("10.0.0.9".into()),
            options: [("lanplus".to_owned(), "1".to_owned())].into(),
            ..PowerSpec::default()
        };
        assert!(fields(&agent).is_empty());
        for bad in ["action", "passwd", "snmp_priv_passwd", "ipmitool_path", "ssh_options", "a=b"] {
            let options = [(bad.to_owned(), "1".to_owned())].into();
            assert_eq!(fields(&PowerSpec { options, ..agent.clone() }), ["options"], "{bad}");
        }
        let name = Some("fence_../sh".to_owned());
        assert_eq!(fields(&PowerSpec { agent: name, ..agent }), ["agent"]);
    }

    #[test]
    fn only_names_of_fence_agents_are_such() {
        for good in ["fence_ipmilan", "fence_apc_snmp", "fence_ilo4"] {
            assert!(is_agent(good), "{good}");
        }
        for bad in
            ["", "fence_", "sh", "fence_a/../../bin/sh", "../fence_a", "fence_a b", "Fence_a"]
        {
            assert!(!is_agent(bad), "{bad}");
        }
    }
}
