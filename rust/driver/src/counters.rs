//! What a driver did, as numbers that anyone may read while its thread writes.
//!
//! Owns:        the names and the order of these numbers.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread adds to, so a load and a store do for an addition.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.store(self.get() + count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a driver did so far: rx is what came from the backend, tx what went to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverCounters {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    /// The guest's own TAP did not take it.
    pub rx_dropped: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    /// Longer than the ring.
    pub tx_dropped: u64,
}

impl DriverCounters {
    /// In the order of `values`.
    pub const NAMES: [&'static str; 6] =
        ["rx_packets", "rx_bytes", "rx_dropped", "tx_packets", "tx_bytes", "tx_dropped"];

    #[must_use]
    pub fn values(&self) -> [u64; Self::NAMES.len()] {
        let Self { rx_packets, rx_bytes, rx_dropped, tx_packets, tx_bytes, tx_dropped } = *self;
        [rx_packets, rx_bytes, rx_dropped, tx_packets, tx_bytes, tx_dropped]
    }
}

/// The same, while the thread adds to it.
#[derive(Debug, Default)]
pub(crate) struct LiveDriverCounters {
    pub(crate) rx_packets: Counter,
    pub(crate) rx_bytes: Counter,
    pub(crate) rx_dropped: Counter,
    pub(crate) tx_packets: Counter,
    pub(crate) tx_bytes: Counter,
    pub(crate) tx_dropped: Counter,
}

impl LiveDriverCounters {
    pub(crate) fn get(&self) -> DriverCounters {
        DriverCounters {
            rx_packets: self.rx_packets.get(),
            rx_bytes: self.rx_bytes.get(),
            rx_dropped: self.rx_dropped.get(),
            tx_packets: self.tx_packets.get(),
            tx_bytes: self.tx_bytes.get(),
            tx_dropped: self.tx_dropped.get(),
        }
    }
}
