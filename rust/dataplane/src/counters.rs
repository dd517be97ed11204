//! What a queue pair did, as numbers that anyone may read while one thread writes.

use std::sync::atomic::{AtomicU64, Ordering};

/// A reading, in the guest's view: rx is TAP to guest. Bytes are those of frames, without the virtio-net header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub rx_dropped: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
    pub kicks: u64,
    pub calls: u64,
}

/// One counter. Only whoever runs the rings writes, so a load and a store do for an addition.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        // Wrapping, because `set_counters` takes what another process sent.
        self.0.store(self.get().wrapping_add(count), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of a running pair.
#[derive(Debug, Default)]
pub(crate) struct LiveCounters {
    pub(crate) rx_packets: Counter,
    pub(crate) rx_bytes: Counter,
    pub(crate) rx_dropped: Counter,
    pub(crate) tx_packets: Counter,
    pub(crate) tx_bytes: Counter,
    pub(crate) tx_dropped: Counter,
    pub(crate) kicks: Counter,
    pub(crate) calls: Counter,
}

impl LiveCounters {
    pub(crate) fn get(&self) -> Counters {
        Counters {
            rx_packets: self.rx_packets.get(),
            rx_bytes: self.rx_bytes.get(),
            rx_dropped: self.rx_dropped.get(),
            tx_packets: self.tx_packets.get(),
            tx_bytes: self.tx_bytes.get(),
            tx_dropped: self.tx_dropped.get(),
            kicks: self.kicks.get(),
            calls: self.calls.get(),
        }
    }

    pub(crate) fn set(&self, counters: &Counters) {
        self.rx_packets.0.store(counters.rx_packets, Ordering::Relaxed);
        self.rx_bytes.0.store(counters.rx_bytes, Ordering::Relaxed);
        self.rx_dropped.0.store(counters.rx_dropped, Ordering::Relaxed);
        self.tx_packets.0.store(counters.tx_packets, Ordering::Relaxed);
        self.tx_bytes.0.store(counters.tx_bytes, Ordering::Relaxed);
        self.tx_dropped.0.store(counters.tx_dropped, Ordering::Relaxed);
        self.kicks.0.store(counters.kicks, Ordering::Relaxed);
        self.calls.0.store(counters.calls, Ordering::Relaxed);
    }
}
