//! What the tests of rings in arbitrary memory draw from, whatever the rings' format.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use dataplane::chain::{Features, Layout};
use dataplane::ledger::Slot;
use dataplane::memory::GuestMemory;
use dataplane::queue_pair::QueuePair;
use dataplane::sys::{drain, signal};
use dataplane::RingSpec;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, RngSeed};

use crate::common::{eventfd, readable, receive, send, wire, WRITE};
use crate::dirty::pages_of;
use crate::walk::{Step, Write, REGIONS, RX_RING};

/// Always the same draws, so that a test that fails fails again.
pub fn cases(cases: u32) -> Cases {
    Cases { cases, rng_seed: RngSeed::Fixed(0x5eed), failure_persistence: None, ..Cases::default() }
}

/// An address that is inside memory, near its border, or anywhere.
pub fn address() -> impl Strategy<Value = u64> {
    let region = prop::sample::select(REGIONS.to_vec());
    prop_oneof![
        8 => (region.clone(), any::<u64>()).prop_map(|((start, size), offset)| start + offset % size),
        2 => (region, 0..64u64).prop_map(|((start, size), offset)| start + size - 32 + offset),
        1 => any::<u64>(),
        1 => (0..64u64).prop_map(|back| u64::MAX - back),
    ]
}

pub fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => 0..2048u32,
        2 => (1..200u32).prop_map(|descriptors| 16 * descriptors),
        1 => any::<u32>(),
        1 => Just(0x4000),
    ]
}

pub fn descriptor_bytes(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// In the direction that fits the ring.
pub fn good_flags(ring: u64) -> u16 {
    if ring == RX_RING {
        WRITE
    } else {
        0
    }
}

pub fn features() -> impl Strategy<Value = Features> {
    (any::<bool>(), prop::bool::weighted(0.8))
        .prop_map(|(event_index, indirect)| Features { event_index, indirect })
}

/// The descriptors that a pair is lent. The same ones serve every case.
pub struct Ends {
    pub wire: OwnedFd,
    pub tap: OwnedFd,
    pub rings: [[OwnedFd; 3]; 2],
}

impl Ends {
    pub fn new() -> Self {
        let (wire, tap) = wire();
        Self { wire, tap, rings: [(); 2].map(|()| [(); 3].map(|()| eventfd())) }
    }

    pub fn spec(
        &self,
        ring: usize,
        layout: Layout,
        next_avail: Option<u16>,
        ledger: Option<Slot>,
    ) -> RingSpec {
        let [kick, call, error] = self.rings[ring].each_ref().map(AsRawFd::as_raw_fd);
        RingSpec {
            layout,
            kick_fd: kick,
            call_fd: Some(call),
            error_fd: Some(error),
            next_avail,
            ledger,
            in_flight: None,
            log: None,
        }
    }
}

pub fn step(write: impl Strategy<Value = Write>) -> impl Strategy<Value = Step> {
    prop_oneof![
        16 => Just(Step::Take),
        4 => any::<u32>().prop_map(|written| Step::Complete { written }),
        1 => (0..4usize).prop_map(|count| Step::Untake { count }),
        2 => Just(Step::Publish),
        1 => Just(Step::Call),
        1 => Just(Step::Arm),
        1 => Just(Step::Disarm),
        1 => write.prop_map(Step::Write),
    ]
}

/// What a whole pair meets.
#[derive(Clone, Debug)]
pub struct Scene<Guest> {
    pub rx: Guest,
    pub tx: Guest,
    pub features: Features,
    pub mergeable: bool,
    /// Lengths of frames that wait in the TAP, with their headers, or without where they are shorter.
    pub frames: Vec<usize>,
    pub meanwhile: Vec<Write>,
}

pub fn scene<Guest: std::fmt::Debug>(
    guests: impl Strategy<Value = (Guest, Guest)>,
    meanwhile: impl Strategy<Value = Write>,
) -> impl Strategy<Value = Scene<Guest>> {
    let frame = prop_oneof![4 => 60..600usize, 1 => 1..20usize, 1 => 0x4000..0x8000usize];
    let frames = prop::collection::vec(frame, 0..12);
    (guests, features(), any::<bool>(), frames, prop::collection::vec(meanwhile, 0..12)).prop_map(
        |((rx, tx), features, mergeable, frames, meanwhile)| Scene {
            rx,
            tx,
            features,
            mergeable,
            frames,
            meanwhile,
        },
    )
}

impl<Guest> Scene<Guest> {
    /// Puts its frames on the wire. Some may not fit any more, as with any TAP.
    pub fn send_frames(&self, ends: &Ends) {
        for length in &self.frames {
            send(&ends.wire, &vec![0x5a; *length]);
        }
    }

    /// The pages that the guest writes itself meanwhile.
    pub fn guests_pages(&self) -> BTreeSet<u64> {
        self.meanwhile.iter().flat_map(|write| pages_of(write.address, write.data.len())).collect()
    }

    /// What the guest writes while the pair runs, each time with a kick.
    pub fn go_on(&self, ends: &Ends, memory: &GuestMemory) {
        for write in &self.meanwhile {
            write.make(memory);
            ends.rings.iter().for_each(|[kick, ..]| signal(kick.as_raw_fd()));
            while receive(&ends.wire).is_some() {}
        }
    }
}

/// Which rings of a stopped pair failed: those and no others were told of, in both ways.
pub fn told_failures(pair: &QueuePair, ends: &Ends) -> Result<(bool, bool), TestCaseError> {
    let failed = pair.failed();
    let errors = pair.take_ring_errors();
    prop_assert_eq!(errors.len(), usize::from(failed.0) + usize::from(failed.1), "{:?}", errors);
    for (has_failed, [_, _, error]) in [failed.0, failed.1].into_iter().zip(&ends.rings) {
        prop_assert_eq!(readable(error.as_raw_fd(), Duration::ZERO), has_failed);
        let _ = drain(error.as_raw_fd());
    }
    Ok(failed)
}
