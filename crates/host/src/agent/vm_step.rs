//! What to do about one VM next. Synchronous and pure: all that the VM's task knows goes in, one step comes out.

use crate::vm::driver::Exit;
use haven_model::{Handover, vm::RestartPolicy};

/// What the store wants of this host for this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Run it under this epoch.
    Run {
        /// The placement's epoch.
        epoch: u64,
        /// Resets asked for so far.
        resets: u64,
    },
    /// It runs elsewhere and is to move here live: make ready to take it.
    Receive {
        /// The epoch under which it will run here.
        epoch: u64,
        /// The attempt.
        attempt: i64,
    },
    /// It ran here and has a new owner, to whom this host hands it over.
    HandOver {
        /// The attempt.
        attempt: i64,
    },
    /// It is placed here and is to start elsewhere, or to have its place there: it ends here, and that is said.
    Leave {
        /// The attempt.
        attempt: i64,
    },
    /// It is placed here and shall not run.
    Stop,
    /// It is placed here and shall be gone with all that it had.
    Delete,
    /// It is not this host's. Nothing of it may run here.
    NotMine,
    /// Its records are there and cannot be read by this version: it stays as it is.
    Unknown,
}

/// What is seen here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The epoch of the process that runs, if one does.
    pub running: Option<u64>,
    /// This host has an open session, and the live copy is not older than it.
    pub may_start: bool,
    /// How the last process under the wanted epoch ended by itself.
    pub ended: Option<Exit>,
    /// A pause after a failure is not over.
    pub backing_off: bool,
    /// Resets carried out so far.
    pub resets: u64,
    /// What a finished step left: the volumes are gone.
    pub deleted: bool,
    /// The process that runs has not been let run: it takes, or took, a guest from elsewhere.
    pub unstarted: bool,
    /// Part of the memory of the guest that runs is yet to come from the host that had it before.
    pub following: bool,
    /// How the copy stands that the owner before had.
    pub handover: Handover,
    /// This attempt has failed here already.
    pub gave_up: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make volumes and network ready and start it.
    Start,
    /// Ask the guest to end, then end it.
    Stop,
    /// End it at once.
    Kill,
    /// Press its reset button.
    Reset,
    /// Remove its volumes and files of this host.
    Clean,
    /// It ended by itself and stays so.
    LeaveEnded,
    /// Make ready to take a guest from elsewhere.
    Receive,
    /// See to a process that takes a guest.
    Attend,
    /// Hand the guest over to its new owner.
    HandOver,
    /// Let a guest run that was handed over.
    LetRun,
    /// See to a guest that runs and whose memory follows.
    Follow,
    /// Say that nothing of it runs here.
    SayGone,
    /// Nothing; it is as wanted.
    Settled,
    /// Nothing now; a pause or a session must come first.
    Wait,
}

/// Decides.
#[must_use]
pub fn next(wanted: Wanted, policy: RestartPolicy, seen: &Seen) -> Step {
    match (wanted, seen.running) {
        (Wanted::Unknown, _) => Step::Wait,
        (Wanted::HandOver { .. }, _) => Step::HandOver,
        (Wanted::Receive { epoch, .. }, running) => receive(epoch, running, seen),
        // It may run elsewhere yet: nothing of it is started or removed here.
        (Wanted::Run { .. } | Wanted::Delete, None) if seen.handover == Handover::Pending => {
            Step::Wait
        }
        (Wanted::Run { epoch, .. }, Some(running)) if running == epoch && seen.unstarted => {
            match seen.handover {
                Handover::Pending => Step::Wait,
                Handover::Whole | Handover::Following => Step::LetRun,
                Handover::Broken => Step::Kill,
            }
        }
        (Wanted::Run { epoch, .. }, Some(running)) if running == epoch && seen.following => {
            Step::Follow
        }
        (Wanted::Stop | Wanted::Leave { .. }, Some(_)) if seen.unstarted => Step::Kill,
        (Wanted::Run { epoch, .. }, Some(running)) if running != epoch => Step::Kill,
        (Wanted::Run { resets, .. }, Some(_)) if resets > seen.resets => Step::Reset,
        (Wanted::Run { .. }, Some(_)) | (Wanted::Stop, None) => Step::Settled,
        // Somebody wants it anew: how it ended does not count any more.
        (Wanted::Run { resets, .. }, None) if resets > seen.resets => {
            start(RestartPolicy::Always, seen)
        }
        (Wanted::Run { .. }, None) => start(policy, seen),
        (Wanted::Stop | Wanted::Leave { .. }, Some(_)) => Step::Stop,
        (Wanted::Leave { .. }, None) if seen.handover == Handover::Pending => Step::Wait,
        (Wanted::Leave { .. }, None) => Step::SayGone,
        (Wanted::Delete | Wanted::NotMine, Some(_)) => Step::Kill,
        (Wanted::Delete | Wanted::NotMine, None) if seen.deleted => Step::Settled,
        (Wanted::Delete | Wanted::NotMine, None) => Step::Clean,
    }
}

fn receive(epoch: u64, running: Option<u64>, seen: &Seen) -> Step {
    match running {
        // What an earlier daemon or an earlier attempt left is no use.
        Some(running) if running != epoch || !seen.unstarted || seen.gave_up => Step::Kill,
        Some(_) => Step::Attend,
        None if seen.may_start && !seen.gave_up => Step::Receive,
        None => Step::Wait,
    }
}

fn start(policy: RestartPolicy, seen: &Seen) -> Step {
    let stays = match (policy, seen.ended) {
        (_, None) | (RestartPolicy::Always, _) => false,
        (RestartPolicy::Never, Some(_)) => true,
        (RestartPolicy::OnFailure, Some(exit)) => exit == Exit::PoweredOff,
    };
    if stays {
        Step::LeaveEnded
    } else if seen.may_start && !seen.backing_off {
        Step::Start
    } else {
        Step::Wait
    }
}

/// The pause before start number `restarts` + 1: 0.2 s, doubled each time, at most 30 s.
#[must_use]
pub fn backoff_ms(restarts: u32) -> u64 {
    (200u64 << restarts.min(8)).min(30_000)
}
