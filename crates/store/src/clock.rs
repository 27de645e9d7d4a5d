//! Time as one daemon sees it.
//!
//! All waiting goes through tokio's clock, so that the simulator can pause and drive it. A rate lets the simulator
//! give each daemon a clock that runs a little fast or slow.

use std::time::Duration;
use tokio::{sync::watch, time::Instant};

/// Nanoseconds of a daemon's monotonic clock since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mono(pub u64);

impl Mono {
    /// Later by `span`.
    #[must_use]
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0 + nanos(span))
    }
    /// How long after `earlier`; zero when it is not.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// What the simulator lets a process do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Go on.
    Running,
    /// Its host is paused: it goes on when that is over.
    Paused,
    /// It was killed: it never does anything again.
    Dead,
}

/// A daemon's clock. Cheap to clone; all clones agree.
#[derive(Clone, Debug)]
pub struct Clock {
    origin: Instant,
    rate: f64,
    real: bool,
    run: Option<watch::Receiver<Run>>,
}

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub fn real() -> Self {
        Self { origin: Instant::now(), rate: 1.0, real: true, run: None }
    }

    /// A clock of the simulator: so many of its seconds pass in one of the simulator's.
    #[must_use]
    pub fn simulated(rate: f64) -> Self {
        Self { origin: Instant::now(), rate, real: false, run: None }
    }

    /// The same clock for a process that the simulator pauses and kills.
    #[must_use]
    pub fn driven_by(&self, run: watch::Receiver<Run>) -> Self {
        Self { run: Some(run), ..self.clone() }
    }

    /// Waits while the simulator has this process paused, and for ever once it is killed. Nothing on a real clock.
    pub async fn pass(&self) {
        let Some(mut run) = self.run.clone() else { return };
        loop {
            let now = *run.borrow_and_update();
            match now {
                Run::Running => return,
                Run::Paused => {}
                Run::Dead => std::future::pending().await,
            }
            if run.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Mono {
        Mono(nanos(self.origin.elapsed().mul_f64(self.rate)))
    }

    /// Nanoseconds of `CLOCK_BOOTTIME`, which goes on while the machine is suspended; in the simulator the same as
    /// [`Clock::now`].
    #[must_use]
    pub fn boottime_ns(&self) -> u64 {
        if !self.real {
            return self.now().0;
        }
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .expect("every kernel Haven runs on has CLOCK_BOOTTIME");
        nanos(Duration::from(time))
    }

    /// Waits for `span` of this clock.
    pub async fn sleep(&self, span: Duration) {
        tokio::time::sleep(span.div_f64(self.rate)).await;
        self.pass().await;
    }

    /// Waits until this clock shows `until`.
    pub async fn sleep_until(&self, until: Mono) {
        self.sleep(until.since(self.now())).await;
    }
}
