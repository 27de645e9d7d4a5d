//! Tests of [`super::vm_step`].

use super::vm_step::{Seen, Step, Wanted, backoff_ms, next};
use crate::vm::driver::Exit;
use haven_model::{
    Handover,
    vm::RestartPolicy::{Always, Never, OnFailure},
};

const RUN: Wanted = Wanted::Run { epoch: 3, resets: 0 };

fn seen() -> Seen {
    Seen {
        running: None,
        may_start: true,
        ended: None,
        backing_off: false,
        resets: 0,
        deleted: false,
        following: false,
        unstarted: false,
        handover: Handover::Broken,
        gave_up: false,
    }
}

#[test]
fn starts_only_in_a_session_and_after_its_pause() {
    assert_eq!(next(RUN, Always, &seen()), Step::Start);
    assert_eq!(next(RUN, Always, &Seen { may_start: false, ..seen() }), Step::Wait);
    assert_eq!(next(RUN, Always, &Seen { backing_off: true, ..seen() }), Step::Wait);
}

#[test]
fn a_process_of_another_epoch_is_killed_whatever_else_holds() {
    for running in [1, 2, 4] {
        assert_eq!(next(RUN, Always, &Seen { running: Some(running), ..seen() }), Step::Kill);
    }
    assert_eq!(next(RUN, Always, &Seen { running: Some(3), ..seen() }), Step::Settled);
    assert_eq!(next(Wanted::NotMine, Always, &Seen { running: Some(3), ..seen() }), Step::Kill);
    for running in [Some(3), None] {
        assert_eq!(next(Wanted::Unknown, Always, &Seen { running, ..seen() }), Step::Wait);
    }
    assert_eq!(next(Wanted::Delete, Always, &Seen { running: Some(3), ..seen() }), Step::Kill);
}

#[test]
fn the_restart_policy_decides_after_an_end() {
    let ended = |how| Seen { ended: Some(how), ..seen() };
    assert_eq!(next(RUN, Always, &ended(Exit::PoweredOff)), Step::Start);
    assert_eq!(next(RUN, OnFailure, &ended(Exit::PoweredOff)), Step::LeaveEnded);
    assert_eq!(next(RUN, OnFailure, &ended(Exit::Crashed)), Step::Start);
    assert_eq!(next(RUN, Never, &ended(Exit::Crashed)), Step::LeaveEnded);
}

#[test]
fn deleting_ends_cleans_and_settles() {
    assert_eq!(next(Wanted::Delete, Always, &seen()), Step::Clean);
    assert_eq!(next(Wanted::Delete, Always, &Seen { deleted: true, ..seen() }), Step::Settled);
    assert_eq!(next(Wanted::Stop, Always, &Seen { running: Some(3), ..seen() }), Step::Stop);
    assert_eq!(next(Wanted::Stop, Always, &seen()), Step::Settled);
}

#[test]
fn what_leaves_ends_first_and_is_not_started_again() {
    let leave = Wanted::Leave { attempt: 7 };
    assert_eq!(next(leave, Always, &Seen { running: Some(3), ..seen() }), Step::Stop);
    let unstarted = Seen { running: Some(3), unstarted: true, ..seen() };
    assert_eq!(next(leave, Always, &unstarted), Step::Kill);
    for ended in [None, Some(Exit::Crashed)] {
        assert_eq!(next(leave, Always, &Seen { ended, ..seen() }), Step::SayGone);
    }
    // The copy of an owner before may run yet.
    let pending = Seen { handover: Handover::Pending, ..seen() };
    assert_eq!(next(leave, Always, &pending), Step::Wait);
}

#[test]
fn a_guest_whose_memory_follows_runs_and_is_seen_to_until_all_is_there() {
    let run = Wanted::Run { epoch: 3, resets: 0 };
    let handover = Handover::Following;
    let arrived = Seen { running: Some(3), unstarted: true, handover, ..seen() };
    assert_eq!(next(run, Always, &arrived), Step::LetRun);
    let runs = Seen { running: Some(3), following: true, handover, ..seen() };
    assert_eq!(next(run, Always, &runs), Step::Follow);
    // The host before has ended: the driver knows whether all had come.
    assert_eq!(next(run, Always, &Seen { handover: Handover::Broken, ..runs }), Step::Follow);
    assert_eq!(next(Wanted::Run { epoch: 4, resets: 0 }, Always, &runs), Step::Kill);
    assert_eq!(next(Wanted::Stop, Always, &runs), Step::Stop);
    // Its process here is gone, and the one there can run it no more.
    assert_eq!(next(run, Always, &Seen { handover, ..seen() }), Step::Start);
}

#[test]
fn a_reset_is_carried_out_once() {
    let wanted = Wanted::Run { epoch: 3, resets: 2 };
    assert_eq!(next(wanted, Always, &Seen { running: Some(3), resets: 1, ..seen() }), Step::Reset);
    assert_eq!(
        next(wanted, Always, &Seen { running: Some(3), resets: 2, ..seen() }),
        Step::Settled
    );
}

#[test]
fn pauses_grow_and_are_bounded() {
    let pauses: Vec<u64> = (0..12).map(backoff_ms).collect();
    assert!(pauses.is_sorted());
    assert_eq!(pauses[0], 200);
    assert_eq!(pauses[11], 30_000);
}
