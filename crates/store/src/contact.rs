//! How this daemon's own renewals fare: whether the store takes them, and since when it does again.

use crate::clock::{Clock, Mono};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

#[derive(Clone, Copy)]
struct Inner {
    /// When a renewal was acknowledged last; at first, when this daemon began.
    acknowledged: Mono,
    /// When the last long silence ended.
    recovered: Option<Mono>,
}

/// A daemon's contact with the store. Cheap to clone; all clones see the same.
#[derive(Clone)]
pub struct Contact {
    clock: Clock,
    inner: Arc<Mutex<Inner>>,
}

impl Contact {
    /// Of a daemon that begins now.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        let inner = Inner { acknowledged: clock.now(), recovered: None };
        Self { clock, inner: Arc::new(Mutex::new(inner)) }
    }

    fn inner(&self) -> Inner {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A renewal was acknowledged. It ends a silence if there was none for `long`.
    pub fn acknowledged(&self, long: Duration) {
        let now = self.clock.now();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if now.since(inner.acknowledged) > long {
            inner.recovered = Some(now);
        }
        inner.acknowledged = now;
    }

    /// How long ago the store took a renewal.
    #[must_use]
    pub fn silence(&self) -> Duration {
        self.clock.now().since(self.inner().acknowledged)
    }

    /// How long ago a long silence ended: nothing while one lasts. `None` when there was none.
    #[must_use]
    pub fn trouble(&self, long: Duration) -> Option<Duration> {
        let inner = self.inner();
        let now = self.clock.now();
        if now.since(inner.acknowledged) > long {
            return Some(Duration::ZERO);
        }
        inner.recovered.map(|at| now.since(at))
    }
}

#[cfg(test)]
mod tests {
    use super::Contact;
    use crate::clock::Clock;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_remembered_when_it_was_long() {
        let clock = Clock::simulated(1.0);
        let (contact, long) = (Contact::new(clock.clone()), Duration::from_secs(2));
        let seconds = |n: u64| clock.sleep(Duration::from_secs(n));
        for _ in 0..3 {
            seconds(1).await;
            contact.acknowledged(long);
        }
        assert_eq!(contact.trouble(long), None);
        seconds(3).await;
        assert_eq!(contact.trouble(long), Some(Duration::ZERO), "it lasts");
        assert_eq!(contact.silence(), Duration::from_secs(3));
        contact.acknowledged(long);
        seconds(1).await;
        contact.acknowledged(long);
        assert_eq!(contact.trouble(long), Some(Duration::from_secs(1)), "it ended a second ago");
    }
}
