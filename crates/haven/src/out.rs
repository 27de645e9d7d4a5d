//! What goes to standard output.

use std::io::Write;

/// Prints it. A reader that has gone away (`| head`) ends the command quietly.
pub fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    if let Err(error) = written {
        if error.kind() != std::io::ErrorKind::BrokenPipe {
            eprintln!("error: standard output cannot be written: {error}");
        }
        std::process::exit(1);
    }
}

/// Prints warnings, each once, where they do not get into what is read by a program.
pub fn warn<'a>(warnings: impl Iterator<Item = &'a str>) {
    let warnings: std::collections::BTreeSet<&str> = warnings.filter(|w| !w.is_empty()).collect();
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

/// Prints a line.
pub fn line(text: impl std::fmt::Display) {
    print(&format!("{text}\n"));
}
