//! Split rings in memory of arbitrary content: whatever a guest writes, nothing outside its memory is touched, no limit
//! is passed, nothing panics, and everything ends.
//!
//! Content that is random throughout fails at the first look. So most of what is drawn here is almost right: addresses
//! near memory's borders, small indices, flags that mean something; and some of it changes while the ring is read.

#[path = "common/arbitrary.rs"]
mod arbitrary;
mod common;
#[path = "common/dirty.rs"]
mod dirty;
#[path = "common/walk.rs"]
mod walk;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use arbitrary::{
    address, cases, descriptor_bytes, features, good_flags, length, scene, step, told_failures, Ends,
};
use common::{eventfd, receive, INDIRECT, NEXT};
use dataplane::chain::Layout;
use dataplane::memory::GuestMemory;
use dataplane::queue_pair::{Error, QueuePair};
use dataplane::split::SplitRing;
use dataplane::{Config, Format, HostSide, Positions, RingSpec};
use dirty::Dirty;
use proptest::prelude::*;
use walk::{
    direction, guests_pages, memory, walk_split, Write, DEVICE_AREA, DRIVER_AREA, ENTRIES_MAX, HEADER,
    REGIONS, RX_RING, TX_RING,
};

/// Indirect tables, one behind the other in the last region.
const TABLES: u64 = 4;
const TABLE_LENGTH: u32 = 8;
const TABLE_SIZE: u64 = 16 * TABLE_LENGTH as u64;

/// A descriptor that may well be right.
fn good_descriptor(ring: u64) -> impl Strategy<Value = Vec<u8>> {
    let flags = good_flags(ring);
    let (start, size) = REGIONS[2];
    let buffer = (0..size - 2048, 12..2048u32, prop_oneof![3 => Just(flags), 2 => Just(flags | NEXT)]);
    let table =
        (0..TABLES, 1..=TABLE_LENGTH).prop_map(|(table, length)| (TABLE_SIZE * table, 16 * length, INDIRECT));
    (prop_oneof![4 => buffer, 1 => table], 0..ENTRIES_MAX).prop_map(move |((offset, length, flags), next)| {
        descriptor_bytes(start + offset, length, flags, next)
    })
}

fn descriptor(ring: u64) -> impl Strategy<Value = Vec<u8>> {
    let flags =
        prop_oneof![2 => Just(good_flags(ring)), 2 => Just(INDIRECT), 2 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..ENTRIES_MAX, 1 => any::<u16>()];
    (address(), length(), flags, next)
        .prop_map(|(address, length, flags, next)| descriptor_bytes(address, length, flags, next))
}

/// A write to any part of a ring, or to the buffers, which may be indirect tables.
fn write(ring: u64) -> impl Strategy<Value = Write> {
    let word = prop_oneof![6 => 0..2 * ENTRIES_MAX, 1 => any::<u16>(), 1 => 0xffc0..=0xffffu16];
    let in_table = (0..ENTRIES_MAX).prop_map(move |index| ring + 16 * u64::from(index));
    let anywhere_at_16 = address().prop_map(|address| address & !15);
    let field = prop_oneof![
        1 => (0..70u64).prop_map(move |field| ring + DRIVER_AREA + 2 * field),
        1 => (0..280u64).prop_map(move |field| ring + DEVICE_AREA + 2 * field),
    ];
    prop_oneof![
        6 => (in_table, descriptor(ring)).prop_map(|(address, data)| Write { address, data }),
        4 => (anywhere_at_16, prop::collection::vec(descriptor(ring), 1..8))
            .prop_map(|(address, table)| Write { address, data: table.concat() }),
        6 => (field, word).prop_map(|(address, word)| Write { address, data: word.to_le_bytes().to_vec() }),
        1 => (address(), prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(address, data)| Write { address, data }),
    ]
}

/// A ring as it is announced, and what is in it before the device looks: at first what may be right, then what is not.
#[derive(Clone, Debug)]
struct Guest {
    size: u16,
    /// Where the device begins; None is the used index.
    start: Option<u16>,
    /// How far ahead of that the guest is.
    ahead: u16,
    descriptors: Vec<Vec<u8>>,
    heads: Vec<u16>,
    /// Indirect tables, where descriptors that are right look for them.
    tables: Vec<Vec<u8>>,
    spoilt: Vec<Write>,
}

fn guest(ring: u64) -> impl Strategy<Value = Guest> {
    let size = prop_oneof![1 => (0..=6u32).prop_map(|power| 1u16 << power), 2 => Just(ENTRIES_MAX)];
    let start = prop_oneof![Just(None), Just(Some(0)), Just(Some(0xfff0)), any::<u16>().prop_map(Some)];
    let entries = usize::from(ENTRIES_MAX);
    let table =
        prop::collection::vec(good_descriptor(ring), TABLE_LENGTH as usize).prop_map(|table| table.concat());
    (
        (size, start, any::<u16>()),
        prop::collection::vec(good_descriptor(ring), entries),
        prop::collection::vec(0..ENTRIES_MAX, entries),
        prop::collection::vec(table, TABLES as usize),
        prop_oneof![Just(Vec::new()), prop::collection::vec(write(ring), 1..8)],
    )
        .prop_map(|((size, start, ahead), descriptors, heads, tables, spoilt)| Guest {
            size,
            start,
            // Mostly as far as the ring goes, else the ring would be refused at once.
            ahead: if ahead < 0x1000 { ahead } else { ahead % (size + 1) },
            descriptors,
            heads: heads.into_iter().map(|head| head % size).collect(),
            tables,
            spoilt,
        })
}

impl Guest {
    fn layout(&self, ring: u64) -> Layout {
        Layout {
            size: self.size.into(),
            descriptor_area: ring,
            driver_area: ring + DRIVER_AREA,
            device_area: ring + DEVICE_AREA,
        }
    }

    fn write_to(&self, ring: u64, memory: &GuestMemory) {
        let heads: Vec<u8> = self.heads.iter().flat_map(|head| head.to_le_bytes()).collect();
        memory.write(ring, &self.descriptors.concat()).unwrap();
        memory.write(ring + DRIVER_AREA + 4, &heads).unwrap();
        for (index, table) in self.tables.iter().enumerate() {
            memory.write(REGIONS[2].0 + TABLE_SIZE * index as u64, table).unwrap();
        }
        let index = self.start.unwrap_or(0).wrapping_add(self.ahead);
        memory.write(ring + DRIVER_AREA + 2, &index.to_le_bytes()).unwrap();
        self.spoilt.iter().for_each(|write| write.make(memory));
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_ring_gives_only_what_is_inside_memory_and_limits(
        (address, guest, steps) in prop::sample::select(vec![RX_RING, TX_RING])
            .prop_flat_map(|ring| (Just(ring), guest(ring), prop::collection::vec(step(write(ring)), 1..60))),
        features in features(),
    ) {
        let memory = memory();
        guest.write_to(address, &memory);
        let dirty = Dirty::new(&REGIONS);
        let before = dirty.look(&memory);
        let mut ring = SplitRing::new(&guest.layout(address), features, &memory).unwrap();
        ring.set_log(Some(dirty.of(&guest.layout(address))));
        prop_assert_eq!(ring.check_log(), Ok(()));
        ring.begin(guest.start, true);
        walk_split(&mut ring, &memory, direction(address), &steps);
        dirty.check(&before, &memory, &guests_pages(&steps));
    }
}

proptest! {
    #![proptest_config(cases(800))]

    #[test]
    fn a_pair_stops_and_starts_whatever_its_guest_writes(scenes in prop::collection::vec(
            scene((guest(RX_RING), guest(TX_RING)), prop_oneof![write(RX_RING), write(TX_RING)]),
            1..3,
        )) {
        let event = eventfd();
        let pair = QueuePair::new("arbitrary", event.as_raw_fd()).unwrap();
        let ends = Ends::new();
        for scene in scenes {
            let memory = memory();
            scene.rx.write_to(RX_RING, &memory);
            scene.tx.write_to(TX_RING, &memory);
            scene.send_frames(&ends);
            let dirty = Dirty::new(&REGIONS);
            let looked = dirty.look(&memory);
            let spec = |ring: usize, layout: Layout, start| RingSpec {
                log: Some(dirty.of(&layout)),
                ..ends.spec(ring, layout, start, None)
            };
            let config = Config {
                memory: Arc::clone(&memory),
                host: HostSide::Tap(ends.tap.as_raw_fd()),
                header_length: HEADER,
                frame_length_max: 1514,
                offloads: common::ALL_OFFLOADS,
                format: Format::Split,
                features: scene.features,
                mergeable: scene.mergeable,
                rx: Some(spec(0, scene.rx.layout(RX_RING), scene.rx.start)),
                tx: Some(spec(1, scene.tx.layout(TX_RING), scene.tx.start)),
            };
            pair.configure(&config).unwrap();
            let before = pair.counters();
            pair.start().unwrap();
            scene.go_on(&ends, &memory);
            let positions = pair.stop();
            prop_assert_eq!(pair.stop(), positions);
            dirty.check(&looked, &memory, &scene.guests_pages());
            // A ring that failed was told of, and stays where it is.
            let failed = told_failures(&pair, &ends)?;
            let frames = pair.counters().rx_packets - before.rx_packets;
            prop_assert!(frames <= scene.frames.len() as u64 + 12, "{} frames", frames);
            pair.start().unwrap();
            let Positions { rx, tx } = pair.stop();
            prop_assert!(!failed.0 || rx == positions.rx);
            prop_assert!(!failed.1 || tx == positions.tx);
            let _ = pair.take_ring_errors();
            ends.rings.iter().flatten().for_each(|fd| drop(dataplane::sys::drain(fd.as_raw_fd())));
            while receive(&ends.wire).is_some() || receive(&ends.tap).is_some() {}
        }
        // A thread that panicked would have closed the pair.
        prop_assert_eq!(pair.set_positions(None, None), Ok::<(), Error>(()));
    }
}
