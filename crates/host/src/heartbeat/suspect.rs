//! Who hears whom, and who is therefore suspected. Synchronous; time is passed in.

use super::Beat;
use haven_model::{LONGEST_LEASE, Name};
use haven_store::clock::Mono;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

struct Peer {
    heard: Mono,
    number: u64,
    unheard: BTreeSet<Name>,
    /// How long it may be silent by its own timers.
    silence: Duration,
}

/// What one host knows of all hosts' hearing.
pub struct Watchers {
    me: Name,
    silence: Duration,
    peers: BTreeMap<Name, Peer>,
    reunions: u64,
}

impl Watchers {
    /// `silence`: a host is unheard after so long.
    #[must_use]
    pub fn new(me: Name, silence: Duration) -> Self {
        Self { me, silence, peers: BTreeMap::new(), reunions: 0 }
    }

    /// The timers were changed.
    pub fn set_silence(&mut self, silence: Duration) {
        self.silence = silence;
    }

    /// How long a host may be silent: by this host's timers or by its own, whichever is longer.
    fn patience(&self, peer: &Peer) -> Duration {
        self.silence.max(peer.silence)
    }

    /// These are the hosts of the cluster; a new one counts as heard just now.
    pub fn members<'a>(&mut self, hosts: impl Iterator<Item = &'a Name>, now: Mono) {
        let hosts: BTreeSet<&Name> = hosts.filter(|host| **host != self.me).collect();
        self.peers.retain(|host, _| hosts.contains(host));
        for host in hosts {
            self.peers.entry(host.clone()).or_insert_with(|| Peer {
                heard: now,
                number: 0,
                unheard: BTreeSet::new(),
                silence: Duration::ZERO,
            });
        }
    }

    /// A datagram came; true when its sender hears others than before. One that is not newer than the last of its
    /// sender is ignored.
    pub fn heard(&mut self, beat: &Beat, now: Mono) -> bool {
        let own = self.silence;
        let Some(peer) = self.peers.get_mut(&beat.from).filter(|peer| beat.number > peer.number)
        else {
            return false;
        };
        let returned = now.since(peer.heard) > own.max(peer.silence);
        peer.silence = Duration::from_millis(beat.silence_ms.min(LONGEST_LEASE.0));
        peer.heard = now;
        peer.number = beat.number;
        let differs = peer.unheard != beat.unheard;
        let hears_me = peer.unheard.contains(&self.me) && !beat.unheard.contains(&self.me);
        self.reunions += u64::from(returned || hears_me);
        peer.unheard.clone_from(&beat.unheard);
        differs || returned
    }

    /// Whom this host does not hear.
    #[must_use]
    pub fn unheard(&self, now: Mono) -> BTreeSet<Name> {
        self.peers
            .iter()
            .filter(|(_, peer)| now.since(peer.heard) > self.patience(peer))
            .map(|(host, _)| host.clone())
            .collect()
    }

    /// With whom this host cannot speak: it does not hear them, or they do not hear it.
    #[must_use]
    pub fn silent(&self, now: Mono) -> BTreeSet<Name> {
        let deaf = self.peers.iter().filter(|(_, peer)| peer.unheard.contains(&self.me));
        let mut silent = self.unheard(now);
        silent.extend(deaf.map(|(host, _)| host.clone()));
        silent
    }

    /// How often another host was heard again, or heard this one again.
    #[must_use]
    pub fn reunions(&self) -> u64 {
        self.reunions
    }

    /// When the next host becomes unheard if nothing is heard until then.
    #[must_use]
    pub fn next_unheard(&self, now: Mono) -> Option<Mono> {
        let ends = self.peers.values().map(|peer| peer.heard.plus(self.patience(peer)));
        // `unheard` asks for more than the silence.
        ends.filter(|end| *end >= now).min().map(|end| end.plus(Duration::from_millis(1)))
    }

    /// Whom a majority of its watchers does not hear, as far as this host can tell. A host that hears less than half
    /// of the cluster suspects nobody: it is rather itself that is cut off.
    #[must_use]
    pub fn suspected(&self, now: Mono) -> BTreeSet<Name> {
        let unheard = self.unheard(now);
        let all = self.peers.len() + 1;
        let heard = all - unheard.len();
        if 2 * heard <= all {
            return BTreeSet::new();
        }
        // Watchers of a host are all others that are heard here, and this host itself.
        self.peers
            .keys()
            .filter(|host| {
                let voices: Vec<bool> = self
                    .peers
                    .iter()
                    .filter(|(other, _)| other != host && !unheard.contains(*other))
                    .map(|(_, peer)| peer.unheard.contains(*host))
                    .chain([unheard.contains(*host)])
                    .collect();
                2 * voices.iter().filter(|silent| **silent).count() > voices.len()
            })
            .cloned()
            .collect()
    }
}
