//! What was done, as numbers that anyone may read while one thread writes.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter. Only whoever runs the rings writes, so a load and a store do for an addition.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        // Wrapping, because a reading that another process sent may have been set.
        self.0.store(self.get().wrapping_add(count), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// Makes of one list of names a reading, and the live counters it is a reading of.
macro_rules! counters {
    ($(#[$about:meta])* $reading:ident of $live:ident { $($(#[$note:meta])* $name:ident,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $reading {
            $($(#[$note])* pub $name: u64,)*
        }

        impl $reading {
            /// In the order of `values`.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            #[must_use]
            pub fn values(&self) -> [u64; Self::NAMES.len()] {
                [$(self.$name),*]
            }

            #[must_use]
            pub fn from_values([$($name),*]: [u64; Self::NAMES.len()]) -> Self {
                Self { $($name),* }
            }
        }

        #[derive(Debug, Default)]
        pub(crate) struct $live {
            $(pub(crate) $name: Counter,)*
        }

        impl $live {
            pub(crate) fn get(&self) -> $reading {
                $reading { $($name: self.$name.get()),* }
            }

            pub(crate) fn set(&self, reading: &$reading) {
                $(self.$name.set(reading.$name);)*
            }
        }
    };
}

counters! {
    /// What a queue pair did, in the guest's view: rx is TAP to guest. Bytes are those of frames, without the
    /// virtio-net header.
    Counters of LiveCounters {
        rx_packets,
        rx_bytes,
        /// The guest has no room for it, or it is shorter than its header.
        rx_dropped_length,
        /// For another driver, or with an offload that this one did not take.
        rx_dropped_stale,
        /// The kernel failed to hand it over.
        rx_dropped_error,
        rx_kicks,
        rx_calls,
        tx_packets,
        tx_bytes,
        /// The interface is down or gone.
        tx_dropped_interface,
        /// The kernel refuses the header or the length.
        tx_dropped_header,
        /// The kernel has no memory for it.
        tx_dropped_memory,
        tx_kicks,
        tx_calls,
    }
}

counters! {
    /// What was done with the chains of a ring that are handed out. Bytes are those of buffers.
    CallbackCounters of LiveCallbackCounters {
        /// Completed, or returned unused.
        chains,
        bytes_read,
        bytes_written,
        kicks,
        calls,
    }
}
