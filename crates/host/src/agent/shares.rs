//! What each member of a service gets of its traffic: nothing, nothing new, or a weight. Pure.

use crate::balance::driver::{Member, MemberState};
use haven_model::{
    FrontendPlacement, MigrationPhase, Name, Placement, Snapshot, Versioned, VmPhase,
    service::{DRAIN_LABEL, TEMPLATE_LABEL},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// The members of a service, each with its part of the traffic.
pub(super) fn members(
    snapshot: &Snapshot,
    suspected: &BTreeSet<Name>,
    service: &Name,
    port: u16,
    placement: &FrontendPlacement,
) -> Vec<Member> {
    let (mut members, mut templates) = (Vec::new(), Vec::new());
    let (mut moving, mut well) = (Vec::new(), Vec::new());
    for (vm, object) in snapshot.members(service) {
        let Some(placed) = snapshot.placements.get(vm) else { continue };
        let Some(nic) = placed.nics.first() else { continue };
        let told = snapshot.told_of(vm);
        let ready = told.and_then(|status| status.ready);
        members.push(Member {
            name: vm.to_string(),
            ip: IpAddr::V4(nic.ip),
            port,
            state: member_state(snapshot, suspected, vm),
            healthy: ready == Some(true),
            weight: EVEN,
        });
        templates.push(object.meta.labels.get(TEMPLATE_LABEL).map_or("", String::as_str));
        moving.push(changes_owner(snapshot, vm, placed) || told.is_some_and(|t| t.unproven));
        well.push(ready != Some(false));
    }
    leave_idle(&mut members, &templates, placement);
    spare(&mut members, &moving, &well);
    split(&mut members, &templates, placement);
    members
}

/// The weight of a member while all share evenly.
const EVEN: u32 = 100;
/// HAProxy's largest weight.
const HEAVIEST: u64 = 256;

/// One whose template gets nothing drains: HAProxy goes on to check it, and what it has begun ends well.
fn leave_idle(members: &mut [Member], templates: &[&str], placement: &FrontendPlacement) {
    for (member, template) in members.iter_mut().zip(templates) {
        if member.state == MemberState::Ready && placement.gets_nothing(template) {
            member.state = MemberState::Drain;
        }
    }
}

/// A member that is about to change its host, or has and did not answer there yet, gets nothing new as long as others
/// serve and are well: it stands still for a moment, and what is sent to it then comes late.
fn spare(members: &mut [Member], moving: &[bool], well: &[bool]) {
    let mut others = members.iter().zip(moving.iter().zip(well));
    if !others
        .any(|(member, (moving, well))| member.state == MemberState::Ready && !moving && *well)
    {
        return;
    }
    for (member, moving) in members.iter_mut().zip(moving) {
        if *moving && member.state == MemberState::Ready {
            member.state = MemberState::Drain;
        }
    }
}

/// The last seconds of a copy, in which the guest may be stopped at any time.
const LAST_SECONDS: u64 = 2;

/// Whether a VM is being handed over to another host, or may be at any time. The copy of a large guest takes minutes,
/// in which it serves as ever.
fn changes_owner(snapshot: &Snapshot, vm: &Name, placement: &Versioned<Placement>) -> bool {
    if placement.moved_from.is_some() {
        return true;
    }
    if placement.moving_to.is_none() {
        return false;
    }
    let told = snapshot.migration_told(vm, &placement.host, placement.revision);
    told.is_some_and(|told| match told.phase {
        // A copy that has just begun says nothing of its rate.
        MigrationPhase::Copying => told
            .progress
            .as_ref()
            .and_then(|progress| progress.left.checked_div(progress.rate))
            .is_none_or(|seconds| seconds < LAST_SECONDS),
        MigrationPhase::Stopped => true,
        _ => false,
    })
}

/// Gives each member its weight, so that each template's members get its percentage together, whatever their number.
/// Exact as far as weights from 1 to 256 can tell.
fn split(members: &mut [Member], templates: &[&str], placement: &FrontendPlacement) {
    if placement.traffic.is_empty() {
        return;
    }
    let named = |template: &str| placement.traffic.get_key_value(template);
    // Members of templates that are not named are one group.
    let group = |template: &str| named(template).map(|(name, _)| name.as_str());
    let mut sizes: BTreeMap<Option<&str>, u64> = BTreeMap::new();
    for (member, template) in members.iter().zip(templates) {
        *sizes.entry(group(template)).or_default() += u64::from(member.state == MemberState::Ready);
    }
    // Millionths of a percent.
    let part = |template: &str| {
        let percent = named(template).map_or(placement.traffic_left(), |(_, percent)| *percent);
        u64::from(percent) * 1_000_000 / sizes.get(&group(template)).copied().unwrap_or(0).max(1)
    };
    let gets = |member: &Member| member.state == MemberState::Ready;
    let parts: Vec<u64> = templates.iter().map(|template| part(template)).collect();
    let most = parts.iter().zip(&*members).filter(|(_, m)| gets(m)).map(|(part, _)| *part).max();
    let Some(most) = most.filter(|most| *most > 0) else { return };
    for (member, part) in members.iter_mut().zip(parts).filter(|(member, _)| gets(member)) {
        let weight = (part * HEAVIEST + most / 2) / most;
        member.weight = u32::try_from(weight.max(1)).unwrap_or(EVEN);
    }
}

/// How a member stands in the balancer. A VM on a suspected or lost host is out at once, without waiting for checks; one
/// that has not passed its check since it started is not in yet: it boots, and HAProxy takes every newcomer for well
/// until its checks have failed.
fn member_state(snapshot: &Snapshot, suspected: &BTreeSet<Name>, vm: &Name) -> MemberState {
    let Some(placement) = snapshot.placements.get(vm) else {
        return MemberState::Down;
    };
    let Some(object) = snapshot.vms.get(vm) else {
        return MemberState::Down;
    };
    let suspected = suspected.contains(&placement.host);
    let serves = snapshot.told_of(vm).is_some_and(|status| {
        let has_answered = object.spec.check.is_none() || status.ready_ms.is_some();
        status.phase == VmPhase::Running && has_answered
    });
    if suspected || !serves {
        MemberState::Down
    } else if object.meta.deleting || object.meta.labels.contains_key(DRAIN_LABEL) {
        MemberState::Drain
    } else {
        MemberState::Ready
    }
}
