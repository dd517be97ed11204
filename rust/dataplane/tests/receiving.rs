//! Frames into whatever a driver has posted: one buffer, few, many small ones; of either format.

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use common::{
    await_frame, eventfd, memory, readable, send, wire, PackedQueue, Queue, ALL_OFFLOADS, INDIRECT,
    MEMORY_START, NEXT, PATIENCE, WRITE,
};
use dataplane::chain::Features;
use dataplane::ledger::Ledger;
use dataplane::memory::GuestMemory;
use dataplane::packed::Position;
use dataplane::queue_pair::QueuePair;
use dataplane::sys::{drain, signal};
use dataplane::{Config, Format, HostSide, Offloads, Positions, RingSpec};

const HEADER: usize = 12;
const TX_RING: u64 = MEMORY_START + 0x1_0000;
const TABLES: u64 = MEMORY_START + 0x2_0000;
const BUFFERS: u64 = MEMORY_START + 0x4_0000;
/// Between the buffers of two chains.
const STRIDE: u64 = 0x2000;
const TSO_LENGTH: usize = 65536 + 18;
const A_MOMENT: Duration = Duration::from_millis(30);

enum AnyQueue {
    Split(Queue),
    Packed(PackedQueue),
}

/// A driver's receive ring, and what is lent with it.
struct Guest {
    memory: Arc<GuestMemory>,
    queue: AnyQueue,
    size: u16,
    indirect: bool,
    ledger: Arc<Ledger>,
    kick: OwnedFd,
    call: OwnedFd,
    tx: Queue,
    wire: OwnedFd,
    tap: OwnedFd,
    event: OwnedFd,
    pair: QueuePair,
}

/// What is tried with each.
const KINDS: [(Format, bool); 4] =
    [(Format::Split, false), (Format::Split, true), (Format::Packed, false), (Format::Packed, true)];

impl Guest {
    fn new((format, indirect): (Format, bool), size: u16) -> Self {
        let memory = memory();
        let queue = match format {
            Format::Split => AnyQueue::Split(Queue::new(&memory, MEMORY_START, size, 0)),
            Format::Packed => {
                AnyQueue::Packed(PackedQueue::new(&memory, MEMORY_START, size, Position::START))
            }
        };
        let file = Ledger::create(1).unwrap();
        let (wire, tap) = wire();
        let event = eventfd();
        Self {
            queue,
            size,
            indirect,
            ledger: Ledger::map(file.as_raw_fd(), 1).unwrap(),
            kick: eventfd(),
            call: eventfd(),
            tx: Queue::new(&memory, TX_RING, 16, 0),
            wire,
            tap,
            pair: QueuePair::new("test", event.as_raw_fd()).unwrap(),
            event,
            memory,
        }
    }

    fn config(&self) -> Config {
        let (layout, format) = match &self.queue {
            AnyQueue::Split(queue) => (queue.layout, Format::Split),
            AnyQueue::Packed(queue) => (queue.layout, Format::Packed),
        };
        let start = (format == Format::Packed).then_some(Position::START.bits());
        Config {
            memory: Arc::clone(&self.memory),
            host: HostSide::Tap(self.tap.as_raw_fd()),
            header_length: HEADER,
            frame_length_max: TSO_LENGTH,
            offloads: ALL_OFFLOADS,
            format,
            features: Features { event_index: false, indirect: true },
            mergeable: true,
            rx: Some(RingSpec {
                layout,
                kick_fd: self.kick.as_raw_fd(),
                call_fd: Some(self.call.as_raw_fd()),
                error_fd: None,
                next_avail: start,
                ledger: self.ledger.slot(0),
                in_flight: None,
                log: None,
            }),
            tx: None,
        }
    }

    fn start(&self) {
        self.start_with(|_| {});
    }

    fn start_with(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        self.pair.configure(&config).unwrap();
        self.pair.start().unwrap();
    }

    /// Posts a chain of one buffer, or where it is indirect of two.
    fn post(&mut self, id: u16, length: u32) {
        let address = BUFFERS + u64::from(id) * STRIDE;
        let (address, length, flags) = if self.indirect {
            let table = TABLES + 64 * u64::from(id);
            let first = length.min(u32::from(id) % 5 + 1);
            let mut buffers = vec![(address, first)];
            if length > first {
                buffers.push((address + u64::from(first), length - first));
            }
            for (index, &(address, length)) in buffers.iter().enumerate() {
                let place = table + 16 * index as u64;
                let flags = if index + 1 < buffers.len() { WRITE | NEXT } else { WRITE };
                match &self.queue {
                    AnyQueue::Split(queue) => queue.descriptor_at(place, address, length, flags, 1),
                    AnyQueue::Packed(queue) => queue.descriptor_at(place, address, length, 0, WRITE),
                }
            }
            (table, 16 * buffers.len() as u32, INDIRECT)
        } else {
            (address, length, WRITE)
        };
        match &mut self.queue {
            AnyQueue::Split(queue) => {
                queue.descriptor(id, address, length, flags, 0);
                queue.offer(id);
            }
            AnyQueue::Packed(queue) => queue.offer(address, length, id, flags),
        }
    }

    fn kick(&self) {
        signal(self.kick.as_raw_fd());
    }

    fn next_used(&mut self) -> Option<(u16, u32)> {
        match &mut self.queue {
            AnyQueue::Split(queue) => queue.next_used(),
            AnyQueue::Packed(queue) => queue.next_used(1).map(|(id, written, _)| (id, written)),
        }
    }

    fn await_used(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.next_used() {
                return used;
            }
            assert!(readable(self.call.as_raw_fd(), PATIENCE), "waited too long");
            let _ = drain(self.call.as_raw_fd());
        }
    }

    /// The next frame with its header, and the chains that it came in.
    fn receive(&mut self) -> (Vec<u8>, Vec<u16>) {
        let mut frame = Vec::new();
        let mut ids = Vec::new();
        let mut count = 1;
        while ids.len() < count {
            let (id, written) = self.await_used();
            let mut data = vec![0; written as usize];
            self.memory.read(BUFFERS + u64::from(id) * STRIDE, &mut data).unwrap();
            frame.extend(data);
            ids.push(id);
            if ids.len() == 1 {
                count = usize::from(u16::from_le_bytes([frame[10], frame[11]]));
            }
        }
        frame[10..12].fill(0);
        (frame, ids)
    }

    /// Where the ring stands, as its driver counts.
    fn assert_nothing_is_in_flight(&self, positions: Positions, used: u16) {
        let expected = match &self.queue {
            AnyQueue::Split(queue) => {
                assert_eq!(queue.used_index(), used);
                used
            }
            AnyQueue::Packed(queue) => queue.advance(Position::START, used).bits(),
        };
        assert_eq!(positions.rx, Some(expected));
    }
}

fn packet(length: usize, seed: u8) -> Vec<u8> {
    let data = (HEADER..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed));
    [0; HEADER].into_iter().chain(data).collect()
}

#[test]
fn one_buffer_is_enough_for_a_frame_that_fits_into_it() {
    for kind in KINDS {
        for length in [60, 99, 100] {
            let mut guest = Guest::new(kind, 256);
            guest.post(0, 100);
            guest.start();
            assert!(send(&guest.wire, &packet(length, 1)));
            assert_eq!(guest.receive(), (packet(length, 1), vec![0]));
        }
    }
}

#[test]
fn sixteen_buffers_with_segmentation_receive_small_frames_and_large_ones() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 256);
        (0..16).for_each(|id| guest.post(id, 2048));
        guest.start();
        for (seed, length) in [60, 1514, 30_000, 64].into_iter().enumerate() {
            assert!(send(&guest.wire, &packet(HEADER + length, seed as u8)));
            let (frame, ids) = guest.receive();
            assert_eq!(frame, packet(HEADER + length, seed as u8));
            assert_eq!(ids.len(), (HEADER + length).div_ceil(2048));
            ids.into_iter().for_each(|id| guest.post(id, 2048));
            guest.kick();
        }
    }
}

#[test]
fn a_frame_that_does_not_fit_waits_for_buffers_and_comes_before_those_behind_it() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 64);
        guest.post(0, 100);
        guest.start();
        assert!(send(&guest.wire, &packet(450, 1)));
        assert!(send(&guest.wire, &packet(60, 2)));
        for id in 1..4 {
            guest.kick();
            assert!(readable(guest.tap.as_raw_fd(), A_MOMENT), "the second frame waits in the TAP");
            assert_eq!(guest.next_used(), None);
            guest.post(id, 100);
        }
        guest.post(4, 100);
        guest.post(5, 100);
        guest.kick();
        assert_eq!(guest.receive(), (packet(450, 1), vec![0, 1, 2, 3, 4]));
        assert_eq!(guest.receive(), (packet(60, 2), vec![5]));
        guest.assert_nothing_is_in_flight(guest.pair.stop(), 6);
        let counters = guest.pair.counters();
        assert_eq!((counters.rx_packets, counters.rx_dropped_length), (2, 0));
    }
}

#[test]
fn a_frame_that_waits_blocks_no_packet_of_the_guest() {
    let mut guest = Guest::new(KINDS[0], 64);
    guest.post(0, 100);
    let (tx_kick, tx_call) = (eventfd(), eventfd());
    let spec = RingSpec {
        layout: guest.tx.layout,
        kick_fd: tx_kick.as_raw_fd(),
        call_fd: Some(tx_call.as_raw_fd()),
        error_fd: None,
        next_avail: None,
        ledger: None,
        in_flight: None,
        log: None,
    };
    guest.start_with(|config| config.tx = Some(spec));
    assert!(send(&guest.wire, &packet(450, 1)));
    for head in 0..4 {
        guest.tx.put(TABLES, &packet(70, 3));
        guest.tx.descriptor(head, TABLES, 70, 0, 0);
        guest.tx.offer(head);
        signal(tx_kick.as_raw_fd());
        assert_eq!(await_frame(&guest.wire), packet(70, 3));
    }
    assert_eq!(guest.next_used(), None);
}

#[test]
fn a_frame_waits_through_a_stop_another_layout_and_in_another_process() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 64);
        guest.post(0, 100);
        guest.start();
        assert!(send(&guest.wire, &packet(60, 1)));
        assert_eq!(guest.receive(), (packet(60, 1), vec![0]));
        guest.post(1, 100);
        guest.kick();
        assert!(send(&guest.wire, &packet(250, 2)));
        while readable(guest.tap.as_raw_fd(), Duration::ZERO) {
            std::thread::yield_now();
        }
        let positions = guest.pair.stop();
        guest.assert_nothing_is_in_flight(positions, 1);
        assert_eq!(guest.pair.waiting_frame(), Some(packet(250, 2)));
        // Whatever the guest does to its buffers meanwhile.
        guest.memory.write(BUFFERS + STRIDE, &[0xee; 100]).unwrap();
        guest.pair.release();
        guest.start_with(|config| config.rx.as_mut().unwrap().next_avail = positions.rx);
        let positions = guest.pair.stop();
        guest.assert_nothing_is_in_flight(positions, 1);

        let frame = guest.pair.waiting_frame().unwrap();
        let successor = QueuePair::new("successor", guest.event.as_raw_fd()).unwrap();
        successor.set_waiting_frame(&frame).unwrap();
        let mut config = guest.config();
        config.rx.as_mut().unwrap().next_avail = positions.rx;
        successor.configure(&config).unwrap();
        successor.start().unwrap();
        guest.post(2, 100);
        guest.post(3, 100);
        guest.kick();
        assert_eq!(guest.receive(), (packet(250, 2), vec![1, 2, 3]));
        guest.assert_nothing_is_in_flight(successor.stop(), 4);
        assert_eq!(successor.waiting_frame(), None, "it was delivered once");
    }
}

#[test]
fn a_frame_longer_than_the_whole_ring_is_dropped_and_the_next_one_delivered() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 8);
        (0..7).for_each(|id| guest.post(id, 16));
        guest.start();
        assert!(send(&guest.wire, &packet(8 * 16 + 1, 1)));
        assert!(send(&guest.wire, &packet(20, 2)));
        assert!(readable(guest.tap.as_raw_fd(), A_MOMENT), "one more buffer might do");
        guest.post(7, 16);
        guest.kick();
        assert_eq!(guest.receive(), (packet(20, 2), vec![0, 1]));
        assert_eq!(guest.pair.counters().rx_dropped_length, 1);
        guest.assert_nothing_is_in_flight(guest.pair.stop(), 2);
    }
}

#[test]
fn without_merging_a_frame_longer_than_its_chain_is_dropped() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 8);
        (0..4).for_each(|id| guest.post(id, 64));
        guest.start_with(|config| config.mergeable = false);
        assert!(send(&guest.wire, &packet(65, 1)));
        assert!(send(&guest.wire, &packet(64, 2)));
        assert_eq!(guest.receive(), (packet(64, 2), vec![0]));
        let counters = guest.pair.counters();
        assert_eq!((counters.rx_packets, counters.rx_dropped_length), (1, 1));
    }
}

#[test]
fn a_frame_that_waits_is_dropped_for_a_driver_that_merges_no_buffers_or_has_a_shorter_header() {
    for header_length in [10, 12] {
        let mut guest = Guest::new(KINDS[0], 8);
        guest.pair.set_waiting_frame(&packet(200, 1)).unwrap();
        guest.post(0, 100);
        guest.start_with(|config| {
            config.mergeable = false;
            config.header_length = header_length;
        });
        assert!(send(&guest.wire, &packet(80, 2)));
        assert_eq!(guest.await_used(), (0, 80));
        assert_eq!(guest.pair.counters().rx_dropped_length, 1);
    }
    let pair = Guest::new(KINDS[0], 8).pair;
    let reason = "a frame that waits has 65567 bytes, limit is 65566";
    assert_eq!(pair.set_waiting_frame(&[0; 65567]).unwrap_err().to_string(), reason);
}

#[test]
fn an_mtu_that_grows_unnoticed_costs_one_frame() {
    let mut guest = Guest::new(KINDS[0], 16);
    (0..4).for_each(|id| guest.post(id, 2048));
    guest.start_with(|config| config.frame_length_max = 1518);
    for seed in 0..2 {
        assert!(send(&guest.wire, &packet(5000, seed)));
    }
    assert_eq!(guest.receive(), (packet(5000, 1), vec![0, 1, 2]));
    assert_eq!(guest.pair.counters().rx_dropped_length, 1);
}

#[test]
fn frames_of_all_lengths_come_whole_whatever_was_guessed_of_them() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 64);
        let sizes = [1536, 2000, 13, 1536, 4096, 700];
        let size = |id: u16| sizes[usize::from(id) % sizes.len()];
        (0..guest.size).for_each(|id| guest.post(id, size(id)));
        guest.start();
        let mut draw = 1u64;
        for round in 0..400 {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let length = match draw >> 60 {
                0..8 => 60 + (draw >> 40) as usize % 1460,
                8..12 => (draw >> 40) as usize % 20_000 + 60,
                _ => (draw >> 40) as usize % 60_000 + 60,
            };
            let sent = packet(HEADER + length, round as u8);
            assert!(send(&guest.wire, &sent));
            let (frame, ids) = guest.receive();
            assert!(frame == sent, "round {round}, {length} bytes");
            ids.into_iter().for_each(|id| guest.post(id, size(id)));
            guest.kick();
        }
        let counters = guest.pair.counters();
        assert_eq!((counters.rx_packets, counters.rx_dropped_length), (400, 0));
    }
}

#[test]
fn what_waited_for_another_driver_is_read_out_and_counted_before_anything_is_received() {
    for (kind, heir) in KINDS.into_iter().flat_map(|kind| [(kind, None), (kind, Some(7))]) {
        let mut guest = Guest::new(kind, 64);
        guest.pair.set_waiting_frame(&packet(200, 1)).unwrap();
        (0..30).for_each(|seed| assert!(send(&guest.wire, &packet(1000, seed))));
        guest.pair.reserve_waiting(heir).unwrap();
        guest.start();
        // It need not post anything for that.
        while guest.pair.counters().rx_dropped_stale < 31 {
            std::thread::yield_now();
        }
        assert!(send(&guest.wire, &packet(60, 5)));
        guest.post(0, 100);
        guest.kick();
        // It may be dropped as well, if it came before the TAP was found empty.
        while readable(guest.tap.as_raw_fd(), Duration::ZERO) {
            std::thread::yield_now();
        }
        let late = guest.pair.stop();
        let positions = if guest.pair.counters().rx_dropped_stale == 32 {
            late
        } else {
            assert_eq!(guest.receive(), (packet(60, 5), vec![0]));
            guest.post(1, 100);
            late
        };
        // Only once.
        assert!(send(&guest.wire, &packet(60, 6)));
        guest.start_with(|config| config.rx.as_mut().unwrap().next_avail = positions.rx);
        assert_eq!(guest.receive().0, packet(60, 6));
    }
}

#[test]
fn what_waited_is_for_the_driver_that_goes_on_where_the_ring_stood() {
    for kind in KINDS {
        let mut guest = Guest::new(kind, 64);
        guest.post(0, 100);
        guest.start();
        assert!(send(&guest.wire, &packet(60, 1)));
        assert_eq!(guest.receive(), (packet(60, 1), vec![0]));
        let position = guest.pair.stop().rx;
        guest.pair.release();
        guest.pair.set_waiting_frame(&packet(80, 2)).unwrap();
        assert!(send(&guest.wire, &packet(60, 3)));
        guest.pair.reserve_waiting(position).unwrap();
        guest.post(1, 100);
        guest.post(2, 100);
        guest.start_with(|config| config.rx.as_mut().unwrap().next_avail = position);
        assert_eq!(guest.receive(), (packet(80, 2), vec![1]));
        assert_eq!(guest.receive(), (packet(60, 3), vec![2]));
        // Or that goes on anywhere but at the beginning.
        let position = guest.pair.stop().rx;
        assert!(send(&guest.wire, &packet(60, 4)));
        guest.post(3, 100);
        guest.pair.refuse_waiting(guest.config().rx.unwrap().next_avail.unwrap_or(0)).unwrap();
        guest.start_with(|config| config.rx.as_mut().unwrap().next_avail = position);
        assert_eq!(guest.receive(), (packet(60, 4), vec![3]));
        assert_eq!(guest.pair.counters().rx_dropped_stale, 0);
        guest.pair.stop();
        assert!(send(&guest.wire, &packet(60, 5)));
        guest.pair.refuse_waiting(position.unwrap().wrapping_add(1)).unwrap();
        guest.start_with(|config| {
            let rx = config.rx.as_mut().unwrap();
            rx.next_avail = position.map(|position| position.wrapping_add(1));
        });
        while guest.pair.counters().rx_dropped_stale == 0 {
            std::thread::yield_now();
        }
    }
}

#[test]
fn no_frame_asks_a_driver_for_what_it_did_not_take() {
    const CSUM: u8 = 0x01;
    let cases = [
        (0, [1, 0], None),                   // a checksum to be completed
        (0, [2, 0], Some([0, 0])),           // one that was looked at
        (CSUM, [1, 0], Some([1, 0])),        //
        (CSUM, [2, 0], Some([2, 0])),        //
        (CSUM, [1, 1], None),                // TCP over IPv4
        (CSUM | 0x02, [1, 1], Some([1, 1])), //
        (CSUM | 0x02, [1, 0x81], None),      // with ECN
        (CSUM | 0x0a, [1, 0x81], Some([1, 0x81])),
        (CSUM | 0x02, [1, 4], None),         // TCP over IPv6
        (CSUM | 0x04, [1, 4], Some([1, 4])), //
        (CSUM | 0x06, [1, 5], None),         // UDP
        (CSUM | 0x60, [1, 5], Some([1, 5])), //
        (0x6f, [1, 3], None),                // UDP fragments
        (0x6f, [1, 0x21], None),             // in a tunnel
    ];
    for (offloads, asked, told) in cases {
        for buffer in [1, 100] {
            let mut guest = Guest::new((Format::Split, true), 16);
            // Its first buffer is of one byte, or has the whole header.
            guest.post(if buffer == 1 { 0 } else { 4 }, 100);
            guest.start_with(|config| config.offloads = Offloads(offloads));
            let mut frame = packet(60, 1);
            frame[..2].copy_from_slice(&asked);
            assert!(send(&guest.wire, &frame));
            assert!(send(&guest.wire, &packet(61, 2)));
            let expected = told.map_or(packet(61, 2), |told| {
                frame[..2].copy_from_slice(&told);
                frame
            });
            assert!(guest.receive().0 == expected, "{offloads:#x} {asked:?}");
            assert_eq!(guest.pair.counters().rx_dropped_stale, u64::from(told.is_none()));
        }
    }
}
