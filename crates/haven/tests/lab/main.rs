//! What users are promised, on a real lab: three hosts, real etcd, real QEMU, real HAProxy, guests that count. A
//! witness outside judges throughout: after the first sign of life of a newer copy of a VM there is none of an older.

mod backups;
mod balance;
mod clock;
mod clones;
mod commands;
mod copies;
mod crash;
mod disks;
mod encrypted;
mod faults;
mod fencing;
mod full;
mod hang;
mod hot;
mod input;
mod keeper;
mod lab;
mod lost_of_two;
mod mirrored;
mod moves;
mod network;
mod planned;
mod postcopy;
mod reserve;
mod rolling;
mod service;
mod snapshots;
mod storage;
mod store;
mod uplink;
mod witness;

use anyhow::Result;
use haven_lab::drive::Driver;
use lab::Lab;
use std::{path::PathBuf, time::Instant};
use witness::Witness;

struct Case {
    name: &'static str,
    run: fn(&mut Lab, &Witness) -> Result<()>,
}

const CASES: [Case; 49] = [
    Case { name: "a_killed_daemon_adopts_its_vms", run: faults::daemon_killed },
    Case { name: "a_killed_guard_is_started_again_and_disturbs_no_vm", run: faults::guard_killed },
    Case { name: "a_frozen_guard_is_replaced_and_disturbs_no_vm", run: faults::guard_frozen },
    Case {
        name: "a_store_frozen_for_two_seconds_disturbs_no_vm",
        run: faults::store_frozen_briefly,
    },
    Case { name: "the_frozen_leader_of_the_store_disturbs_no_vm", run: faults::member_frozen },
    Case { name: "a_stopped_daemon_loses_its_vms_and_never_twice", run: faults::daemon_stopped },
    Case { name: "a_host_that_is_cut_off_loses_its_vms_and_never_twice", run: faults::cut_off },
    Case { name: "two_hosts_cut_from_each_other_disturb_no_vm", run: faults::cut_from_one },
    Case { name: "a_host_that_nobody_hears_loses_its_vms_and_never_twice", run: faults::unheard },
    Case {
        name: "a_host_left_alone_runs_nothing_until_the_others_return",
        run: faults::quorum_lost,
    },
    Case { name: "a_paused_host_is_reset_by_its_watchdog", run: faults::paused_with_watchdog },
    Case {
        name: "a_paused_host_without_watchdog_ends_its_old_copies",
        run: faults::paused_without,
    },
    Case {
        name: "a_host_without_power_is_recovered_by_its_power_controller",
        run: fencing::by_power,
    },
    Case {
        name: "an_address_serves_without_a_member_beside_it_and_moves",
        run: service::address_moves,
    },
    Case { name: "a_service_is_replaced_under_load_and_no_question_fails", run: service::rolls },
    Case {
        name: "a_new_version_comes_at_once_or_by_weight_and_no_question_fails",
        run: service::versions,
    },
    Case { name: "a_guest_moves_live_and_nobody_notices", run: moves::live },
    Case { name: "a_move_that_breaks_leaves_exactly_one_copy", run: moves::broken },
    Case {
        name: "memory_follows_a_guest_that_writes_faster_than_the_wire_carries",
        run: postcopy::follows,
    },
    Case { name: "a_disk_of_one_host_goes_along_with_its_guest", run: disks::go_along },
    Case {
        name: "a_disk_on_two_hosts_holds_all_that_was_told_to_be_written_whatever_breaks",
        run: mirrored::outlives,
    },
    Case {
        name: "a_vm_that_may_be_kept_starts_elsewhere_before_its_host_is_proven_lost",
        run: mirrored::kept,
    },
    Case { name: "disks_come_go_and_grow_while_their_guest_runs", run: hot::come_go_and_grow },
    Case {
        name: "a_full_pool_holds_its_writers_until_there_is_room_here_or_elsewhere",
        run: full::presses,
    },
    Case {
        name: "a_vm_is_backed_up_while_it_runs_and_made_again_whatever_was_interrupted",
        run: backups::kept,
    },
    Case { name: "a_vm_is_put_back_to_a_snapshot_of_all_its_disks", run: snapshots::put_back_to },
    Case {
        name: "a_vm_is_put_back_to_copies_of_its_mirrored_disk",
        run: copies::kept_and_put_back,
    },
    Case { name: "encrypted_disks_lie_unreadable", run: encrypted::lie_unreadable },
    Case { name: "clones_are_vms_of_their_own", run: clones::are_vms_of_their_own },
    Case { name: "a_host_is_drained_under_load_and_no_question_fails", run: planned::drained },
    Case {
        name: "a_power_cut_in_the_middle_of_a_drain_leaves_exactly_one_copy",
        run: planned::power_cut,
    },
    Case { name: "a_busy_host_gives_a_guest_away", run: balance::relieved },
    Case { name: "hosts_are_restarted_one_after_another_and_no_guest_is", run: rolling::all },
    Case { name: "a_rehearsal_says_what_a_power_cut_then_does", run: planned::rehearsed },
    Case { name: "guests_reach_each_other_and_out_and_keep_their_address", run: network::reach },
    Case { name: "a_clock_that_jumps_disturbs_nothing", run: clock::jumps },
    Case { name: "a_host_without_its_uplink_gives_its_guests_away_live", run: uplink::cut },
    Case {
        name: "examples_work_as_they_are_and_a_shared_disk_outlives_its_host",
        run: storage::examples,
    },
    Case {
        name: "a_broken_member_of_the_store_is_told_and_begins_anew",
        run: store::member_broken,
    },
    Case { name: "a_full_disk_under_the_store_disturbs_no_vm_and_is_told", run: store::disk_full },
    Case { name: "only_the_cluster_speaks_to_its_store", run: store::only_the_cluster },
    Case {
        name: "a_daemon_killed_at_any_moment_loses_nothing_and_leaves_nothing",
        run: crash::killed_at_any_moment,
    },
    Case { name: "a_guest_that_hangs_is_reset_and_then_tried_elsewhere", run: hang::hangs },
    Case { name: "a_console_leads_into_a_guest_and_is_left_with_its_key", run: commands::console },
    Case { name: "one_vm_too_many_is_refused_and_changes_nothing", run: reserve::one_too_many },
    Case { name: "the_labs_commands_do_what_they_say", run: commands::lab_commands },
    Case { name: "a_disk_holds_what_its_image_held", run: storage::image_disk },
    Case { name: "a_vm_waits_for_a_missing_qemu_and_says_so", run: input::no_qemu },
    Case {
        name: "a_store_frozen_for_a_minute_disturbs_no_vm_while_all_hosts_answer",
        run: faults::store_frozen_for_long,
    },
];

/// A case on a lab of its own, after the other is gone: two cores do not carry eight hosts.
struct OwnLab {
    name: &'static str,
    hosts: u32,
    run: fn(&Driver) -> Result<()>,
}

const OWN_LABS: [OwnLab; 2] = [
    OwnLab {
        name: "a_lost_vote_goes_to_another_host_and_five_may_vote",
        hosts: 5,
        run: store::five_hosts,
    },
    OwnLab {
        name: "two_hosts_and_a_witness_survive_the_loss_of_any_of_them",
        hosts: 3,
        run: lost_of_two::witnessed,
    },
];

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root, to make network namespaces");
        return Ok(());
    }
    let dir = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/tmp/haven-test-lab".into());
    let mut lab = Lab::new(PathBuf::from(&dir))?;
    let is_wanted =
        |name: &str| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str()));
    let cases: Vec<&Case> = CASES.iter().filter(|case| is_wanted(case.name)).collect();
    println!("running {} tests", cases.len());
    let (mut passed, mut failed) = (0, 0);
    match lab.up() {
        Err(why) => {
            println!("the lab does not come up: {why:#}");
            failed = cases.len();
        }
        Ok(()) => {
            let witness = Witness::start(lab.dir.clone());
            for case in cases {
                let begin = Instant::now();
                let result = play(case, &mut lab, &witness);
                let took = begin.elapsed().as_secs_f64();
                match result {
                    Ok(()) => {
                        passed += 1;
                        println!("test {} ... ok ({took:.1} s)", case.name);
                    }
                    Err(why) => {
                        failed += 1;
                        println!("test {} ... FAILED ({took:.1} s): {why:#}", case.name);
                        println!("{}", lab.report());
                        break;
                    }
                }
            }
        }
    }
    if std::env::var_os("HAVEN_LAB_KEEP").is_none() {
        lab.haven(&["lab", "down"])?;
        for case in OWN_LABS.iter().filter(|case| is_wanted(case.name)) {
            if failed > 0 {
                break;
            }
            let begin = Instant::now();
            let binary = PathBuf::from(env!("CARGO_BIN_EXE_haven"));
            let own = Driver::new(binary, dir.clone().into(), case.hosts)?;
            let result = (case.run)(&own);
            let took = begin.elapsed().as_secs_f64();
            if let Err(why) = result {
                failed += 1;
                println!("test {} ... FAILED ({took:.1} s): {why:#}", case.name);
                println!("{}", own.report());
            } else {
                passed += 1;
                println!("test {} ... ok ({took:.1} s)", case.name);
            }
            own.haven(&["lab", "down"])?;
        }
    }
    println!("test result: {passed} passed; {failed} failed");
    std::process::exit(i32::from(failed > 0));
}

fn play(case: &Case, lab: &mut Lab, witness: &Witness) -> Result<()> {
    lab.all_well(witness)?;
    witness.forget();
    (case.run)(lab, witness)?;
    lab.all_well(witness)?;
    witness.verdict()
}
