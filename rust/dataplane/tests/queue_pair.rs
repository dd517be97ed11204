//! A queue pair between a wire that stands in for the TAP and a guest that writes its rings by hand.

mod common;

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    await_frame, await_rung, eventfd, is_mapped, memfd, memory, memory_of, pipe, readable, receive, refuse,
    region, send, truncate, wire, Queue, ALL_OFFLOADS, INDIRECT, MEMORY_SIZE, MEMORY_START, NEXT, PATIENCE,
    WRITE,
};
use dataplane::chain::Features;
use dataplane::memory::GuestMemory;
use dataplane::queue_pair::{swap_memory, Error, QueuePair};
use dataplane::sys::{drain, signal};
use dataplane::{Config, Correction, Counters, Format, HostSide, Positions, RingSpec, Side};

const SIZE: u16 = 64;
const HEADER: usize = 12;
const BUFFER_SIZE: u32 = 2048;
const RX_BUFFERS: u64 = MEMORY_START + 0x10_0000;
const TX_BUFFERS: u64 = MEMORY_START + 0x20_0000;
/// Not enough time for anything that must not happen to be sure, but enough for it to happen most of the time.
const A_MOMENT: Duration = Duration::from_millis(30);

struct End {
    queue: Queue,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
}

impl End {
    fn new(memory: &Arc<GuestMemory>, address: u64, position: u16) -> Self {
        let queue = Queue::new(memory, address, SIZE, position);
        Self { queue, kick: eventfd(), call: eventfd(), error: eventfd() }
    }

    fn spec(&self) -> RingSpec {
        RingSpec {
            layout: self.queue.layout,
            kick_fd: self.kick.as_raw_fd(),
            call_fd: Some(self.call.as_raw_fd()),
            error_fd: Some(self.error.as_raw_fd()),
            next_avail: None,
            ledger: None,
            in_flight: None,
            log: None,
        }
    }

    fn kick(&self) {
        signal(self.kick.as_raw_fd());
    }

    fn await_used(&mut self) -> (u16, u32) {
        let queue = &mut self.queue;
        await_rung(&self.call, || queue.next_used())
    }
}

struct Bench {
    memory: Arc<GuestMemory>,
    wire: OwnedFd,
    tap: OwnedFd,
    rx: End,
    tx: End,
    event: OwnedFd,
    pair: QueuePair,
}

impl Bench {
    fn new() -> Self {
        Self::at(0)
    }

    fn at(position: u16) -> Self {
        Self::on(memory(), position)
    }

    fn on(memory: Arc<GuestMemory>, position: u16) -> Self {
        let (wire, tap) = wire();
        let event = eventfd();
        let rx = End::new(&memory, MEMORY_START, position);
        let tx = End::new(&memory, MEMORY_START + 0x1_0000, position);
        let pair = QueuePair::new("test", event.as_raw_fd()).unwrap();
        Self { memory, wire, tap, rx, tx, event, pair }
    }

    fn config(&self) -> Config {
        Config {
            memory: Arc::clone(&self.memory),
            host: HostSide::Tap(self.tap.as_raw_fd()),
            header_length: HEADER,
            frame_length_max: 1514,
            offloads: ALL_OFFLOADS,
            format: Format::Split,
            // Calls for every packet keep the tests simple; the event index has its own in split.rs.
            features: Features { event_index: false, indirect: true },
            mergeable: true,
            rx: Some(self.rx.spec()),
            tx: Some(self.tx.spec()),
        }
    }

    fn start(&self) -> u64 {
        self.start_with(|_| {})
    }

    fn start_with(&self, change: impl FnOnce(&mut Config)) -> u64 {
        let mut config = self.config();
        change(&mut config);
        self.pair.configure(&config).unwrap();
        self.pair.start().unwrap()
    }

    fn offer_rx(&mut self, head: u16, length: u32) {
        self.rx.queue.descriptor(head, rx_buffer(head), length, WRITE, 0);
        self.rx.queue.offer(head);
    }

    /// Puts a frame behind a zero header into the transmit ring, as one buffer.
    fn offer_tx(&mut self, head: u16, frame: &[u8]) {
        let address = TX_BUFFERS + u64::from(head) * u64::from(BUFFER_SIZE);
        let packet = with_header(frame);
        self.tx.queue.put(address, &packet);
        self.tx.queue.descriptor(head, address, packet.len().try_into().unwrap(), 0, 0);
        self.tx.queue.offer(head);
    }

    fn await_error(&self) -> Vec<(Side, String)> {
        await_rung(&self.event, || Some(self.pair.take_ring_errors()).filter(|errors| !errors.is_empty()))
    }
}

fn rx_buffer(head: u16) -> u64 {
    RX_BUFFERS + u64::from(head) * u64::from(BUFFER_SIZE)
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame].concat()
}

/// A frame that tells its number.
fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0xa5; 60];
    frame[..4].copy_from_slice(&number.to_le_bytes());
    frame
}

fn number(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[..4].try_into().unwrap())
}

fn tx_dropped(counters: &Counters) -> u64 {
    counters.tx_dropped_interface + counters.tx_dropped_header + counters.tx_dropped_memory
}

#[test]
fn a_frame_from_the_tap_lands_in_the_guests_buffer_with_a_count_of_one() {
    let mut bench = Bench::new();
    bench.offer_rx(5, BUFFER_SIZE);
    bench.start();
    let mut packet = with_header(b"a frame");
    packet[10] = 0xee; // the kernel leaves num_buffers as it was
    assert!(send(&bench.wire, &packet));
    assert_eq!(bench.rx.await_used(), (5, 19));
    assert_eq!(bench.rx.queue.get::<19>(rx_buffer(5))[10..], *b"\x01\0a frame");
    let counters = bench.pair.counters();
    assert_eq!((counters.rx_packets, counters.rx_bytes, counters.rx_dropped_length), (1, 7, 0));
}

#[test]
fn a_header_of_ten_bytes_has_no_count() {
    let mut bench = Bench::new();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.start_with(|config| {
        config.header_length = 10;
        config.mergeable = false;
    });
    let packet = [&[0; 10], &b"a frame"[..]].concat();
    assert!(send(&bench.wire, &packet));
    assert_eq!(bench.rx.await_used(), (0, 17));
    assert_eq!(bench.rx.queue.get::<17>(rx_buffer(0)), *packet);
}

#[test]
fn a_long_frame_is_merged_from_buffers_and_the_rest_of_them_stay_available() {
    let mut bench = Bench::new();
    // A header of twelve bytes across two buffers of ten is nothing a driver does; twelve and more it may.
    for head in 0..40 {
        bench.offer_rx(head, 100);
    }
    bench.start();
    assert!(send(&bench.wire, &with_header(&[7; 300])));
    let used: Vec<_> = (0..4).map(|_| bench.rx.await_used()).collect();
    assert_eq!(used, [(0, 100), (1, 100), (2, 100), (3, 12)]);
    assert_eq!(bench.rx.queue.get::<2>(rx_buffer(0) + 10), [4, 0]);
    assert!(send(&bench.wire, &with_header(&[8; 8])));
    assert_eq!(bench.rx.await_used(), (4, 20));
    assert_eq!(bench.pair.stop().rx, Some(5));
}

#[test]
fn the_count_of_buffers_may_lie_across_descriptors() {
    let mut bench = Bench::new();
    bench.rx.queue.descriptor(0, rx_buffer(0), 11, WRITE | NEXT, 1);
    bench.rx.queue.descriptor(1, rx_buffer(1), BUFFER_SIZE, WRITE, 0);
    bench.rx.queue.offer(0);
    bench.start();
    let mut packet = with_header(b"frame");
    packet[10..12].copy_from_slice(&[0xee, 0xee]);
    assert!(send(&bench.wire, &packet));
    assert_eq!(bench.rx.await_used(), (0, 17));
    assert_eq!(bench.rx.queue.get::<1>(rx_buffer(0) + 10), [1]);
    assert_eq!(bench.rx.queue.get::<6>(rx_buffer(1)), *b"\0frame");
}

#[test]
fn more_buffers_than_one_read_takes_are_left_for_the_next() {
    let mut bench = Bench::new();
    // Sixteen chains of a hundred buffers each, by one indirect table that all of them share.
    let table = MEMORY_START + 0x8_0000;
    for index in 0..100 {
        let flags = if index == 99 { WRITE } else { WRITE | NEXT };
        bench.rx.queue.descriptor_at(table + 16 * u64::from(index), rx_buffer(index), 1, flags, index + 1);
    }
    for head in 0..16 {
        bench.rx.queue.descriptor(head, table, 1600, INDIRECT, 0);
        bench.rx.queue.offer(head);
    }
    bench.start();
    assert!(send(&bench.wire, &with_header(&[1; 1000 - HEADER])));
    let used: Vec<_> = (0..10).map(|_| bench.rx.await_used()).collect();
    assert_eq!(used, (0..10).map(|head| (head, 100)).collect::<Vec<_>>());
    assert_eq!(bench.pair.stop().rx, Some(10));
}

#[test]
fn a_packet_from_the_guest_is_one_frame_however_many_buffers_it_has() {
    let mut bench = Bench::new();
    bench.tx.queue.put(TX_BUFFERS, &[0; HEADER]);
    bench.tx.queue.put(TX_BUFFERS + 0x1000, b"first");
    bench.tx.queue.put(TX_BUFFERS + 0x2000, b"second");
    bench.tx.queue.descriptor(4, TX_BUFFERS, 12, NEXT, 9);
    bench.tx.queue.descriptor(9, TX_BUFFERS + 0x1000, 5, NEXT, 1);
    bench.tx.queue.descriptor(1, TX_BUFFERS + 0x2000, 6, 0, 0);
    bench.tx.queue.offer(4);
    bench.start();
    assert_eq!(await_frame(&bench.wire), with_header(b"firstsecond"));
    assert_eq!(bench.tx.await_used(), (4, 0));
    let counters = bench.pair.counters();
    assert_eq!((counters.tx_packets, counters.tx_bytes), (1, 11));
}

#[test]
fn a_kick_wakes_the_pair_and_is_counted() {
    let mut bench = Bench::new();
    bench.start();
    assert!(readable(bench.tx.call.as_raw_fd(), PATIENCE), "the first turn calls");
    assert!(!readable(bench.wire.as_raw_fd(), A_MOMENT));
    bench.offer_tx(0, b"frame");
    bench.tx.kick();
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    assert_eq!(bench.tx.await_used(), (0, 0));
    let counters = bench.pair.counters();
    assert_eq!((counters.rx_kicks, counters.tx_kicks), (0, 1));
}

#[test]
fn a_full_tap_delays_packets_and_loses_none() {
    let mut bench = Bench::new();
    while send(&bench.wire, b"x") {}
    while send(&bench.tap, &with_header(b"filler")) {}
    for index in 0..SIZE {
        bench.offer_tx(index, &frame(index.into()));
    }
    bench.start();
    let mut numbers = Vec::new();
    while numbers.len() < SIZE.into() {
        let packet = await_frame(&bench.wire);
        if packet.len() == HEADER + 60 {
            numbers.push(number(&packet[HEADER..]));
        }
    }
    assert_eq!(numbers, (0..u32::from(SIZE)).collect::<Vec<_>>());
    assert_eq!(tx_dropped(&bench.pair.counters()), 0);
}

#[test]
fn a_start_calls_on_both_rings_because_a_call_may_have_been_lost() {
    let bench = Bench::new();
    bench.start();
    assert!(readable(bench.rx.call.as_raw_fd(), PATIENCE));
    assert!(readable(bench.tx.call.as_raw_fd(), PATIENCE));
}

#[test]
fn a_start_tells_when_it_began() {
    let bench = Bench::new();
    let before = dataplane::sys::monotonic_ns();
    let began = bench.start();
    assert!((before..=dataplane::sys::monotonic_ns()).contains(&began));
}

#[test]
fn a_start_moves_the_first_packets_before_it_returns() {
    let mut bench = Bench::new();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.offer_tx(0, b"frame");
    assert!(send(&bench.wire, &with_header(b"frame")));
    bench.start();
    assert_eq!(bench.rx.queue.next_used(), Some((0, 17)));
    assert_eq!(bench.tx.queue.next_used(), Some((0, 0)));
    assert!(readable(bench.rx.call.as_raw_fd(), Duration::ZERO));
    assert!(readable(bench.tx.call.as_raw_fd(), Duration::ZERO));
}

#[test]
fn positions_are_told_kept_and_taken_from_guest_memory_where_none_are_given() {
    let mut bench = Bench::at(0xffff);
    assert_eq!(bench.pair.positions(), Positions::default());
    bench.pair.configure(&bench.config()).unwrap();
    let position = |rx, tx| Positions { rx: Some(rx), tx: Some(tx) };
    assert_eq!(bench.pair.positions(), position(0xffff, 0xffff));
    bench.offer_tx(0, b"frame");
    bench.pair.start().unwrap();
    bench.tx.await_used();
    assert_eq!(bench.pair.stop(), position(0xffff, 0));
    assert_eq!(bench.pair.stop(), position(0xffff, 0));
    assert_eq!(bench.pair.positions(), position(0xffff, 0));
    bench.pair.set_positions(Some(7), None).unwrap();
    assert_eq!(bench.pair.positions(), position(7, 0));
    bench.pair.configure(&Config { rx: None, ..bench.config() }).unwrap();
    assert_eq!(bench.pair.stop(), Positions { rx: None, tx: Some(0) });
}

#[test]
fn a_split_ring_begins_at_its_used_index_wherever_it_is_told_to_begin() {
    let mut bench = Bench::at(0xfffe);
    for head in 0..3 {
        bench.offer_rx(head, BUFFER_SIZE);
    }
    // The avail index, as Cloud Hypervisor tells it.
    bench.start_with(|config| config.rx.as_mut().unwrap().next_avail = Some(1));
    assert_eq!(bench.pair.take_corrections(), [Correction { side: Side::Rx, told: 1, begun: 0xfffe }]);
    assert!(readable(bench.event.as_raw_fd(), PATIENCE));
    assert_eq!(bench.pair.take_corrections(), []);
    for number in 0..3 {
        send(&bench.wire, &with_header(&[number; 60]));
        assert_eq!(bench.rx.await_used(), (number.into(), 72));
    }
    // A stream tells the position as well.
    assert_eq!(bench.pair.stop(), Positions { rx: Some(1), tx: Some(0xfffe) });
    bench.pair.set_positions(Some(1), Some(7)).unwrap();
    bench.pair.start().unwrap();
    assert_eq!(bench.pair.take_corrections(), [Correction { side: Side::Tx, told: 7, begun: 0xfffe }]);
    assert_eq!(bench.pair.stop(), Positions { rx: Some(1), tx: Some(0xfffe) });
}

#[test]
fn chains_are_used_in_the_order_they_came_also_those_of_packets_that_are_dropped() {
    // VIRTIO_F_IN_ORDER is offered.
    let mut bench = Bench::new();
    let (heads, (_, broken)) = ([5, 0, 9, 2], wire());
    for head in heads {
        bench.offer_tx(head, &[0; 60]);
        bench.offer_rx(head, BUFFER_SIZE);
    }
    for number in 0..4 {
        send(&bench.wire, &with_header(&[number; 60]));
    }
    bench.start();
    for head in heads {
        assert_eq!(bench.tx.await_used().0, head);
        assert_eq!(bench.rx.await_used().0, head);
    }
    bench.pair.stop();
    for head in heads {
        bench.offer_tx(head, &[0; 60]);
    }
    bench.start_with(|config| config.host = HostSide::Tap(broken.as_raw_fd()));
    for head in heads {
        assert_eq!(bench.tx.await_used().0, head);
    }
    assert_eq!(tx_dropped(&bench.pair.counters()), 4);
}

#[test]
fn a_ring_that_failed_elsewhere_stays_where_it_was_told() {
    let bench = Bench::at(9);
    bench.pair.configure(&bench.config()).unwrap();
    bench.pair.set_positions(Some(9), Some(9)).unwrap();
    bench.pair.set_failed(Side::Rx).unwrap();
    bench.pair.start().unwrap();
    assert_eq!(bench.pair.positions(), Positions { rx: Some(9), tx: Some(9) });
    assert_eq!(bench.pair.stop(), Positions { rx: Some(9), tx: Some(9) });
}

#[test]
fn a_sleeping_pair_that_was_stopped_touches_nothing() {
    let mut bench = Bench::new();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.start();
    assert!(readable(bench.rx.call.as_raw_fd(), PATIENCE));
    bench.pair.stop();
    assert!(send(&bench.wire, &with_header(b"frame")));
    bench.offer_tx(0, b"frame");
    bench.tx.kick();
    // Whatever its sleep was about has happened now. The kick and the frame belong to the next one.
    assert!(!readable(bench.wire.as_raw_fd(), A_MOMENT));
    assert_eq!(drain(bench.tx.kick.as_raw_fd()).ok(), Some(true));
    assert_eq!(bench.rx.queue.next_used(), None);
    bench.pair.start().unwrap();
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    assert_eq!(bench.rx.await_used(), (0, 17));
}

/// Floods both directions, calls `interrupt` again and again, and checks that every packet comes once, in order.
fn flood(bench: &mut Bench, mut interrupt: impl FnMut(&Bench)) {
    const PACKETS: u32 = 20_000;
    for head in 0..SIZE {
        bench.offer_rx(head, BUFFER_SIZE);
    }
    let (mut sent, mut received, mut offered, mut arrived, mut rounds) = (0, 0, 0, 0, 0);
    let mut free: Vec<u16> = (0..SIZE).collect();
    while received < PACKETS || arrived < PACKETS {
        while sent < PACKETS && send(&bench.wire, &with_header(&frame(sent))) {
            sent += 1;
        }
        while let Some((head, length)) = bench.rx.queue.next_used() {
            assert_eq!(length, 72);
            let packet: [u8; 72] = bench.rx.queue.get(rx_buffer(head));
            assert_eq!(number(&packet[HEADER..]), received, "guest side");
            received += 1;
            bench.offer_rx(head, BUFFER_SIZE);
        }
        while let Some((head, _)) = bench.tx.queue.next_used() {
            free.push(head);
        }
        while offered < PACKETS {
            let Some(head) = free.pop() else { break };
            bench.offer_tx(head, &frame(offered));
            offered += 1;
        }
        bench.rx.kick();
        bench.tx.kick();
        while let Some(packet) = receive(&bench.wire) {
            assert_eq!(number(&packet[HEADER..]), arrived, "wire side");
            arrived += 1;
        }
        rounds += 1;
        if rounds % 8 == 0 {
            interrupt(bench);
        }
    }
    assert_eq!((sent, received, offered, arrived), (PACKETS, PACKETS, PACKETS, PACKETS));
}

#[test]
fn stopping_and_starting_under_load_loses_repeats_and_reorders_nothing() {
    let mut bench = Bench::at(0xff00);
    bench.start();
    flood(&mut bench, |bench| {
        let positions = bench.pair.stop();
        assert_eq!(positions.rx, Some(bench.rx.queue.used_index()));
        assert_eq!(positions.tx, Some(bench.tx.queue.used_index()));
        bench.pair.start().unwrap();
    });
    let counters = bench.pair.counters();
    assert_eq!((counters.rx_packets, counters.tx_packets), (20_000, 20_000));
    assert_eq!((counters.rx_dropped_length, tx_dropped(&counters)), (0, 0));
}

#[test]
fn two_pairs_that_take_turns_lose_repeat_and_reorder_nothing() {
    let mut bench = Bench::at(0xff00);
    let other = QueuePair::new("other", bench.event.as_raw_fd()).unwrap();
    other.configure(&bench.config()).unwrap();
    bench.start();
    let mut here = true;
    flood(&mut bench, |bench| {
        let (from, to) = if here { (&bench.pair, &other) } else { (&other, &bench.pair) };
        let positions = from.stop();
        to.set_positions(positions.rx, positions.tx).unwrap();
        to.start().unwrap();
        here = !here;
    });
}

#[test]
fn other_call_descriptors_and_other_memory_under_load_lose_repeat_and_reorder_nothing() {
    let fd = memfd(MEMORY_SIZE + 0x1000);
    let kept = region(&fd, MEMORY_START, MEMORY_SIZE, 0);
    let memory = Arc::new(GuestMemory::new(&[kept]).unwrap());
    let mut bench = Bench::on(Arc::clone(&memory), 0xff00);
    bench.start();
    let added = region(&fd, 2 * (MEMORY_START + MEMORY_SIZE), 0x1000, MEMORY_SIZE);
    let tables = [Arc::new(memory.next(&[kept, added]).unwrap()), Arc::new(memory.next(&[kept]).unwrap())];
    let calls = [eventfd(), eventfd()];
    let mut round = 0;
    flood(&mut bench, |bench| {
        round += 1;
        let call = calls[round % 2].as_raw_fd();
        bench.pair.set_notifiers(Side::Rx, Some(call), None).unwrap();
        bench.pair.set_notifiers(Side::Tx, Some(call), None).unwrap();
        assert!(readable(call, Duration::ZERO), "a new descriptor is called at once");
        assert_eq!(swap_memory(&[&bench.pair], &tables[round % 2]), [true]);
        assert!(bench.pair.is_running());
    });
    let counters = bench.pair.counters();
    assert_eq!((counters.rx_packets, counters.tx_packets), (20_000, 20_000));
    assert_eq!((counters.rx_dropped_length, tx_dropped(&counters)), (0, 0));
}

#[test]
fn no_call_is_lost_where_the_descriptor_changes_while_packets_are_sent() {
    const PACKETS: u32 = 5000;
    let mut bench = Bench::new();
    bench.start_with(|config| config.features.event_index = true);
    let calls = [eventfd(), eventfd()];
    for number in 0..PACKETS {
        let call = &calls[number as usize % 2];
        // One that this driver has seen means nothing any more.
        let _ = drain(call.as_raw_fd());
        // With the event index a call comes once: for the packet that is offered now.
        bench.tx.queue.set_used_event(number as u16);
        bench.offer_tx(number as u16 % SIZE, &frame(number));
        bench.tx.kick();
        // The driver has looked and sleeps. A call to the former descriptor, before this returns, wakes nobody.
        while number % 2 == 0 && bench.tx.queue.used_index() == number as u16 {
            std::hint::spin_loop();
        }
        bench.pair.set_notifiers(Side::Tx, Some(call.as_raw_fd()), None).unwrap();
        assert!(readable(call.as_raw_fd(), PATIENCE), "a call was lost");
        let _ = drain(call.as_raw_fd());
        await_rung(call, || bench.tx.queue.next_used());
        assert_eq!(self::number(&await_frame(&bench.wire)[HEADER..]), number);
    }
}

#[test]
fn a_former_call_descriptor_is_used_no_more_and_none_at_all_is_a_guest_that_polls() {
    let mut bench = Bench::new();
    bench.start();
    bench.offer_tx(0, b"called");
    bench.tx.kick();
    bench.tx.await_used();
    let _ = drain(bench.tx.call.as_raw_fd());
    bench.pair.set_notifiers(Side::Tx, None, None).unwrap();
    let calls = bench.pair.counters().tx_calls;
    bench.offer_tx(1, b"polled");
    bench.tx.kick();
    for expected in [b"called", b"polled"] {
        assert_eq!(await_frame(&bench.wire), with_header(expected));
    }
    while bench.tx.queue.next_used().is_none() {
        std::hint::spin_loop();
    }
    // Whoever asks for the positions of a stopped pair knows that its last turn is over.
    bench.pair.stop();
    assert!(!readable(bench.tx.call.as_raw_fd(), Duration::ZERO));
    assert_eq!(bench.pair.counters().tx_calls, calls);
    bench.pair.start().unwrap();
    let other = eventfd();
    bench.pair.set_notifiers(Side::Tx, Some(other.as_raw_fd()), None).unwrap();
    assert!(readable(other.as_raw_fd(), Duration::ZERO), "what was used meanwhile was never told");
    let _ = drain(other.as_raw_fd());
    bench.pair.set_notifiers(Side::Tx, Some(other.as_raw_fd()), Some(bench.tx.error.as_raw_fd())).unwrap();
    assert!(!readable(other.as_raw_fd(), Duration::ZERO), "the same descriptor has missed nothing");
    // The new error descriptor is the one that is told.
    bench.tx.queue.set_avail_index(1000);
    bench.tx.kick();
    assert_eq!(bench.await_error()[0].0, Side::Tx);
    assert!(readable(bench.tx.error.as_raw_fd(), Duration::ZERO));
}

#[test]
fn descriptors_that_nobody_can_ring_by_leave_the_former_ones() {
    let mut bench = Bench::new();
    bench.start();
    let file = std::fs::File::open("/dev/null").unwrap();
    for (call, error) in [(Some(file.as_raw_fd()), None), (None, Some(file.as_raw_fd()))] {
        let refused = bench.pair.set_notifiers(Side::Tx, call, error);
        assert!(
            matches!(refused, Err(Error::Invalid(refusal)) if refusal.to_string().contains("descriptor is /dev/null"))
        );
    }
    bench.offer_tx(0, b"frame");
    bench.tx.kick();
    bench.tx.await_used();
}

#[test]
fn a_pair_goes_on_in_other_memory_and_holds_none_of_what_is_gone() {
    // Rings in one region, buffers to receive into in another.
    let (fd, buffers) = (memfd(MEMORY_SIZE), memfd(0x20_0000));
    let rings = region(&fd, MEMORY_START, 0x10_0000, 0);
    let moved = region(&fd, MEMORY_START, 0x10_0000, 0x10_0000);
    let both = [rings, region(&buffers, RX_BUFFERS, 0x20_0000, 0)];
    let mut bench = Bench::on(Arc::new(GuestMemory::new(&both).unwrap()), 0);
    bench.offer_rx(0, BUFFER_SIZE);
    bench.offer_rx(1, BUFFER_SIZE);
    bench.start();
    assert!(send(&bench.wire, &with_header(b"first")));
    assert_eq!(bench.rx.await_used(), (0, 17));
    // The second buffer waits for a frame, in memory that goes now.
    let left = Arc::new(bench.memory.next(&[rings]).unwrap());
    assert_eq!(swap_memory(&[&bench.pair], &left), [true]);
    let lent = [&mut bench.memory, &mut bench.rx.queue.memory, &mut bench.tx.queue.memory];
    lent.into_iter().for_each(|memory| *memory = Arc::clone(&left));
    assert!(!is_mapped(&buffers), "memory that was taken away is still mapped");
    assert!(send(&bench.wire, &with_header(b"second")));
    let reason = "0x800 bytes at 0x200800 are not inside guest memory";
    assert_eq!(bench.await_error(), [(Side::Rx, reason.to_string())]);
    // Rings that are elsewhere are not carried there.
    let elsewhere = Arc::new(GuestMemory::new(&[moved]).unwrap());
    assert_eq!(swap_memory(&[&bench.pair], &elsewhere), [false]);
    assert_eq!(Arc::strong_count(&elsewhere), 1);
    assert!(bench.pair.is_running());
    let empty = QueuePair::new("empty", bench.event.as_raw_fd()).unwrap();
    assert_eq!(
        swap_memory(&[&empty], &left),
        [false],
        "one that is not configured has nothing to go on with"
    );
}

/// Fails if the thread of this name is busy.
fn assert_sleeps(name: &str) {
    let read = |task: &std::path::Path, what| std::fs::read_to_string(task.join(what)).unwrap_or_default();
    let find = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        { tasks }.find(|task| read(task, "comm").trim() == name)
    };
    // Threads of other tests that end meanwhile may let one be passed over.
    let deadline = Instant::now() + PATIENCE;
    let task = std::iter::repeat_with(find).take_while(|_| Instant::now() < deadline).flatten().next();
    let task = task.expect("there is such a thread");
    let cpu_ns = || -> u64 { read(&task, "schedstat").split(' ').next().unwrap().parse().unwrap() };
    let before = cpu_ns();
    std::thread::sleep(A_MOMENT);
    assert!(cpu_ns() - before < A_MOMENT.as_nanos() as u64 / 4, "the thread spins");
}

#[test]
fn a_broken_ring_stops_alone_and_says_why_once() {
    let mut bench = Bench::new();
    bench.pair = QueuePair::new("broken", bench.event.as_raw_fd()).unwrap();
    bench.rx.queue.descriptor(0, rx_buffer(0), BUFFER_SIZE, 0, 0); // read-only
    bench.rx.queue.offer(0);
    bench.start();
    let reason = "descriptor 0 is read-only in a receive queue".to_string();
    assert_eq!(bench.await_error(), [(Side::Rx, reason)]);
    assert!(readable(bench.rx.error.as_raw_fd(), PATIENCE));
    bench.offer_tx(0, b"frame");
    bench.tx.kick();
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    bench.pair.stop();
    bench.pair.start().unwrap();
    bench.offer_tx(1, b"frame");
    bench.tx.kick();
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    bench.rx.kick();
    assert_sleeps("broken");
    assert_eq!(bench.pair.take_ring_errors(), []);
    assert_eq!(bench.pair.stop().rx, Some(0));
}

#[test]
fn a_broken_transmit_ring_leaves_the_packets_before_it_sent_and_receiving_alone() {
    let mut bench = Bench::new();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.offer_tx(0, b"frame");
    bench.tx.queue.descriptor(1, TX_BUFFERS, 11, 0, 0); // shorter than the header
    bench.tx.queue.offer(1);
    bench.start();
    let reason = "a descriptor chain of 11 bytes has no room for the 12 byte header".to_string();
    assert_eq!(bench.await_error(), [(Side::Tx, reason)]);
    assert!(readable(bench.tx.error.as_raw_fd(), PATIENCE));
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    assert!(send(&bench.wire, &with_header(b"frame")));
    assert_eq!(bench.rx.await_used(), (0, 17));
    assert_eq!(bench.pair.stop(), Positions { rx: Some(1), tx: Some(1) });
}

#[test]
fn an_index_that_jumps_while_the_pair_sleeps_stops_the_ring() {
    let mut bench = Bench::new();
    bench.start();
    bench.tx.queue.set_avail_index(SIZE + 1);
    bench.tx.kick();
    let reason = "available index 65 is more than the ring's 64 entries ahead of 0".to_string();
    assert_eq!(bench.await_error(), [(Side::Tx, reason)]);
}

#[test]
fn a_tap_that_goes_away_is_no_rings_failure_and_packets_to_it_are_dropped() {
    let mut bench = Bench::new();
    bench.pair = QueuePair::new("gone", bench.event.as_raw_fd()).unwrap();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.start();
    let (other, _) = wire();
    drop(std::mem::replace(&mut bench.wire, other));
    await_rung(&bench.event, || bench.pair.interface_gone().then_some(()));
    for head in 0..4 {
        bench.offer_tx(head, b"frame");
        bench.tx.kick();
        assert_eq!(bench.tx.await_used(), (head, 0));
    }
    assert_sleeps("gone");
    let counters = bench.pair.counters();
    assert_eq!((counters.tx_dropped_interface, tx_dropped(&counters)), (4, 4));
    assert_eq!((bench.pair.take_ring_errors(), bench.pair.failed()), (vec![], (false, false)));
    assert_eq!(bench.pair.stop(), Positions { rx: Some(0), tx: Some(4) });
    bench.pair.start().unwrap();
    assert!(bench.pair.interface_gone(), "until it is configured again");
    bench.pair.stop();
    (bench.wire, bench.tap) = wire();
    bench.start();
    assert!(!bench.pair.interface_gone());
    assert!(send(&bench.wire, &with_header(b"frame")));
    assert_eq!(bench.rx.await_used(), (0, 17));
}

#[test]
fn reads_that_always_fail_are_counted_and_do_not_spin() {
    let mut bench = Bench::new();
    bench.pair = QueuePair::new("unreadable", bench.event.as_raw_fd()).unwrap();
    // It always polls as readable, and no read of it succeeds.
    let unreadable = std::fs::File::options().write(true).open("/dev/null").unwrap();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.start_with(|config| config.host = HostSide::Tap(unreadable.as_raw_fd()));
    assert_sleeps("unreadable");
    assert!(bench.pair.counters().rx_dropped_error >= 64);
    bench.offer_tx(0, b"frame");
    bench.tx.kick();
    assert_eq!(bench.tx.await_used(), (0, 0));
    assert_eq!(bench.pair.counters().tx_packets, 1);
    assert!(!bench.pair.interface_gone());
    assert_eq!(bench.pair.failed(), (false, false));
    assert_eq!(bench.pair.stop().rx, Some(0));
}

#[test]
fn descriptors_that_nobody_can_ring_by_are_refused() {
    let bench = Bench::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    for (name, fd, problem) in [
        ("kick", bench.tap.as_raw_fd(), "is a socket, must be an eventfd or a pipe"),
        ("kick", file.as_raw_fd(), "is /dev/null, must be an eventfd, a pipe or a UNIX socket"),
        ("call", file.as_raw_fd(), "is /dev/null, must be an eventfd, a pipe or a UNIX socket"),
        ("error", file.as_raw_fd(), "is /dev/null, must be an eventfd, a pipe or a UNIX socket"),
    ] {
        let mut config = bench.config();
        let tx = config.tx.as_mut().unwrap();
        match name {
            "kick" => tx.kick_fd = fd,
            "call" => tx.call_fd = Some(fd),
            _ => tx.error_fd = Some(fd),
        }
        let reason = format!("tx ring: {name} descriptor {problem}");
        assert_eq!(bench.pair.configure(&config).unwrap_err().to_string(), reason);
    }
}

#[test]
fn a_kick_pipe_that_nobody_writes_to_any_more_stops_its_ring() {
    let bench = Bench::new();
    let (reader, writer) = pipe();
    drop(writer); // end of file: readable for ever
    bench.start_with(|config| config.tx.as_mut().unwrap().kick_fd = reader.as_raw_fd());
    assert_eq!(bench.await_error(), [(Side::Tx, "kick eventfd: not an eventfd".to_string())]);
}

#[test]
fn pipes_do_for_eventfds() {
    let mut bench = Bench::new();
    let [(kicked, kick), (called, call)] = [pipe(), pipe()];
    bench.start_with(|config| {
        let tx = config.tx.as_mut().unwrap();
        (tx.kick_fd, tx.call_fd) = (kicked.as_raw_fd(), Some(call.as_raw_fd()));
    });
    bench.offer_tx(0, b"frame");
    signal(kick.as_raw_fd());
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    // The start called, and so does the packet.
    for _ in 0..2 {
        assert!(readable(called.as_raw_fd(), PATIENCE));
        assert_eq!(drain(called.as_raw_fd()).ok(), Some(true));
    }
}

#[test]
fn a_guest_is_called_through_a_socket_where_it_gave_one() {
    let mut bench = Bench::new();
    let (called, call) = std::os::unix::net::UnixStream::pair().unwrap();
    bench.start_with(|config| config.tx.as_mut().unwrap().call_fd = Some(call.as_raw_fd()));
    bench.offer_tx(0, b"frame");
    bench.tx.kick();
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
    // The start called, and so does the packet.
    let mut counts = [0; 16];
    (&called).read_exact(&mut counts).unwrap();
    assert_eq!(counts, [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn calls_out_of_order_are_refused_and_change_nothing() {
    let bench = Bench::new();
    assert_eq!(bench.pair.start(), Err(Error::NotConfigured));
    assert_eq!(bench.pair.set_positions(None, None), Err(Error::NotConfigured));
    bench.start();
    assert!(bench.pair.is_running());
    assert_eq!(bench.pair.start(), Err(Error::Running));
    assert_eq!(bench.pair.configure(&bench.config()), Err(Error::Running));
    assert_eq!(bench.pair.set_positions(None, None), Err(Error::Running));
    assert_eq!(bench.pair.set_counters(&Counters::default()), Err(Error::Running));
    bench.pair.stop();
    assert!(!bench.pair.is_running());
    let bad = Config { header_length: 11, ..bench.config() };
    let reason = "a virtio-net header has 10 or 12 bytes, not 11".to_string();
    assert_eq!(bench.pair.configure(&bad).unwrap_err().to_string(), reason);
    bench.pair.start().unwrap();
    bench.pair.close();
    bench.pair.close();
    assert_eq!(bench.pair.start(), Err(Error::Closed));
}

#[test]
fn counting_goes_on_from_what_was_set() {
    let mut bench = Bench::new();
    let before = Counters { tx_packets: 41, rx_bytes: u64::MAX, ..Counters::default() };
    bench.pair.set_counters(&before).unwrap();
    bench.offer_rx(0, BUFFER_SIZE);
    bench.offer_tx(0, b"frame");
    bench.start();
    bench.tx.await_used();
    assert!(send(&bench.wire, &with_header(b"frame")));
    bench.rx.await_used();
    let counters = bench.pair.counters();
    assert_eq!((counters.tx_packets, counters.rx_bytes), (42, 4));
}

#[test]
fn a_released_pair_holds_no_memory_and_no_descriptor_and_may_be_used_again() {
    let mut bench = Bench::new();
    bench.start();
    assert!(readable(bench.rx.call.as_raw_fd(), PATIENCE));
    bench.pair.release();
    // This bench and its two queues hold the memory; the pair does not.
    assert_eq!(Arc::strong_count(&bench.memory), 3);
    // Nobody sleeps on the TAP's end, so closing it reaches the other end at once.
    let (_, tap) = wire();
    drop(std::mem::replace(&mut bench.tap, tap));
    let mut poll = libc::pollfd { fd: bench.wire.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 1);
    let (wire, tap) = wire();
    (bench.wire, bench.tap) = (wire, tap);
    bench.offer_tx(0, b"frame");
    bench.start();
    assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
}

#[test]
fn a_call_eventfd_that_blocks_and_is_full_holds_up_nobody() {
    let bench = Bench::new();
    let full = u64::MAX - 1; // what an eventfd can count at most; one more has to wait
    for call in [&bench.rx.call, &bench.tx.call] {
        let fd = call.as_raw_fd();
        // SAFETY: plain calls on a descriptor the bench owns; the buffer is 8 bytes, as an eventfd wants.
        unsafe {
            assert_eq!(libc::write(fd, (&raw const full).cast(), 8), 8);
            assert_eq!(libc::fcntl(fd, libc::F_SETFL, 0), 0, "blocking from here on");
        }
    }
    bench.start();
    assert_eq!(bench.pair.stop(), Positions { rx: Some(0), tx: Some(0) });
}

/// What is said of both rings when the bench's memory is lost.
fn lost() -> Vec<(Side, String)> {
    let reason = "guest memory at 0x100000, 0x400000 bytes, is lost: its file became smaller than announced, has no page \
                  to give, or cannot be mapped";
    vec![(Side::Rx, reason.to_string()), (Side::Tx, reason.to_string())]
}

fn await_both_lost(bench: &Bench) {
    let mut errors = bench.await_error();
    if errors.len() < 2 {
        errors.extend(bench.await_error());
    }
    errors.sort_by_key(|(side, _)| *side == Side::Tx);
    assert_eq!(errors, lost());
    assert_eq!(bench.pair.failed(), (true, true));
    for end in [&bench.rx, &bench.tx] {
        assert_eq!(drain(end.error.as_raw_fd()).ok(), Some(true));
    }
}

#[test]
fn memory_that_is_lost_under_running_rings_stops_both_and_no_other_pair() {
    let mut other = Bench::new();
    other.start();
    for size in [0, MEMORY_SIZE / 8] {
        let file = memfd(MEMORY_SIZE);
        let mut bench = Bench::on(memory_of(&file), 0);
        bench.offer_rx(0, BUFFER_SIZE);
        bench.start();
        // Nothing was touched yet behind the first half MiB: there the kernel meets what is missing, before us.
        truncate(&file, size);
        assert!(send(&bench.wire, &with_header(b"frame")));
        bench.tx.kick();
        await_both_lost(&bench);
        let counters = bench.pair.counters();
        assert_eq!((counters.rx_dropped_length, tx_dropped(&counters)), (0, 0));
        // It stays so until it is configured anew.
        bench.pair.stop();
        bench.pair.start().unwrap();
        assert_eq!(bench.pair.failed(), (true, true));
        assert_eq!(bench.pair.take_ring_errors(), []);
    }
    other.offer_rx(0, BUFFER_SIZE);
    other.rx.kick();
    assert!(send(&other.wire, &with_header(b"frame")));
    assert_eq!(other.rx.await_used(), (0, 12 + 5));
    assert_eq!(other.pair.failed(), (false, false));
}

#[test]
fn buffers_that_the_kernel_cannot_read_stop_the_rings_and_count_as_no_drop() {
    let file = memfd(MEMORY_SIZE);
    let mut bench = Bench::on(memory_of(&file), 0);
    bench.start();
    bench.tx.queue.descriptor(0, TX_BUFFERS, 100, 0, 0);
    bench.tx.queue.offer(0);
    truncate(&file, MEMORY_SIZE / 8);
    bench.tx.kick();
    await_both_lost(&bench);
    let counters = bench.pair.counters();
    assert_eq!((counters.tx_packets, tx_dropped(&counters)), (0, 0));
    assert_eq!(bench.pair.stop().tx, Some(0), "the packet was not taken");
}

#[test]
fn whoever_asks_a_running_pair_waits_for_no_turn_of_it() {
    let mut bench = Bench::new();
    bench.start();
    let tap = bench.tap.as_raw_fd();
    // SAFETY: a plain call on a descriptor the bench owns.
    let set_flags = |flags: libc::c_int| unsafe { libc::fcntl(tap, libc::F_SETFL, flags) };
    // In the middle of a turn, for as long as no frame comes.
    assert_eq!(set_flags(0), 0);
    for head in 0..8 {
        bench.offer_rx(head, BUFFER_SIZE);
    }
    assert!(send(&bench.wire, &with_header(b"frame")));
    bench.rx.kick();
    let deadline = std::time::Instant::now() + PATIENCE;
    while bench.rx.queue.used_index() == 0 {
        assert!(std::time::Instant::now() < deadline, "no frame was delivered");
        std::thread::yield_now();
    }
    let pair = &bench.pair;
    let (answer, answered) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || answer.send((pair.failed(), pair.positions(), pair.is_running())).unwrap());
        let told = answered.recv_timeout(PATIENCE);
        set_flags(libc::O_NONBLOCK);
        assert!(send(&bench.wire, &with_header(b"frame")));
        assert_eq!(told.map(|(failed, _, is_running)| (failed, is_running)), Ok(((false, false), true)));
    });
}

/// Moves packets both ways, each after a kick, and waits for their calls.
fn move_packets(bench: &mut Bench) {
    for head in 0..8 {
        bench.offer_rx(head, BUFFER_SIZE);
        bench.rx.kick();
        assert!(send(&bench.wire, &with_header(b"frame")));
        assert_eq!(bench.rx.await_used(), (head, 17));
        bench.offer_tx(head, b"frame");
        bench.tx.kick();
        assert_eq!(await_frame(&bench.wire), with_header(b"frame"));
        assert_eq!(bench.tx.await_used(), (head, 0));
    }
}

#[test]
fn a_kernel_that_reads_no_eventfd_without_waiting_serves_as_well() {
    refuse(libc::SYS_preadv2, libc::EOPNOTSUPP);
    let rung = eventfd();
    assert_eq!(drain(rung.as_raw_fd()).ok(), Some(false));
    signal(rung.as_raw_fd());
    assert_eq!(drain(rung.as_raw_fd()).ok(), Some(true));
    let (reader, writer) = pipe();
    assert_eq!(drain(reader.as_raw_fd()).ok(), Some(false), "a pipe that blocks");
    drop(writer);
    assert!(drain(reader.as_raw_fd()).is_err());
    let mut bench = Bench::new();
    bench.start();
    move_packets(&mut bench);
}

#[test]
fn no_call_is_lost_if_the_kernel_has_no_memory_for_asynchronous_operations() {
    refuse(libc::SYS_io_submit, libc::EAGAIN);
    let mut bench = Bench::new();
    bench.start();
    move_packets(&mut bench);
}
