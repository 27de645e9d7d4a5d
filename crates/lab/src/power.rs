//! The power API of the lab machine, and beside it the watchdogs of its hosts: the few Redfish calls that tell and switch a host's power. It runs in the
//! fabric's namespace, so it works while a host is off or cut.

use crate::lab::Lab;
use anyhow::Result;
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
};

/// Where it listens.
pub const ADDRESS: &str = "10.88.0.254:8000";
/// `lab:lab`, Basic.
const LOGIN: &str = "Basic bGFiOmxhYg==";

/// Serves for ever.
///
/// # Errors
/// When the port is in use.
pub fn serve(lab: &Lab) -> Result<()> {
    let listener = TcpListener::bind(ADDRESS)?;
    for host in lab.hosts() {
        let lab = lab.clone();
        std::thread::spawn(move || crate::watchdog::keep(&lab, &host));
    }
    for stream in listener.incoming().flatten() {
        let lab = lab.clone();
        std::thread::spawn(move || answer(&lab, stream));
    }
    Ok(())
}

fn answer(lab: &Lab, stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    let (mut length, mut allowed) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap_or(0),
                "authorization" => allowed = value == LOGIN,
                _ => {}
            }
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let (status, text) = if allowed {
        let path = first.split_whitespace().nth(1).unwrap_or_default();
        handle(lab, &first, path, &String::from_utf8_lossy(&body))
    } else {
        ("401 Unauthorized", "{}".to_owned())
    };
    let mut stream = stream;
    let head = format!(
        "HTTP/1.0 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(text.as_bytes()).ok()
}

fn handle(lab: &Lab, first: &str, path: &str, body: &str) -> (&'static str, String) {
    let rest = path.strip_prefix("/redfish/v1/Systems/").unwrap_or_default();
    let (host, action) = rest.split_once('/').unwrap_or((rest, ""));
    if lab.host(host).is_err() {
        return ("404 Not Found", "{}".into());
    }
    if first.starts_with("GET") {
        let state = if lab.init(host).is_some() { "On" } else { "Off" };
        return ("200 OK", format!("{{\"PowerState\":\"{state}\"}}"));
    }
    if action != "Actions/ComputerSystem.Reset" {
        return ("404 Not Found", "{}".into());
    }
    let done = if body.contains("ForceOff") {
        lab.power_off(host)
    } else if body.contains("ForceRestart") {
        lab.power_off(host).and_then(|()| lab.power_on(host))
    } else {
        lab.power_on(host)
    };
    match done {
        Ok(()) => ("204 No Content", String::new()),
        Err(error) => {
            ("500 Internal Server Error", format!("{{\"error\":{:?}}}", error.to_string()))
        }
    }
}
