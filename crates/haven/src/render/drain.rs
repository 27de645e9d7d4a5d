//! How a drain stands, for people.

use haven_model::{Name, api::DrainView};

/// A line for each VM that is left or away, and for each address.
pub fn drain_lines(view: &DrainView) -> Vec<String> {
    let vms = view.left.iter().chain(&view.away).map(|left| left.why.clone());
    let addresses = view.addresses.iter().filter(|_| view.away.is_empty()).cloned();
    vms.chain(addresses).collect()
}

/// What blocks, in lines below a sentence.
pub fn drain_blocks(view: &DrainView) -> String {
    drain_lines(view).iter().map(|line| format!("\n    {line}")).collect()
}

/// Whether nothing moves, so that what is left waits for something else.
pub fn is_stuck(view: &DrainView) -> bool {
    view.left.iter().chain(&view.away).all(|left| left.to.is_none())
}

/// The last sentence of a drain, or of the end of one.
pub fn drained(view: &DrainView, host: &Name) -> String {
    if view.drain.is_none() {
        return format!("what the drain of {host} had moved is back");
    }
    let moved = match view.moved.len() {
        0 => "nothing had to move".to_owned(),
        1 => "1 VM moved".to_owned(),
        n => format!("{n} VMs moved"),
    };
    let rest = match view.resting.len() {
        0 => String::new(),
        1 => ", 1 that does not run has its place there".to_owned(),
        n => format!(", {n} that do not run have their place there"),
    };
    let quorum = view.quorum.as_ref().map(|why| format!("\nbeware: {why}")).unwrap_or_default();
    format!("{host} is drained: {moved}{rest}{quorum}")
}
