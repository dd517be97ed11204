//! One packed ring, written by a guest that keeps the rules, and by one that breaks each of them.

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use common::{
    memfd, memory, region, PackedQueue, AVAIL, INDIRECT, MEMORY_SIZE, MEMORY_START, NEXT, USED, WRITE,
};
use dataplane::chain::{Chain, Direction, Features, Layout, RingError, CHAIN_BUFFERS_MAX};
use dataplane::ledger::Ledger;
use dataplane::memory::GuestMemory;
use dataplane::packed::{PackedRing, Position};

/// No power of two: a packed ring need not have one.
const SIZE: u16 = 7;
const HEADER: usize = 12;
const RING: u64 = MEMORY_START;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;
const TABLE: u64 = BUFFERS + 0x8001;
const ALL: Features = Features { event_index: true, indirect: true };
const NO_EVENTS: Features = Features { event_index: false, indirect: false };

fn at(index: u16, wrap: bool) -> Position {
    Position { index, wrap }
}

struct Bench {
    queue: PackedQueue,
    ring: PackedRing,
    buffers: Vec<libc::iovec>,
}

impl Bench {
    fn new(features: Features) -> Self {
        Self::at(features, Position::START)
    }

    fn at(features: Features, position: Position) -> Self {
        let memory = memory();
        let queue = PackedQueue::new(&memory, RING, SIZE, position);
        let mut ring = PackedRing::new(&queue.layout, features, &memory, None).unwrap();
        ring.begin(Some(position.bits()), true).unwrap();
        let _ = ring.call_due(); // the first is always due
        Self { queue, ring, buffers: Vec::new() }
    }

    fn take(&mut self) -> Result<Option<Chain>, RingError> {
        self.take_for(Direction::FromGuest)
    }

    fn take_for(&mut self, direction: Direction) -> Result<Option<Chain>, RingError> {
        self.buffers.clear();
        self.ring.take(direction, HEADER, &mut self.buffers)
    }

    fn lengths(&self) -> Vec<usize> {
        self.buffers.iter().map(|buffer| buffer.iov_len).collect()
    }

    fn position(&self) -> Position {
        Position::from_bits(self.ring.position_before(0))
    }

    /// Takes, completes and publishes one chain.
    fn use_one(&mut self) {
        let chain = self.take().unwrap().expect("a chain is there");
        self.ring.complete(&chain, 0);
        self.ring.publish();
    }
}

#[test]
fn a_chain_comes_with_all_its_buffers_and_is_used_under_its_id_in_its_first_place() {
    let mut bench = Bench::new(ALL);
    bench.queue.offer_chain(&[(BUFFERS, 12), (BUFFERS + 0x1000, 1500)], 0xabcd, 0);
    let chain = bench.take().unwrap().unwrap();
    assert_eq!((chain.length, chain.slots, chain.buffers), (1512, 2, 2));
    assert_eq!(bench.lengths(), [12, 1500]);
    bench.ring.complete(&chain, 0);
    assert_eq!(bench.queue.next_used(2), None, "not before it is published");
    bench.ring.publish();
    assert_eq!(bench.queue.next_used(2), Some((0xabcd, 0, 0)));
    assert!(bench.take().unwrap().is_none());
    assert_eq!(bench.position(), at(2, true));
}

#[test]
fn what_was_written_into_a_buffer_is_told_with_its_flag() {
    let mut bench = Bench::new(ALL);
    bench.queue.offer(BUFFERS, 100, 3, WRITE);
    let chain = bench.take_for(Direction::ToGuest).unwrap().unwrap();
    bench.ring.complete(&chain, 60);
    bench.ring.publish();
    assert_eq!(bench.queue.next_used(1), Some((3, 60, WRITE)));
}

#[test]
fn positions_go_round_with_the_guests_whatever_chains_straddle_the_end() {
    for start in [at(0, true), at(6, true), at(5, false), at(6, false)] {
        let mut bench = Bench::at(ALL, start);
        for round in 0..20u16 {
            let slots = 1 + round % 3;
            let buffers = vec![(BUFFERS, 64); slots.into()];
            bench.queue.offer_chain(&buffers, round, 0);
            bench.use_one();
            assert_eq!(bench.queue.next_used(slots), Some((round, 0, 0)));
            assert_eq!(bench.position(), bench.queue.next_avail);
        }
    }
}

#[test]
fn a_ring_may_be_full_and_may_have_one_entry() {
    let memory = memory();
    for size in [1, 2, 7] {
        let mut queue = PackedQueue::new(&memory, RING, size, Position::START);
        let mut ring = PackedRing::new(&queue.layout, ALL, &memory, None).unwrap();
        ring.begin(Some(Position::START.bits()), true).unwrap();
        let mut buffers = Vec::new();
        for lap in 0..5 {
            for id in 0..size {
                queue.offer(BUFFERS, 64, id, 0);
            }
            for id in 0..size {
                let chain = ring.take(Direction::FromGuest, HEADER, &mut buffers).unwrap();
                assert!(chain.is_some(), "lap {lap}, {id} of {size}");
                ring.complete(&chain.unwrap(), 0);
            }
            let more = ring.take(Direction::FromGuest, HEADER, &mut buffers);
            assert!(more.unwrap().is_none());
            ring.publish();
            for id in 0..size {
                assert_eq!(queue.next_used(1), Some((id, 0, 0)));
            }
            assert_eq!(queue.next_used(1), None);
        }
    }
}

#[test]
fn several_chains_are_shown_at_once_by_the_first() {
    let mut bench = Bench::at(ALL, at(5, true));
    for id in 0..4 {
        bench.queue.offer(BUFFERS, 64, id, 0);
    }
    for _ in 0..4 {
        let chain = bench.take().unwrap().unwrap();
        bench.ring.complete(&chain, 0);
    }
    assert_eq!(bench.queue.next_used(1), None);
    bench.ring.publish();
    for id in 0..4 {
        assert_eq!(bench.queue.next_used(1), Some((id, 0, 0)));
    }
}

#[test]
fn untaken_chains_are_taken_again() {
    let mut bench = Bench::at(ALL, at(6, true));
    bench.queue.offer(BUFFERS, 64, 8, 0);
    bench.queue.offer_chain(&[(BUFFERS, 64), (BUFFERS, 64)], 9, 0);
    let slots = bench.take().unwrap().unwrap().slots + bench.take().unwrap().unwrap().slots;
    assert_eq!(Position::from_bits(bench.ring.position_before(slots)), at(6, true));
    bench.ring.untake(slots);
    assert_eq!(bench.position(), at(6, true));
    bench.use_one();
    bench.use_one();
    assert_eq!(bench.queue.next_used(1), Some((8, 0, 0)));
    assert_eq!(bench.queue.next_used(2), Some((9, 0, 0)));
}

#[test]
fn an_indirect_table_may_lie_anywhere_and_counts_as_one_slot() {
    let mut bench = Bench::new(ALL);
    // Of its descriptors only place and direction count (section 2.8.7).
    bench.queue.descriptor_at(TABLE, BUFFERS, 12, 77, NEXT | AVAIL);
    bench.queue.descriptor_at(TABLE + 16, BUFFERS, 700, 78, NEXT | USED);
    bench.queue.offer(TABLE, 32, 5, INDIRECT | WRITE);
    let chain = bench.take().unwrap().unwrap();
    assert_eq!((chain.slots, chain.length), (1, 712));
    assert_eq!(bench.lengths(), [12, 700]);
    bench.ring.complete(&chain, 0);
    bench.ring.publish();
    assert_eq!(bench.queue.next_used(1), Some((5, 0, 0)));
}

#[test]
fn a_buffer_across_two_regions_is_two_buffers() {
    let fd = memfd(MEMORY_SIZE);
    let half = MEMORY_SIZE / 2;
    let regions = [region(&fd, MEMORY_START + half, half, 0), region(&fd, MEMORY_START, half, half)];
    let memory = Arc::new(GuestMemory::new(&regions).unwrap());
    let mut queue = PackedQueue::new(&memory, RING, SIZE, Position::START);
    let mut ring = PackedRing::new(&queue.layout, ALL, &memory, None).unwrap();
    ring.begin(Some(Position::START.bits()), true).unwrap();
    queue.offer(MEMORY_START + half - 100, 300, 0, 0);
    let mut buffers = Vec::new();
    let chain = ring.take(Direction::FromGuest, HEADER, &mut buffers).unwrap().unwrap();
    assert_eq!((chain.buffers, chain.length), (2, 300));
}

#[test]
fn what_was_not_made_available_in_this_lap_is_not_there() {
    for (wrap, flags) in [(true, 0), (true, AVAIL | USED), (true, USED), (false, 0), (false, AVAIL)] {
        let mut bench = Bench::at(ALL, at(0, wrap));
        bench.queue.descriptor(0, BUFFERS, 64, 0, flags);
        assert!(bench.take().unwrap().is_none(), "{wrap} {flags:#x}");
        assert!(!bench.ring.arm());
    }
}

#[test]
fn a_chain_goes_on_into_none_that_is_taken_whatever_its_guest_made_of_that() {
    let mut bench = Bench::new(ALL);
    bench.queue.offer(BUFFERS, 64, 0, 0);
    assert!(bench.take().unwrap().is_some());
    let position = bench.position();
    (1..SIZE).for_each(|id| bench.queue.offer(BUFFERS, 64, id, NEXT));
    // Available for the next lap, although the device has it still.
    bench.queue.descriptor(0, BUFFERS, 64, 0, USED);
    assert_eq!(bench.take().unwrap_err(), RingError::ChainLength { limit: SIZE.into() });
    assert_eq!(bench.position(), position);
}

/// What a guest wrote, and the error it must lead to.
type Hostile = (&'static str, fn(&mut PackedQueue), RingError);

#[test]
fn what_cannot_be_is_an_error_and_takes_nothing() {
    const END: u64 = MEMORY_START + MEMORY_SIZE;
    let outside = |address, length| RingError::OutsideMemory { address, length };
    let cases: [Hostile; 18] = [
        ("below memory", |q| q.offer(MEMORY_START - 1, 64, 0, 0), outside(MEMORY_START - 1, 64)),
        ("behind memory", |q| q.offer(END, 1, 0, 0), outside(END, 1)),
        ("across the end", |q| q.offer(END - 10, 11, 0, 0), outside(END - 10, 11)),
        ("wraps around", |q| q.offer(u64::MAX - 10, 64, 0, 0), outside(u64::MAX - 10, 64)),
        ("huge", |q| q.offer(BUFFERS, u32::MAX, 0, 0), outside(BUFFERS, u32::MAX.into())),
        ("empty", |q| q.offer(BUFFERS, 0, 0, 0), RingError::EmptyBuffer { index: 0 }),
        (
            "direction",
            |q| q.offer(BUFFERS, 64, 0, WRITE),
            RingError::WrongDirection { index: 0, expected: Direction::FromGuest },
        ),
        (
            "no room for the header",
            |q| q.offer(BUFFERS, 11, 0, 0),
            RingError::ChainTooShort { length: 11, header_length: 12 },
        ),
        ("goes on where nothing is", |q| q.offer(BUFFERS, 64, 0, NEXT), RingError::NotAvailable { index: 1 }),
        (
            "goes on in the lap before",
            |q| {
                q.offer(BUFFERS, 64, 0, NEXT);
                q.descriptor(1, BUFFERS, 64, 0, USED);
            },
            RingError::NotAvailable { index: 1 },
        ),
        (
            "never ends",
            |q| (0..SIZE).for_each(|_| q.offer(BUFFERS, 64, 0, NEXT)),
            RingError::ChainLength { limit: SIZE.into() },
        ),
        ("indirect, no table", |q| q.offer(TABLE, 0, 0, INDIRECT), RingError::IndirectLength { length: 0 }),
        (
            "indirect, part of one",
            |q| q.offer(TABLE, 17, 0, INDIRECT),
            RingError::IndirectLength { length: 17 },
        ),
        ("indirect, outside", |q| q.offer(END - 8, 16, 0, INDIRECT), outside(END - 8, 16)),
        (
            "indirect and next",
            |q| q.offer(TABLE, 16, 0, INDIRECT | NEXT),
            RingError::IndirectWithNext { index: 0 },
        ),
        (
            "indirect behind another",
            |q| {
                q.offer(BUFFERS, 64, 0, NEXT);
                q.offer(TABLE, 16, 0, INDIRECT);
            },
            RingError::IndirectInChain { index: 1 },
        ),
        (
            "indirect, nested",
            |q| {
                q.descriptor_at(TABLE, TABLE, 16, 0, INDIRECT);
                q.offer(TABLE, 16, 0, INDIRECT);
            },
            RingError::IndirectNested { index: 0 },
        ),
        (
            "indirect, wrong direction behind a right one",
            |q| {
                q.descriptor_at(TABLE, BUFFERS, 16, 0, 0);
                q.descriptor_at(TABLE + 16, BUFFERS, 16, 0, WRITE);
                q.offer(TABLE, 32, 0, INDIRECT);
            },
            RingError::WrongDirection { index: 1, expected: Direction::FromGuest },
        ),
    ];
    for (name, write, expected) in cases {
        let mut bench = Bench::new(ALL);
        write(&mut bench.queue);
        assert_eq!(bench.take().unwrap_err(), expected, "{name}");
        assert_eq!(bench.position(), Position::START, "{name}");
    }
}

#[test]
fn an_indirect_table_longer_than_a_read_takes_is_an_error() {
    for count in [CHAIN_BUFFERS_MAX + 1, 70_000] {
        let mut bench = Bench::new(ALL);
        for index in 0..count as u64 {
            bench.queue.descriptor_at(TABLE + 16 * index, BUFFERS, 1, 0, 0);
        }
        bench.queue.offer(TABLE, 16 * count as u32, 0, INDIRECT);
        assert_eq!(bench.take().unwrap_err(), RingError::ChainLength { limit: CHAIN_BUFFERS_MAX });
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_an_error() {
    let mut bench = Bench::new(NO_EVENTS);
    bench.queue.offer(TABLE, 16, 0, INDIRECT);
    assert_eq!(bench.take().unwrap_err(), RingError::IndirectNotNegotiated { index: 0 });
}

#[test]
fn a_guest_that_makes_taken_descriptors_available_again_gains_nothing() {
    let mut bench = Bench::new(ALL);
    for id in 0..SIZE {
        bench.queue.offer(BUFFERS, 64, id, 0);
    }
    let chains: Vec<_> = (0..SIZE).map(|_| bench.take().unwrap().unwrap()).collect();
    for id in 0..SIZE {
        bench.queue.offer(BUFFERS, 64, id, 0); // none of them came back
    }
    assert!(bench.take().unwrap().is_none());
    chains.iter().for_each(|chain| bench.ring.complete(chain, 0));
    bench.ring.publish();
    assert_eq!(bench.position(), at(0, false));
}

#[test]
fn a_call_is_due_when_the_used_position_passes_the_event_also_around_the_end() {
    for start in [at(0, true), at(5, true), at(4, false), at(6, false)] {
        let mut bench = Bench::at(ALL, start);
        let event = bench.queue.advance(start, 3);
        bench.queue.set_driver_event(event, 2);
        let mut due = Vec::new();
        for _ in 0..9 {
            bench.queue.offer(BUFFERS, 64, 0, 0);
            bench.use_one();
            due.push(bench.ring.call_due());
        }
        let fourth_only = [false, false, false, true, false, false, false, false, false];
        assert_eq!(due, fourth_only, "from {start:?}");
    }
}

#[test]
fn an_event_inside_a_chain_is_passed_with_the_chain() {
    let mut bench = Bench::at(ALL, at(5, true));
    bench.queue.set_driver_event(at(0, false), 2);
    bench.queue.offer_chain(&[(BUFFERS, 64); 4], 0, 0);
    bench.use_one();
    assert!(bench.ring.call_due());
    assert!(!bench.ring.call_due());
}

#[test]
fn a_call_due_laps_ago_is_due_after_the_batch() {
    let mut bench = Bench::new(ALL);
    bench.queue.set_driver_event(at(1, true), 2);
    for _ in 0..2 * SIZE + 1 {
        bench.queue.offer(BUFFERS, 64, 0, 0);
        bench.use_one();
    }
    assert!(bench.ring.call_due(), "one slot, or two laps and one slot");
}

#[test]
fn an_event_outside_the_ring_means_always() {
    let mut bench = Bench::new(ALL);
    bench.queue.set_driver_event(at(SIZE, true), 2);
    bench.queue.offer(BUFFERS, 64, 0, 0);
    bench.use_one();
    assert!(bench.ring.call_due());
}

#[test]
fn flags_decide_where_no_event_is_named() {
    for features in [ALL, NO_EVENTS] {
        let mut bench = Bench::new(features);
        assert!(!bench.ring.call_due(), "nothing was used");
        // 3 is reserved; a position counts only where events were negotiated.
        for (flags, expected) in [(0, true), (1, false), (0, true), (3, true), (2, !features.event_index)] {
            bench.queue.set_driver_event(at(6, false), flags);
            bench.queue.offer(BUFFERS, 64, 0, 0);
            bench.use_one();
            assert_eq!(bench.ring.call_due(), expected, "{features:?} {flags}");
        }
    }
}

#[test]
fn arming_asks_for_a_kick_at_the_next_chain_and_sees_one_that_came_before() {
    let mut bench = Bench::at(ALL, at(6, true));
    assert!(!bench.ring.arm());
    assert_eq!(bench.queue.device_event(), (at(6, true), 2));
    bench.queue.offer(BUFFERS, 64, 0, 0);
    assert!(bench.ring.arm());
    bench.ring.disarm();
    assert_eq!(bench.queue.device_event().1, 1);
    bench.use_one();
    assert!(!bench.ring.arm());
    assert_eq!(bench.queue.device_event(), (at(0, false), 2));
}

#[test]
fn without_events_kicks_are_asked_for_by_flag() {
    let mut bench = Bench::new(NO_EVENTS);
    bench.ring.disarm();
    assert_eq!(bench.queue.device_event().1, 0);
    assert!(!bench.ring.arm());
    assert_eq!(bench.queue.device_event().1, 0);
    bench.ring.disarm();
    assert_eq!(bench.queue.device_event().1, 1);
    bench.queue.offer(BUFFERS, 64, 0, 0);
    assert!(bench.ring.arm());
    assert_eq!(bench.queue.device_event().1, 0);
}

#[test]
fn a_ring_begins_where_it_is_told() {
    let mut bench = Bench::at(ALL, at(4, false));
    assert_eq!(bench.position(), at(4, false));
    bench.ring.begin(Some(at(3, true).bits()), true).unwrap();
    assert_eq!(bench.position(), at(3, true));
    assert!(bench.ring.call_due(), "a call may have been lost before");
    let outside = bench.ring.begin(Some(at(SIZE, true).bits()), true);
    assert_eq!(outside, Err(RingError::Position { index: SIZE, size: SIZE }));
    assert_eq!(bench.ring.begin(None, true), Err(RingError::PositionUnknown));
    assert_eq!(bench.position(), at(3, true));
}

#[test]
fn a_layout_that_cannot_be_is_refused() {
    let memory = memory();
    let good = PackedQueue::new(&memory, RING, SIZE, Position::START).layout;
    let end = MEMORY_START + MEMORY_SIZE;
    let cases = [
        (Layout { size: 0, ..good }, "a packed ring has 0 entries, it must have 1 to 32768"),
        (Layout { size: 32769, ..good }, "a packed ring has 32769 entries, it must have 1 to 32768"),
        (Layout { size: 65537, ..good }, "a packed ring has 65537 entries, it must have 1 to 32768"),
        (Layout { descriptor_area: RING + 8, ..good }, "descriptor ring at 0x100008 is not aligned to 16"),
        (
            Layout { driver_area: RING + 2, ..good },
            "driver event suppression at 0x100002 is not aligned to 4",
        ),
        (
            Layout { device_area: RING + 1, ..good },
            "device event suppression at 0x100001 is not aligned to 4",
        ),
        (
            Layout { device_area: end, ..good },
            "device event suppression at 0x500000, 0x4 bytes, is not inside one guest memory region",
        ),
        (
            Layout { descriptor_area: end - 96, ..good },
            "descriptor ring at 0x4fffa0, 0x70 bytes, is not inside one guest memory region",
        ),
    ];
    for (layout, reason) in cases {
        assert_eq!(PackedRing::new(&layout, ALL, &memory, None).unwrap_err().to_string(), reason);
    }
}

#[test]
fn positions_travel_with_the_wrap_counter_in_bit_15() {
    for (position, bits) in [(at(0, true), 0x8000), (at(0, false), 0), (at(0x7fff, true), 0xffff)] {
        assert_eq!(position.bits(), bits);
        assert_eq!(Position::from_bits(bits), position);
    }
}

#[test]
fn a_file_that_is_no_ledger_is_refused() {
    let file = Ledger::create(2).unwrap();
    assert!(Ledger::map(file.as_raw_fd(), 2).is_ok());
    let reason =
        |fd: &std::os::fd::OwnedFd, rings| Ledger::map(fd.as_raw_fd(), rings).unwrap_err().to_string();
    assert_eq!(reason(&file, 3), "ledger: has 16384 bytes, 3 rings need 24576");
    assert_eq!(reason(&memfd(8192), 1), "ledger: is not sealed against shrinking");
    assert!(Ledger::map(file.as_raw_fd(), 2).unwrap().slot(2).is_none());
}
