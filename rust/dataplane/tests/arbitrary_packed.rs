//! Packed rings in memory of arbitrary content, and ledgers of arbitrary content: whatever a guest or another process
//! writes, nothing outside the guest's memory is touched, no limit is passed, nothing panics, and everything ends.
//!
//! As in arbitrary_split.rs most of what is drawn is almost right.

#[path = "common/arbitrary.rs"]
mod arbitrary;
mod common;
#[path = "common/dirty.rs"]
mod dirty;
#[path = "common/walk.rs"]
mod walk;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use arbitrary::{
    address, cases, descriptor_bytes, features, good_flags, length, scene, step, told_failures, Ends,
};
use common::{eventfd, AVAIL, INDIRECT, NEXT, USED};
use dataplane::chain::{Features, Layout};
use dataplane::ledger::{Ledger, Slot};
use dataplane::memory::GuestMemory;
use dataplane::packed::{PackedRing, Position};
use dataplane::queue_pair::{Error, QueuePair};
use dataplane::{Config, Format, HostSide, Positions, RingSpec};
use dirty::Dirty;
use proptest::prelude::*;
use walk::{
    direction, guests_pages, memory, walk_packed, Write, DEVICE_AREA, DRIVER_AREA, ENTRIES_MAX, HEADER,
    REGIONS, RX_RING, TX_RING,
};

/// A descriptor of the ring: what its flags say beside whose turn it is, and whether that is the driver's word or
/// arbitrary.
#[derive(Clone, Debug)]
struct Entry {
    address: u64,
    length: u32,
    id: u16,
    flags: u16,
    /// None: available in the lap that the device is in.
    turn: Option<u16>,
}

fn good_entry(ring: u64) -> impl Strategy<Value = Entry> {
    let flags = good_flags(ring);
    let (start, size) = REGIONS[2];
    let flags = prop_oneof![4 => Just(flags), 1 => Just(flags | NEXT)];
    (0..size - 2048, 12..2048u32, any::<u16>(), flags).prop_map(move |(offset, length, id, flags)| Entry {
        address: start + offset,
        length,
        id,
        flags,
        turn: None,
    })
}

fn any_entry(ring: u64) -> impl Strategy<Value = Entry> {
    let flags =
        prop_oneof![2 => Just(good_flags(ring)), 2 => Just(INDIRECT), 2 => 0..8u16, 1 => any::<u16>()];
    let turn = prop_oneof![3 => Just(None), 1 => prop::sample::select(vec![0, AVAIL, USED, AVAIL | USED]).prop_map(Some)];
    (address(), length(), any::<u16>(), flags, turn).prop_map(|(address, length, id, flags, turn)| Entry {
        address,
        length,
        id,
        flags,
        turn,
    })
}

fn entry(ring: u64) -> impl Strategy<Value = Entry> {
    prop_oneof![6 => good_entry(ring), 1 => any_entry(ring)]
}

/// A write to any part of a ring, or to the buffers, which may be indirect tables.
fn write(ring: u64) -> impl Strategy<Value = Write> {
    let raw = |entry: Entry| {
        let flags = entry.flags | entry.turn.unwrap_or(AVAIL);
        descriptor_bytes(entry.address, entry.length, entry.id, flags)
    };
    let in_ring = (0..ENTRIES_MAX).prop_map(move |index| ring + 16 * u64::from(index));
    let flags = (0..ENTRIES_MAX).prop_map(move |index| ring + 16 * u64::from(index) + 14);
    let event = prop::sample::select(vec![DRIVER_AREA, DRIVER_AREA + 2, DEVICE_AREA, DEVICE_AREA + 2])
        .prop_map(move |offset| ring + offset);
    let word = prop_oneof![3 => 0..4u16, 3 => 0..2 * ENTRIES_MAX, 1 => any::<u16>()];
    let turn = prop::sample::select(vec![0, AVAIL, USED, AVAIL | USED]);
    prop_oneof![
        4 => (in_ring, any_entry(ring)).prop_map(move |(address, entry)| Write { address, data: raw(entry) }),
        4 => (flags, turn).prop_map(|(address, turn)| Write { address, data: turn.to_le_bytes().to_vec() }),
        4 => (address(), prop::collection::vec(any_entry(ring), 1..8)).prop_map(move |(address, table)| Write {
            address: address & !15,
            data: table.into_iter().flat_map(raw).collect(),
        }),
        2 => (event, word).prop_map(|(address, word)| Write { address, data: word.to_le_bytes().to_vec() }),
        1 => (address(), prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(address, data)| Write { address, data }),
    ]
}

/// A ring as it is announced, and what is in it before the device looks.
#[derive(Clone, Debug)]
struct Guest {
    size: u16,
    start: Position,
    entries: Vec<Entry>,
    spoilt: Vec<Write>,
}

fn guest(ring: u64) -> impl Strategy<Value = Guest> {
    let size = prop_oneof![1 => 1..=ENTRIES_MAX, 1 => Just(ENTRIES_MAX)];
    (
        (size, any::<u16>(), any::<bool>()),
        prop::collection::vec(entry(ring), usize::from(ENTRIES_MAX)),
        prop_oneof![Just(Vec::new()), prop::collection::vec(write(ring), 1..8)],
    )
        .prop_map(|((size, index, wrap), entries, spoilt)| Guest {
            size,
            start: Position { index: index % size, wrap },
            entries,
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
        for (index, entry) in self.entries.iter().enumerate().take(self.size.into()) {
            // Entries before the start are the next lap's.
            let wrap = self.start.wrap == (index >= usize::from(self.start.index));
            let turn = entry.turn.unwrap_or(if wrap { AVAIL } else { USED });
            let raw = descriptor_bytes(entry.address, entry.length, entry.id, entry.flags | turn);
            memory.write(ring + 16 * index as u64, &raw).unwrap();
        }
        self.spoilt.iter().for_each(|write| write.make(memory));
    }
}

fn slot() -> (OwnedFd, Slot) {
    let file = Ledger::create(1).unwrap();
    let slot = Ledger::map(file.as_raw_fd(), 1).unwrap().slot(0).unwrap();
    (file, slot)
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_ring_gives_only_what_is_inside_memory_and_limits(
        (address, guest, steps) in prop::sample::select(vec![RX_RING, TX_RING])
            .prop_flat_map(|ring| (Just(ring), guest(ring), prop::collection::vec(step(write(ring)), 1..80))),
        features in features(),
    ) {
        let memory = memory();
        guest.write_to(address, &memory);
        let (_file, slot) = slot();
        let new = || PackedRing::new(&guest.layout(address), features, &memory, Some(slot.clone())).unwrap();
        let dirty = Dirty::new(&REGIONS);
        let before = dirty.look(&memory);
        let mut ring = new();
        ring.set_log(Some(dirty.of(&guest.layout(address))));
        prop_assert_eq!(ring.check_log(), Ok(()));
        ring.begin(Some(guest.start.bits()), true).unwrap();
        // A successor goes on there, whatever the guest wrote meanwhile.
        let position = walk_packed(&mut ring, &memory, direction(address), &steps);
        dirty.check(&before, &memory, &guests_pages(&steps));
        prop_assert_eq!(new().recover(), Ok(Position::from_bits(position)));
    }

    #[test]
    fn a_ledger_of_any_content_gives_a_position_in_the_ring_or_none(
        guest in guest(RX_RING),
        (from, to, count) in (any::<u16>(), any::<u16>(), prop_oneof![3 => 0..6u16, 1 => any::<u16>()]),
        is_written in prop::bool::weighted(0.9),
        log in prop::collection::vec((any::<u16>(), any::<u16>(), any::<u32>()), 8),
        is_right in any::<bool>(),
    ) {
        let memory = memory();
        guest.write_to(RX_RING, &memory);
        let (file, slot) = slot();
        let near = |bits: u16| ((bits & 0x7fff) % (guest.size + guest.size / 8 + 1)) | (bits & 0x8000);
        let intent = u64::from(near(from)) | u64::from(near(to)) << 16 | u64::from(count) << 32
            | u64::from(is_written) << 63;
        let mut words = vec![intent];
        for (number, (position, id, written)) in log.into_iter().enumerate() {
            let position = if number == 0 && is_right { near(from) } else { near(position) };
            words.push(u64::from(position) | u64::from(id) << 16 | u64::from(written) << 32);
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // SAFETY: the buffer is as long as we say.
        let put = unsafe { libc::pwrite(file.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        prop_assert_eq!(put, bytes.len() as isize);
        let features = Features { event_index: true, indirect: true };
        let mut ring = PackedRing::new(&guest.layout(RX_RING), features, &memory, Some(slot)).unwrap();
        let everything = || {
            REGIONS.map(|(start, size)| {
                let mut data = vec![0; size as usize];
                memory.read(start, &mut data).unwrap();
                data
            })
        };
        let before = everything();
        match ring.begin(None, true) {
            Ok(()) => {
                let position = Position::from_bits(ring.position_before(0));
                prop_assert_eq!(position.bits(), near(to));
                prop_assert!(position.index < guest.size);
            }
            Err(_) => prop_assert_eq!(&everything(), &before),
        }
        // At most descriptors of the ring have changed, which stands at the very beginning.
        let ring_size = 16 * usize::from(guest.size);
        let after = everything();
        prop_assert_eq!(&after[0][ring_size..], &before[0][ring_size..]);
        prop_assert_eq!(&after[1..], &before[1..]);
    }
}

proptest! {
    #![proptest_config(cases(800))]

    #[test]
    fn a_pair_stops_and_is_succeeded_whatever_its_guest_writes(
        scene in scene((guest(RX_RING), guest(TX_RING)), prop_oneof![write(RX_RING), write(TX_RING)]),
    ) {
        let event = eventfd();
        let ends = Ends::new();
        let ledger = Ledger::create(2).unwrap();
        let ledger = Ledger::map(ledger.as_raw_fd(), 2).unwrap();
        let memory = memory();
        scene.rx.write_to(RX_RING, &memory);
        scene.tx.write_to(TX_RING, &memory);
        scene.send_frames(&ends);
        let dirty = Dirty::new(&REGIONS);
        let before = dirty.look(&memory);
        let spec = |ring: usize, layout: Layout, start: Position| RingSpec {
            log: Some(dirty.of(&layout)),
            ..ends.spec(ring, layout, Some(start.bits()), ledger.slot(ring))
        };
        let config = Config {
            memory: Arc::clone(&memory),
            host: HostSide::Tap(ends.tap.as_raw_fd()),
            header_length: HEADER,
            frame_length_max: 1514,
            offloads: common::ALL_OFFLOADS,
            format: Format::Packed,
            features: scene.features,
            mergeable: scene.mergeable,
            rx: Some(spec(0, scene.rx.layout(RX_RING), scene.rx.start)),
            tx: Some(spec(1, scene.tx.layout(TX_RING), scene.tx.start)),
        };
        let [pair, successor] = ["arbitrary", "successor"].map(|name| {
            let pair = QueuePair::new(name, event.as_raw_fd()).unwrap();
            pair.configure(&config).unwrap();
            pair
        });
        pair.start().unwrap();
        scene.go_on(&ends, &memory);
        let positions = pair.stop();
        prop_assert_eq!(pair.stop(), positions);
        dirty.check(&before, &memory, &scene.guests_pages());
        // A ring that failed was told of.
        told_failures(&pair, &ends)?;
        // Who was told nothing finds the same.
        prop_assert_eq!(successor.set_positions(None, None), Ok::<(), Error>(()));
        prop_assert_eq!(successor.positions(), positions);
        successor.start().unwrap();
        let Positions { rx, tx } = successor.stop();
        prop_assert!(rx.is_some_and(|rx| rx & 0x7fff < scene.rx.size));
        prop_assert!(tx.is_some_and(|tx| tx & 0x7fff < scene.tx.size));
    }
}
