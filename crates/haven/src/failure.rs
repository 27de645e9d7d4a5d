//! How a command fails: a sentence, a hint, an exit code.
//!
//! 2 bad input, 3 not found, 4 conflict, 5 cluster not reached, 1 anything else.

use haven_client::ClientError;
use haven_model::manifest::Problem;
use std::fmt;

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
    /// Bad input.
    pub fn bad(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code: 2, message: message.into(), hint: hint.into(), problems: Vec::new() }
    }
    /// Not found.
    pub fn missing(message: impl Into<String>) -> Self {
        Self { code: 3, message: message.into(), hint: String::new(), problems: Vec::new() }
    }
    /// Anything else.
    pub fn other(error: anyhow::Error) -> Self {
        match error.downcast::<ClientError>() {
            Ok(error) => error.into(),
            Err(error) => Self {
                code: 1,
                message: format!("{error:#}"),
                hint: String::new(),
                problems: Vec::new(),
            },
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Refused(body) => {
                let code = match body.status {
                    400 | 422 => 2,
                    404 => 3,
                    409 => 4,
                    503 => 5,
                    _ => 1,
                };
                Self { code, message, hint: body.hint.clone(), problems: body.problems.clone() }
            }
            ClientError::Unreachable { .. } => Self {
                code: 5,
                message,
                hint: "is the daemon running? On one machine, `haven lab up` starts a cluster"
                    .into(),
                problems: Vec::new(),
            },
            _ => Self { code: 1, message, hint: String::new(), problems: Vec::new() },
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", self.message)?;
        for problem in &self.problems {
            writeln!(
                f,
                "  {}:{}:{}: {}",
                problem.file, problem.line, problem.column, problem.message
            )?;
            let line = std::fs::read_to_string(&problem.file).unwrap_or_default();
            let line = usize::try_from(problem.line)
                .ok()
                .and_then(|n| line.lines().nth(n.checked_sub(1)?).map(str::to_owned));
            if let Some(line) = line {
                writeln!(f, "    | {line}")?;
                let column = usize::try_from(problem.column).unwrap_or(1).max(1);
                writeln!(f, "    | {}^", " ".repeat(column - 1))?;
            }
            if !problem.hint.is_empty() {
                writeln!(f, "    hint: {}", problem.hint)?;
            }
        }
        if self.hint.is_empty() { Ok(()) } else { writeln!(f, "  hint: {}", self.hint) }
    }
}
