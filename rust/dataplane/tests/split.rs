//! One ring, written by a guest that keeps the rules, and by one that breaks each of them.

mod common;

use std::sync::Arc;

use common::{memfd, memory, region, Queue, INDIRECT, MEMORY_SIZE, MEMORY_START, NEXT, WRITE};
use dataplane::chain::{Chain, Direction, Features, Layout, RingError, CHAIN_BUFFERS_MAX};
use dataplane::memory::GuestMemory;
use dataplane::split::SplitRing;

const SIZE: u16 = 8;
const HEADER: usize = 12;
const RING: u64 = MEMORY_START;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;
const ALL: Features = Features { event_index: true, indirect: true };

struct Bench {
    queue: Queue,
    ring: SplitRing,
    buffers: Vec<libc::iovec>,
}

impl Bench {
    fn new(features: Features) -> Self {
        Self::at(features, 0)
    }

    fn at(features: Features, position: u16) -> Self {
        let memory = memory();
        let queue = Queue::new(&memory, RING, SIZE, position);
        let mut ring = SplitRing::new(&queue.layout, features, &memory).unwrap();
        ring.begin(None, true);
        let _ = ring.call_due(); // the first is always due
        Self { queue, ring, buffers: Vec::new() }
    }

    fn take(&mut self) -> Result<Option<Chain>, RingError> {
        self.buffers.clear();
        self.ring.take(Direction::FromGuest, HEADER, &mut self.buffers)
    }

    fn lengths(&self) -> Vec<usize> {
        self.buffers.iter().map(|buffer| buffer.iov_len).collect()
    }

    /// Takes, completes and publishes one chain.
    fn use_one(&mut self) {
        let chain = self.take().unwrap().expect("a chain is there");
        self.ring.complete(&chain, 0);
        self.ring.publish();
    }
}

#[test]
fn a_chain_comes_with_all_its_buffers_and_is_used_under_its_head() {
    let mut bench = Bench::new(ALL);
    bench.queue.descriptor(3, BUFFERS, 12, NEXT, 1);
    bench.queue.descriptor(1, BUFFERS + 0x1000, 1500, 0, 0);
    bench.queue.offer(3);
    let chain = bench.take().unwrap().unwrap();
    assert_eq!((chain.length, chain.slots, chain.buffers), (1512, 2, 2));
    assert_eq!(bench.lengths(), [12, 1500]);
    bench.ring.complete(&chain, 7);
    assert_eq!(bench.queue.used_index(), 0, "not before it is published");
    bench.ring.publish();
    assert_eq!(bench.queue.next_used(), Some((3, 7)));
    assert!(bench.take().unwrap().is_none());
}

#[test]
fn positions_wrap_around_with_the_guests() {
    let mut bench = Bench::at(ALL, 0xfffd);
    for round in 0..6u16 {
        bench.queue.descriptor(round, BUFFERS, 64, 0, 0);
        bench.queue.offer(round);
        bench.use_one();
        assert_eq!(bench.queue.next_used(), Some((round, 0)));
    }
    assert_eq!(bench.ring.next_avail(), 3);
    assert_eq!(bench.queue.used_index(), 3);
}

#[test]
fn an_untaken_chain_is_taken_again() {
    let mut bench = Bench::new(ALL);
    bench.queue.descriptor(5, BUFFERS, 64, 0, 0);
    bench.queue.offer(5);
    assert!(bench.take().unwrap().is_some());
    bench.ring.untake(1);
    assert_eq!(bench.ring.next_avail(), 0);
    bench.use_one();
    assert_eq!(bench.queue.next_used(), Some((5, 0)));
}

#[test]
fn an_indirect_table_may_lie_anywhere_and_counts_as_one_slot() {
    let mut bench = Bench::new(ALL);
    let table = BUFFERS + 0x8001;
    bench.queue.descriptor(2, table, 48, INDIRECT, 0);
    bench.queue.descriptor_at(table, BUFFERS, 12, NEXT, 2);
    bench.queue.descriptor_at(table + 32, BUFFERS, 700, 0, 0);
    bench.queue.offer(2);
    let chain = bench.take().unwrap().unwrap();
    assert_eq!((chain.slots, chain.length), (1, 712));
}

#[test]
fn an_indirect_descriptor_may_end_an_ordinary_chain() {
    let mut bench = Bench::new(ALL);
    let table = BUFFERS + 0x8000;
    bench.queue.descriptor(0, BUFFERS, 12, NEXT, 7);
    bench.queue.descriptor(7, table, 16, INDIRECT, 0);
    bench.queue.descriptor_at(table, BUFFERS, 700, 0, 0);
    bench.queue.offer(0);
    let chain = bench.take().unwrap().unwrap();
    assert_eq!((chain.slots, chain.length), (2, 712));
    assert_eq!(bench.lengths(), [12, 700]);
}

#[test]
fn a_buffer_across_two_regions_is_two_buffers() {
    let fd = memfd(MEMORY_SIZE);
    let half = MEMORY_SIZE / 2;
    // The halves are neighbours for the guest and swapped in the file.
    let regions = [region(&fd, MEMORY_START + half, half, 0), region(&fd, MEMORY_START, half, half)];
    let memory = Arc::new(GuestMemory::new(&regions).unwrap());
    let mut queue = Queue::new(&memory, RING, SIZE, 0);
    let mut ring = SplitRing::new(&queue.layout, ALL, &memory).unwrap();
    ring.begin(None, true);
    queue.descriptor(0, MEMORY_START + half - 100, 300, 0, 0);
    queue.offer(0);
    let mut buffers = Vec::new();
    let chain = ring.take(Direction::FromGuest, HEADER, &mut buffers).unwrap().unwrap();
    assert_eq!((chain.buffers, chain.length), (2, 300));
    assert_eq!(buffers.iter().map(|buffer| buffer.iov_len).collect::<Vec<_>>(), [100, 200]);
}

/// What a guest wrote, and the error it must lead to.
type Hostile = (&'static str, fn(&mut Queue), RingError);

#[test]
fn what_cannot_be_is_an_error_and_takes_nothing() {
    const END: u64 = MEMORY_START + MEMORY_SIZE;
    const TABLE: u64 = BUFFERS + 0x8000;
    let outside = |address, length| RingError::OutsideMemory { address, length };
    let cases: [Hostile; 19] = [
        ("avail index jumps", |q| q.set_avail_index(9), RingError::AvailIndex { index: 9, next: 0, size: 8 }),
        (
            "avail index goes back",
            |q| q.set_avail_index(0xffff),
            RingError::AvailIndex { index: 0xffff, next: 0, size: 8 },
        ),
        ("head", |q| q.offer(8), RingError::Index { index: 8, size: 8 }),
        ("below memory", |q| one(q, MEMORY_START - 1, 64, 0), outside(MEMORY_START - 1, 64)),
        ("behind memory", |q| one(q, END, 1, 0), outside(END, 1)),
        ("across the end", |q| one(q, END - 10, 11, 0), outside(END - 10, 11)),
        ("wraps around", |q| one(q, u64::MAX - 10, 64, 0), outside(u64::MAX - 10, 64)),
        ("huge", |q| one(q, BUFFERS, u32::MAX, 0), outside(BUFFERS, u32::MAX.into())),
        ("empty", |q| one(q, BUFFERS, 0, 0), RingError::EmptyBuffer { index: 0 }),
        (
            "direction",
            |q| one(q, BUFFERS, 64, WRITE),
            RingError::WrongDirection { index: 0, expected: Direction::FromGuest },
        ),
        (
            "no room for the header",
            |q| one(q, BUFFERS, 11, 0),
            RingError::ChainTooShort { length: 11, header_length: 12 },
        ),
        ("loop", |q| one(q, BUFFERS, 64, NEXT), RingError::ChainLength { limit: 8 }),
        (
            "next",
            |q| {
                q.descriptor(0, BUFFERS, 64, NEXT, 8);
                q.offer(0);
            },
            RingError::Index { index: 8, size: 8 },
        ),
        ("indirect, no table", |q| one(q, TABLE, 0, INDIRECT), RingError::IndirectLength { length: 0 }),
        ("indirect, part of one", |q| one(q, TABLE, 17, INDIRECT), RingError::IndirectLength { length: 17 }),
        ("indirect, outside", |q| one(q, END - 8, 16, INDIRECT), outside(END - 8, 16)),
        (
            "indirect and next",
            |q| one(q, TABLE, 16, INDIRECT | NEXT),
            RingError::IndirectWithNext { index: 0 },
        ),
        (
            "indirect, nested",
            |q| {
                q.descriptor_at(TABLE, TABLE, 16, INDIRECT, 0);
                one(q, TABLE, 16, INDIRECT);
            },
            RingError::IndirectNested { index: 0 },
        ),
        (
            "indirect, loop",
            |q| {
                q.descriptor_at(TABLE, BUFFERS, 16, NEXT, 0);
                one(q, TABLE, 32, INDIRECT);
            },
            RingError::ChainLength { limit: 2 },
        ),
    ];
    for (name, write, expected) in cases {
        let mut bench = Bench::new(ALL);
        write(&mut bench.queue);
        assert_eq!(bench.take().unwrap_err(), expected, "{name}");
        assert_eq!(bench.ring.next_avail(), 0, "{name}");
    }
}

/// Offers a chain of one descriptor; `next` is itself.
fn one(queue: &mut Queue, address: u64, length: u32, flags: u16) {
    queue.descriptor(0, address, length, flags, 0);
    queue.offer(0);
}

#[test]
fn an_indirect_table_longer_than_a_read_takes_is_an_error() {
    let mut bench = Bench::new(ALL);
    let table = BUFFERS + 0x8000;
    let count = u16::try_from(CHAIN_BUFFERS_MAX).unwrap() + 1;
    for index in 0..count {
        let flags = if index + 1 == count { 0 } else { NEXT };
        bench.queue.descriptor_at(table + 16 * u64::from(index), BUFFERS, 1, flags, index + 1);
    }
    one(&mut bench.queue, table, 16 * u32::from(count), INDIRECT);
    assert_eq!(bench.take().unwrap_err(), RingError::ChainLength { limit: CHAIN_BUFFERS_MAX });
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_an_error() {
    let mut bench = Bench::new(Features { event_index: true, indirect: false });
    one(&mut bench.queue, BUFFERS, 16, INDIRECT);
    assert_eq!(bench.take().unwrap_err(), RingError::IndirectNotNegotiated { index: 0 });
}

#[test]
fn a_read_only_buffer_in_a_receive_queue_is_an_error() {
    let mut bench = Bench::new(ALL);
    one(&mut bench.queue, BUFFERS, 64, 0);
    let taken = bench.ring.take(Direction::ToGuest, HEADER, &mut bench.buffers);
    assert_eq!(taken.unwrap_err(), RingError::WrongDirection { index: 0, expected: Direction::ToGuest });
}

#[test]
fn a_call_is_due_when_the_used_index_passes_the_event_also_around_the_wrap() {
    for start in [0, 0x7ffe, 0xfffc] {
        let mut bench = Bench::at(ALL, start);
        bench.queue.descriptor(0, BUFFERS, 64, 0, 0);
        bench.queue.set_used_event(start.wrapping_add(3));
        let mut due = Vec::new();
        for _ in 0..8 {
            bench.queue.offer(0);
            bench.use_one();
            due.push(bench.ring.call_due());
        }
        let fourth_only = [false, false, false, true, false, false, false, false];
        assert_eq!(due, fourth_only, "from {start:#x}");
    }
}

#[test]
fn a_call_due_inside_a_batch_is_due_after_it() {
    let mut bench = Bench::at(ALL, 0xfffe);
    bench.queue.descriptor(0, BUFFERS, 64, 0, 0);
    bench.queue.set_used_event(0xffff);
    for _ in 0..5 {
        bench.queue.offer(0);
        bench.use_one();
    }
    assert!(bench.ring.call_due());
    assert!(!bench.ring.call_due());
}

#[test]
fn without_the_event_index_the_guests_flag_decides() {
    let mut bench = Bench::new(Features { event_index: false, indirect: false });
    one(&mut bench.queue, BUFFERS, 64, 0);
    assert!(!bench.ring.call_due(), "nothing was used");
    bench.use_one();
    assert!(bench.ring.call_due());
    bench.queue.set_no_interrupt();
    one(&mut bench.queue, BUFFERS, 64, 0);
    bench.use_one();
    assert!(!bench.ring.call_due());
}

#[test]
fn arming_asks_for_a_kick_at_the_next_chain_and_sees_one_that_came_before() {
    let mut bench = Bench::at(ALL, 0xffff);
    assert_eq!(bench.ring.arm(), Ok(false));
    assert_eq!(bench.queue.avail_event(), 0xffff);
    one(&mut bench.queue, BUFFERS, 64, 0);
    assert_eq!(bench.ring.arm(), Ok(true));
    bench.use_one();
    assert_eq!(bench.ring.arm(), Ok(false));
    assert_eq!(bench.queue.avail_event(), 0);
}

#[test]
fn without_the_event_index_kicks_are_asked_for_by_flag() {
    let mut bench = Bench::new(Features { event_index: false, indirect: false });
    assert_eq!(bench.ring.arm(), Ok(false));
    assert_eq!(bench.queue.used_flags(), 0);
    bench.ring.disarm();
    assert_eq!(bench.queue.used_flags(), 1);
    assert_eq!(bench.ring.arm(), Ok(false));
    assert_eq!(bench.queue.used_flags(), 0);
}

#[test]
fn a_ring_starts_where_it_is_told_or_at_the_used_index() {
    let mut bench = Bench::at(ALL, 40);
    assert_eq!(bench.ring.next_avail(), 40);
    bench.ring.begin(Some(38), true);
    assert_eq!(bench.ring.next_avail(), 38);
    assert!(bench.ring.call_due(), "a call may have been lost before");
}

#[test]
fn a_layout_that_cannot_be_is_refused() {
    let memory = memory();
    let good = Queue::new(&memory, RING, SIZE, 0).layout;
    let end = MEMORY_START + MEMORY_SIZE;
    let cases = [
        (Layout { size: 0, ..good }, "a ring has 0 entries, it must be a power of two up to 32768"),
        (Layout { size: 6, ..good }, "a ring has 6 entries, it must be a power of two up to 32768"),
        (Layout { size: 65536, ..good }, "a ring has 65536 entries, it must be a power of two up to 32768"),
        (Layout { descriptor_area: RING + 8, ..good }, "descriptor table at 0x100008 is not aligned to 16"),
        (Layout { driver_area: RING + 1, ..good }, "available ring at 0x100001 is not aligned to 2"),
        (Layout { device_area: RING + 2, ..good }, "used ring at 0x100002 is not aligned to 4"),
        (
            Layout { device_area: end - 64, ..good },
            "used ring at 0x4fffc0, 0x46 bytes, is not inside one guest memory region",
        ),
        (
            Layout { descriptor_area: 0, ..good },
            "descriptor table at 0x0, 0x80 bytes, is not inside one guest memory region",
        ),
    ];
    for (layout, reason) in cases {
        assert_eq!(SplitRing::new(&layout, ALL, &memory).unwrap_err().to_string(), reason);
    }
}
