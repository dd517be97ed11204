//! What a packet costs without its system calls, and how long a stop takes under load.
//!
//! `cargo bench -p localmig-dataplane` prints both; nothing is asserted, because machines differ.

#[path = "../tests/common/mod.rs"]
mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    eventfd, memfd, memory, receive, region, send, wire, PackedQueue, Queue, ALL_OFFLOADS, MEMORY_START,
    NEXT, WRITE,
};
use dataplane::chain::{Direction, Features};
use dataplane::ledger::Ledger;
use dataplane::log::{DirtyLog, RingLog};
use dataplane::memory::GuestMemory;
use dataplane::packed::{PackedRing, Position};
use dataplane::queue_pair::QueuePair;
use dataplane::split::SplitRing;
use dataplane::sys::signal;
use dataplane::{Config, Format, HostSide, RingSpec};

const SIZE: u16 = 256;
const HEADER: usize = 12;
const REGION_SIZE: u64 = 0x1000;
const BUFFERS: u64 = MEMORY_START + 0x10_0000;
const FEATURES: Features = Features { event_index: true, indirect: true };

/// A transmit ring whose every entry is a packet of header and frame, offered without end.
fn endless(memory: &Arc<dataplane::memory::GuestMemory>, address: u64) -> Queue {
    let mut queue = Queue::new(memory, address, SIZE, 0);
    for head in (0..SIZE).step_by(2) {
        queue.descriptor(head, BUFFERS, 12, NEXT, head + 1);
        queue.descriptor(head + 1, BUFFERS + 0x1000, 1500, 0, 0);
    }
    for index in 0..SIZE {
        queue.offer(index / 2 * 2);
    }
    queue
}

/// What a transmit ring's packets cost, and with the dirty log in which its used ring is marked.
fn ring_work(is_logged: bool) {
    const ROUNDS: u32 = 20_000;
    let memory = memory();
    let mut queue = endless(&memory, MEMORY_START);
    let mut ring = SplitRing::new(&queue.layout, FEATURES, &memory).expect("a good layout");
    let file = memfd(0x1000);
    let log = Arc::new(DirtyLog::new(0x1000, 0, file.as_raw_fd()));
    let device_area = Some(queue.layout.device_area);
    ring.set_log(is_logged.then_some(RingLog { log, device_area }));
    ring.check_log().expect("a large log");
    ring.begin(None, true);
    let mut buffers = Vec::new();
    let began = Instant::now();
    for _ in 0..ROUNDS {
        for _ in 0..SIZE {
            buffers.clear();
            let chain = ring.take(Direction::FromGuest, HEADER, &mut buffers).expect("a good chain");
            ring.complete(&chain.expect("one is there"), 0);
            ring.publish();
        }
        let _ = ring.call_due();
        queue.set_avail_index(queue.avail_index.wrapping_add(SIZE));
    }
    let packets = ROUNDS * u32::from(SIZE);
    println!(
        "split ring{}: {:.1} ns a packet of two buffers",
        if is_logged { ", logged" } else { "" },
        began.elapsed().as_nanos() as f64 / f64::from(packets)
    );
}

/// The same with a packed ring and its ledger. Only the device's work counts: the guest fills the ring for each lap.
fn packed_ring_work() {
    const LAPS: u32 = 20_000;
    const PACKETS: u16 = SIZE / 2;
    let memory = memory();
    let mut queue = PackedQueue::new(&memory, MEMORY_START, SIZE, Position::START);
    let file = Ledger::create(1).expect("a memory file");
    let ledger = Ledger::map(file.as_raw_fd(), 1).expect("a ledger");
    let mut ring = PackedRing::new(&queue.layout, FEATURES, &memory, ledger.slot(0)).expect("a good layout");
    ring.begin(Some(Position::START.bits()), true).expect("a good position");
    let mut buffers = Vec::new();
    let mut spent = Duration::ZERO;
    for _ in 0..LAPS {
        for id in 0..PACKETS {
            queue.offer_chain(&[(BUFFERS, 12), (BUFFERS + 0x1000, 1500)], id, 0);
        }
        let began = Instant::now();
        for _ in 0..PACKETS {
            buffers.clear();
            let chain = ring.take(Direction::FromGuest, HEADER, &mut buffers).expect("a good chain");
            ring.complete(&chain.expect("one is there"), 0);
            ring.publish();
        }
        let _ = ring.call_due();
        spent += began.elapsed();
    }
    let packets = f64::from(LAPS) * f64::from(PACKETS);
    println!("packed ring: {:.1} ns a packet of two buffers", spent.as_nanos() as f64 / packets);
}

/// A look-up of guest addresses that lie anywhere in the first, in some, or in all of so many regions.
fn look_up() {
    const ROUNDS: usize = 1_000_000;
    for (regions, used) in [(1, 1), (8, 1), (8, 8), (509, 1), (509, 8), (509, 509)] {
        let fd = memfd(regions * REGION_SIZE);
        let specs = (0..regions).map(|index| {
            region(&fd, MEMORY_START + 2 * index * REGION_SIZE, REGION_SIZE, index * REGION_SIZE)
        });
        let memory = GuestMemory::new(&specs.collect::<Vec<_>>()).expect("good regions");
        // A multiplier of full period: the same addresses in every run.
        let address = |round: u64| {
            let random = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            MEMORY_START + 2 * (random % used) * REGION_SIZE + (random >> 9) % 0x800
        };
        let addresses: Vec<_> = (0..4096).map(address).collect();
        let began = Instant::now();
        for round in 0..ROUNDS {
            std::hint::black_box(memory.host(addresses[round % addresses.len()], 1500));
        }
        let look_up = began.elapsed().as_nanos() as f64 / ROUNDS as f64;
        let began = Instant::now();
        for _ in 0..ROUNDS {
            std::hint::black_box(memory.lost());
        }
        let lost = began.elapsed().as_nanos() as f64 / ROUNDS as f64;
        println!(
            "{regions} regions, {used} in use: {look_up:.1} ns a look-up, {lost:.1} ns to ask for a loss"
        );
    }
}

fn stop_under_load() {
    const STOPS: usize = 2000;
    let memory = memory();
    let mut queue = endless(&memory, MEMORY_START);
    let (wire, tap) = wire();
    let (kick, event) = (eventfd(), eventfd());
    let ring = RingSpec {
        layout: queue.layout,
        kick_fd: kick.as_raw_fd(),
        call_fd: None,
        error_fd: None,
        next_avail: None,
        ledger: None,
        in_flight: None,
        log: None,
    };
    let pair = QueuePair::new("bench", event.as_raw_fd()).expect("a thread");
    let config = Config {
        memory: Arc::clone(&memory),
        host: HostSide::Tap(tap.as_raw_fd()),
        header_length: 12,
        frame_length_max: 1514,
        offloads: ALL_OFFLOADS,
        format: Format::Split,
        features: FEATURES,
        mergeable: true,
        rx: None,
        tx: Some(ring),
    };
    pair.configure(&config).expect("a good configuration");
    let done = AtomicBool::new(false);
    let mut times = Vec::with_capacity(STOPS);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The guest: refills the ring and empties the wire as fast as it can.
            while !done.load(Ordering::Relaxed) {
                queue.set_avail_index(queue.used_index().wrapping_add(SIZE));
                signal(kick.as_raw_fd());
                while receive(&wire).is_some() {}
            }
        });
        for _ in 0..STOPS {
            pair.start().expect("it is stopped");
            std::thread::sleep(Duration::from_micros(300));
            let began = Instant::now();
            pair.stop();
            times.push(began.elapsed());
        }
        done.store(true, Ordering::Relaxed);
    });
    times.sort();
    let packets = pair.counters().tx_packets;
    println!(
        "stop under load: median {:?}, p99 {:?}, longest {:?} of {STOPS}, {packets} packets moved",
        times[STOPS / 2],
        times[STOPS * 99 / 100],
        times[STOPS - 1]
    );
}

/// Frames of one length through a wire that costs about as much as a TAP, into buffers of 1536 bytes as Linux posts them.
fn receiving(frame_length: usize, frame_length_max: usize, rounds: u32) {
    const BUFFER: u64 = 1536;
    let memory = memory();
    let mut queue = Queue::new(&memory, MEMORY_START, SIZE, 0);
    for head in 0..SIZE {
        queue.descriptor(head, BUFFERS + u64::from(head) * BUFFER, BUFFER as u32, WRITE, 0);
        queue.offer(head);
    }
    let (wire, tap) = wire();
    let (kick, event) = (eventfd(), eventfd());
    let ring = RingSpec {
        layout: queue.layout,
        kick_fd: kick.as_raw_fd(),
        call_fd: None,
        error_fd: None,
        next_avail: None,
        ledger: None,
        in_flight: None,
        log: None,
    };
    let pair = QueuePair::new("bench", event.as_raw_fd()).expect("a thread");
    let config = Config {
        memory: Arc::clone(&memory),
        host: HostSide::Tap(tap.as_raw_fd()),
        header_length: 12,
        frame_length_max,
        offloads: ALL_OFFLOADS,
        format: Format::Split,
        features: FEATURES,
        mergeable: true,
        rx: Some(ring),
        tx: None,
    };
    pair.configure(&config).expect("a good configuration");
    let frame = vec![0; 12 + frame_length];
    let mut times = Vec::new();
    for _ in 0..rounds {
        // As many as a start moves before it returns, so no other thread takes part.
        let count = if frame_length > 4096 { 1 } else { 16 };
        for _ in 0..count {
            assert!(send(&wire, &frame), "the wire has room");
        }
        let began = Instant::now();
        pair.start().expect("it is stopped");
        times.push(began.elapsed() / count);
        pair.stop();
        queue.set_avail_index(queue.used_index().wrapping_add(SIZE));
    }
    times.sort();
    println!(
        "receive {frame_length} bytes, at most {frame_length_max}: median {:?} a frame, best tenth {:?}",
        times[times.len() / 2],
        times[times.len() / 10]
    );
}

fn main() {
    look_up();
    ring_work(false);
    ring_work(true);
    packed_ring_work();
    for frame_length_max in [1518, 65554] {
        receiving(60, frame_length_max, 5000);
        receiving(1514, frame_length_max, 5000);
    }
    receiving(65000, 65554, 5000);
    stop_under_load();
}
