//! How a command fails: a sentence, a hint, an exit code.
//!
//! 2 bad input, 3 not found, 4 conflict, 5 cluster not reached, 1 anything else.

use haven_client::ClientError;
use haven_model::{ModelError, api::ProblemBody, manifest::Problem};
use std::fmt;

/// What the API names as the file of an object that came in none.
const REQUEST: &str = "request";

/// A failure for a person.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    message: String,
    hint: String,
    problems: Vec<Problem>,
}

impl Failure {
    /// The same with other advice.
    pub fn hinting(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }

    fn new(code: u8, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: hint.into(), problems: Vec::new() }
    }
    /// Bad input.
    pub fn bad(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(2, message, hint)
    }
    /// Manifests that cannot be read.
    pub fn manifests(problems: Vec<Problem>) -> Self {
        let message = match problems.len() {
            1 => "one thing is wrong with the manifests; nothing was changed".to_owned(),
            n => format!("{n} things are wrong with the manifests; nothing was changed"),
        };
        Self { problems, ..Self::new(2, message, "") }
    }
    /// Not found.
    pub fn missing(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(3, message, hint)
    }
    /// Somebody else was quicker.
    pub fn conflict(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(4, message, hint)
    }
    /// Something did not happen in time, or did not work.
    pub fn failed(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(1, message, hint)
    }
    /// Only an exit code: everything was said already.
    pub fn quiet(code: u8) -> Self {
        Self::new(code, "", "")
    }
    /// Anything else.
    pub fn other(error: anyhow::Error) -> Self {
        match error.downcast::<ClientError>() {
            Ok(error) => error.into(),
            Err(error) => Self::new(1, format!("{error:#}"), ""),
        }
    }
    /// The same with another hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        // Its sentence says what is right, too.
        Self::bad(error.to_string(), "")
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Refused(body) => refused(*body),
            ClientError::Unreachable { at, .. } if at.starts_with('/') => Self::new(
                5,
                message,
                "is the daemon running? On one machine, `haven lab up` starts a cluster",
            ),
            ClientError::Unreachable { .. } => Self::new(
                5,
                message,
                "check the address, the fingerprint, and that Haven's daemon runs there",
            ),
            ClientError::NoAnswer { .. } => {
                Self::new(5, message, "look with `haven status`, then try again")
            }
            _ => Self::new(1, message, ""),
        }
    }
}

/// What a daemon refused.
fn refused(body: ProblemBody) -> Failure {
    let code = match body.status {
        400 | 413 | 422 => 2,
        404 => 3,
        409 => 4,
        503 => 5,
        _ => 1,
    };
    let ProblemBody { detail, hint, mut problems, .. } = body;
    // What was not in a file is no manifest for the person who asked.
    match (problems.len(), problems.iter().all(|p| p.file == REQUEST)) {
        (1, true) => {
            let one = problems.remove(0);
            Failure::new(code, one.message, one.hint)
        }
        (2.., true) => {
            let message = format!("{} things are wrong; nothing was changed", problems.len());
            Failure { problems, ..Failure::new(code, message, hint) }
        }
        _ => Failure { problems, ..Failure::new(code, detail, hint) },
    }
}

/// The line of a file that a problem is about, with a mark below the column.
fn source(problem: &Problem) -> Option<String> {
    if problem.file == "-" {
        return None;
    }
    let text = std::fs::read_to_string(&problem.file).ok()?;
    let line = text.lines().nth(usize::try_from(problem.line).ok()?.checked_sub(1)?)?;
    let column = usize::try_from(problem.column).unwrap_or(1).max(1);
    Some(format!("    | {line}\n    | {}^\n", " ".repeat(column - 1)))
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() {
            return Ok(());
        }
        writeln!(f, "error: {}", self.message)?;
        for problem in &self.problems {
            // What did not come from a file has no place.
            if problem.file == REQUEST {
                writeln!(f, "  {}", problem.message)?;
            } else {
                let Problem { file, line, column, message, .. } = problem;
                writeln!(f, "  {file}:{line}:{column}: {message}")?;
                f.write_str(&source(problem).unwrap_or_default())?;
            }
            if !problem.hint.is_empty() {
                writeln!(f, "    hint: {}", problem.hint)?;
            }
        }
        if self.hint.is_empty() { Ok(()) } else { writeln!(f, "  hint: {}", self.hint) }
    }
}

#[cfg(test)]
mod tests {
    use super::Failure;
    use haven_client::ClientError;
    use haven_model::{api::ProblemBody, manifest::Problem};
    use std::time::Duration;

    fn refusal(status: u16, problems: &[(&str, &str)]) -> Failure {
        let problem = |(file, message): &(&str, &str)| Problem {
            file: (*file).into(),
            line: 3,
            column: 9,
            message: (*message).into(),
            hint: "do better".into(),
        };
        let body = ProblemBody {
            title: "no".into(),
            status,
            detail: "it is refused".into(),
            hint: "ask an admin".into(),
            problems: problems.iter().map(problem).collect(),
            conflict: None,
        };
        ClientError::Refused(Box::new(body)).into()
    }

    #[test]
    fn every_way_to_fail_in_words() {
        let unreachable =
            |at: &str| ClientError::Unreachable { at: at.into(), why: "no route".into() }.into();
        let late = |change| ClientError::NoAnswer {
            at: "host1".into(),
            within: Duration::from_secs(60),
            change,
        };
        let all: [Failure; 12] = [
            refusal(400, &[]),
            refusal(403, &[]),
            refusal(404, &[]),
            refusal(409, &[]),
            refusal(503, &[]),
            refusal(422, &[("request", "no such pool")]),
            refusal(422, &[("request", "no such pool"), ("request", "no such image")]),
            refusal(422, &[("-", "no such pool")]),
            unreachable("/run/haven/api.sock"),
            unreachable("10.0.0.1:7443"),
            late(false).into(),
            late(true).into(),
        ];
        let said: Vec<String> = all.iter().map(|f| format!("{}: {f}", f.code)).collect();
        insta::assert_snapshot!(said.join(""));
        assert_eq!(Failure::quiet(1).to_string(), "");
    }
}
