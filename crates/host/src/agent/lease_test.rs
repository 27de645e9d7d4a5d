//! The second line behind the guard, in virtual time.

use super::lease::{Remains, second_line};
use haven_store::clock::Clock;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Notes when it was asked to end everything; something stays the first three times.
struct Noted {
    clock: Clock,
    at_ns: Mutex<Vec<u64>>,
}

#[async_trait::async_trait]
impl Remains for Noted {
    async fn cleared(&self) -> bool {
        let mut at = self.at_ns.lock().unwrap();
        at.push(self.clock.boottime_ns());
        at.len() > 3
    }
}

const MS: u64 = 1_000_000;

#[tokio::test(start_paused = true)]
async fn what_a_frozen_guard_leaves_ends_at_the_last_deadline_that_it_accepted() {
    let clock = Clock::simulated(1.0);
    let remains = Arc::new(Noted { clock: clock.clone(), at_ns: Mutex::default() });
    let accepted = Arc::new(AtomicU64::new(4_400 * MS));
    let seen: Arc<dyn Remains> = Arc::clone(&remains) as _;
    let task = tokio::spawn(second_line(clock.clone(), seen, Arc::clone(&accepted)));
    // Deadlines that move on in time cost nothing.
    for beat in 1..=4u64 {
        clock.sleep(Duration::from_millis(500)).await;
        accepted.store((4_400 + beat * 500) * MS, Ordering::Release);
    }
    clock.sleep(Duration::from_millis(4_400)).await;
    assert!(remains.at_ns.lock().unwrap().is_empty(), "the last deadline has not passed");
    clock.sleep(Duration::from_millis(200)).await;
    let at = remains.at_ns.lock().unwrap().clone();
    let late_ms = (at[0] - 6_400 * MS) / MS;
    assert!((20..25).contains(&late_ms), "it acted {late_ms} ms after the deadline");
    assert!(at.len() >= 4, "it did not give up while something was left");
    task.abort();
}
